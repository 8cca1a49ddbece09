"""Token shards: what is written is what is read, or there is nothing."""

import json

import numpy as np
import pytest

from dsjax.data.shards import Writer, open_corpus, read_index, whole_directory
from dsjax.data.tokenizer import train_bpe
from dsjax.errors import UserError

TOKENIZER = train_bpe(["some text to train on"], vocab_size=280)


@pytest.fixture
def documents(rng):
    return [rng.integers(0, 280, size).astype(np.uint16) for size in range(1, 40)]


def write(directory, documents, *, shard_tokens, at_once):
    writer = Writer(directory, TOKENIZER, shard_tokens=shard_tokens)
    for start in range(0, len(documents), at_once):
        part = documents[start : start + at_once]
        writer.add(part, bytes=3 * len(part))
    return writer.close()


@pytest.mark.parametrize("shard_tokens", [1, 100, 10**6])
def test_what_is_written_is_read(documents, tmp_path, shard_tokens):
    index = write(tmp_path, documents, shard_tokens=shard_tokens, at_once=7)
    assert read_index(tmp_path) == index
    corpus = open_corpus(tmp_path)
    read = [
        corpus.tokens[start : start + size]
        for start, size in zip(corpus.starts, corpus.lengths)
    ]
    for found, document in zip(read, documents, strict=True):
        np.testing.assert_array_equal(found, document)
    assert (index.documents, index.tokens, index.bytes) == (39, 780, 3 * 39)
    assert corpus.tokens[:].dtype == np.uint16
    sizes = [shard["tokens"] for shard in index.shards]
    assert all(size <= max(shard_tokens, 39) for size in sizes)
    assert len(sizes) == {1: 39, 100: 10, 10**6: 1}[shard_tokens]


def test_shards_do_not_depend_on_how_documents_come(documents, tmp_path):
    write(tmp_path / "a", documents, shard_tokens=100, at_once=1)
    write(tmp_path / "b", documents, shard_tokens=100, at_once=39)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        contents = [(tmp_path / side / name).read_bytes() for side in "ab"]
        assert contents[0] == contents[1], name


def test_tokens_are_mapped_not_read(documents, tmp_path):
    write(tmp_path, documents, shard_tokens=10**6, at_once=1)
    part = open_corpus(tmp_path).tokens[10:20]
    while part.base is not None and not isinstance(part, np.memmap):
        part = part.base
    assert isinstance(part, np.memmap) and part.mode == "r"


def test_a_failure_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), whole_directory(out) as partial:
        (partial / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial").mkdir()  # what a killed process leaves
    (tmp_path / "out.partial" / "half").write_text("written")
    with whole_directory(out) as partial:
        (partial / "whole").write_text("written")
    assert [path.name for path in out.iterdir()] == ["whole"]
    with pytest.raises(UserError, match="out exists"), whole_directory(out):
        pass


def test_broken_directories_are_named(documents, tmp_path):
    write(tmp_path, documents, shard_tokens=100, at_once=1)
    index = tmp_path / "index.json"
    (tmp_path / "tokens-00001.npy").write_bytes(b"short")
    with pytest.raises(UserError, match=r"tokens-00001\.npy"):
        open_corpus(tmp_path)
    np.save(tmp_path / "tokens-00001.npy", np.zeros(5, np.uint16))
    with pytest.raises(UserError, match=r"00001\.npy has shape \(5,\), .* says \(\d+,"):
        open_corpus(tmp_path)
    (tmp_path / "tokens-00001.npy").unlink()
    with pytest.raises(UserError, match=r"tokens-00001\.npy"):
        open_corpus(tmp_path)
    index.write_text(json.dumps({"format": "another"}))
    with pytest.raises(UserError, match="format 'another' is not"):
        open_corpus(tmp_path)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json"):
        open_corpus(tmp_path)
    with pytest.raises(UserError, match="no documents"):
        Writer(tmp_path / "empty", TOKENIZER).close()
