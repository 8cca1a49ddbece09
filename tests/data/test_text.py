"""The pipeline: every token once, one global order, its position saved and restored."""

import numpy as np
import pytest

from dsjax.data.stdlib import python_source
from dsjax.data.text import Corpus, Windows, batches, read_texts, tokenize
from dsjax.data.tokenizer import train_bpe
from dsjax.errors import UserError


@pytest.fixture
def corpus():
    """1000 tokens that are their own positions, in documents of 70."""
    return Corpus(
        tokens=np.arange(1000, dtype=np.uint16), starts=np.arange(0, 1000, 70)
    )


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator)["tokens"] for _ in range(count)]


def test_documents_are_bos_text_eos():
    texts = ["def f(): pass\n", "x = 1\n"]
    tokenizer = train_bpe(texts, vocab_size=300)
    corpus = tokenize(iter(texts), tokenizer, chunk=1)
    first, second = np.split(corpus.tokens, corpus.starts[1:])
    assert corpus.tokens.dtype == np.uint16
    assert [first[0], first[-1], second[0], second[-1]] == [0, 1, 0, 1]
    assert tokenizer.decode(second) == texts[1]
    with pytest.raises(UserError, match=r"no documents"):
        tokenize([], tokenizer)


def test_every_token_is_a_target_once(corpus):
    windows = Windows(corpus, length=32)
    tokens = np.stack([windows[i]["tokens"] for i in range(len(windows))])
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(
        tokens[:, 1:].ravel(), np.arange(1, 1 + 32 * len(windows))
    )
    np.testing.assert_array_equal(tokens[:, :-1] + 1, tokens[:, 1:])


def test_segments_number_the_documents_of_a_window(corpus):
    window = Windows(corpus, length=128, segments=True)[1]
    expected = window["tokens"] // 70 - 128 // 70
    np.testing.assert_array_equal(window["segments"], expected)


def test_an_epoch_has_every_window_and_the_next_another_order(corpus):
    windows = Windows(corpus, length=37)  # 27 windows, 6 batches and 3 left over
    epochs = take(batches(windows, batch_size=4, seed=0), 12)
    first, second = (np.sort(np.concatenate(e)[:, 0]) for e in (epochs[:6], epochs[6:]))
    assert len(set(first)) == len(set(second)) == 24
    assert not np.array_equal(np.concatenate(epochs[:6]), np.concatenate(epochs[6:]))
    assert len(list(batches(windows, batch_size=4, seed=0, epochs=2))) == 12


def test_order_depends_on_the_seed_alone(corpus):
    windows = Windows(corpus, length=32)
    one = take(batches(windows, batch_size=8, seed=3), 10)
    again = take(batches(windows, batch_size=8, seed=3), 10)
    other = take(batches(windows, batch_size=8, seed=4), 10)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_global_batch(corpus, hosts):
    windows = Windows(corpus, length=32)
    whole = take(batches(windows, batch_size=8, seed=0), 10)
    parts = [
        take(batches(windows, batch_size=8, seed=0, shard=(host, hosts)), 10)
        for host in range(hosts)
    ]
    for step, expected in enumerate(whole):
        together = np.concatenate([part[step] for part in parts])
        np.testing.assert_array_equal(
            together[np.argsort(together[:, 0])], expected[np.argsort(expected[:, 0])]
        )


def test_iterator_state_resumes_exactly(corpus):
    dataset = batches(Windows(corpus, length=32), batch_size=8, seed=0)
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator)["tokens"] for _ in range(5)]
    fresh = iter(dataset)
    fresh.set_state(state)
    np.testing.assert_array_equal(expected, [next(fresh)["tokens"] for _ in range(5)])


def test_user_errors_show_the_values(corpus, tmp_path):
    windows = Windows(corpus, length=500)
    with pytest.raises(UserError, match=r"1 windows .* batch_size=2"):
        batches(windows, batch_size=2, seed=0)
    with pytest.raises(UserError, match=r"batch_size=3 .* 2 hosts"):
        batches(windows, batch_size=3, seed=0, shard=(0, 2))
    with pytest.raises(UserError, match=r"missing\.txt"):
        list(read_texts([tmp_path / "missing.txt"]))


def test_standard_library_split(tmp_path):
    for name in [f"m{i}.py" for i in range(300)] + ["test/test_a.py", "encodings/b.py"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
    split = python_source(root=tmp_path, held_out_percent=10)
    assert not set(split.train) & set(split.held_out)
    assert len(split.train) + len(split.held_out) == 300
    assert 15 <= len(split.held_out) <= 45
    real = python_source()
    assert sum(path.stat().st_size for path in real.train) > 5e6
    assert len(real.held_out) >= 10
