"""Documents to tokens, in memory; the standard library as a corpus."""

import numpy as np
import pytest

from dsjax.data.stdlib import python_source
from dsjax.data.text import Joined, read_texts, tokenize
from dsjax.data.tokenizer import train_bpe
from dsjax.errors import UserError


def test_documents_are_bos_text_eos():
    texts = ["def f(): pass\n", "x = 1\n"]
    tokenizer = train_bpe(texts, vocab_size=300)
    corpus = tokenize(iter(texts), tokenizer, chunk=1)
    first, second = np.split(corpus.tokens, corpus.starts[1:])
    assert corpus.tokens.dtype == np.uint16
    assert [first[0], first[-1], second[0], second[-1]] == [0, 1, 0, 1]
    assert tokenizer.decode(second) == texts[1]
    assert (corpus.head, corpus.tail) == (1, 1)
    with pytest.raises(UserError, match=r"no documents"):
        tokenize([], tokenizer)


def test_joined_arrays_read_as_one():
    parts = [np.arange(0, 5), np.arange(5, 6), np.arange(6, 20)]
    joined = Joined(parts)
    assert len(joined) == 20
    for start in range(21):
        for stop in range(start, 21):
            np.testing.assert_array_equal(joined[start:stop], np.arange(start, stop))
    assert np.shares_memory(joined[7:9], parts[2])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.txt"):
        list(read_texts([tmp_path / "missing.txt"]))


def test_standard_library_split(tmp_path):
    beside = ["test/test_a.py", "encodings/b.py"]
    never = ["site-packages/c.py", "__pycache__/d.py"]
    for name in [f"m{i}.py" for i in range(300)] + beside + never:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    split = python_source(root=tmp_path, held_out_percent=10)
    assert not set(split.train) & set(split.held_out)
    assert len(split.train) + len(split.held_out) == 300
    assert 15 <= len(split.held_out) <= 45
    whole = python_source(root=tmp_path, held_out_percent=10, tests=True)
    assert len(whole.train) + len(whole.held_out) == 302
    assert set(split.held_out) <= set(whole.held_out)
    real = python_source()
    assert sum(path.stat().st_size for path in real.train) > 5e6
    assert len(real.held_out) >= 10
