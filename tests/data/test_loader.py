"""The pipeline: shares of a mixture, one global order for any number of hosts, and its
position saved and restored."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dsjax.data.held_out import held_out_batches
from dsjax.data.loader import SLOTS, Mixture, batches, loader
from dsjax.data.mixture import Data, Documents, Source, StandardLibrary
from dsjax.data.prepare import prepare
from dsjax.data.shards import Writer, open_corpus, read_index
from dsjax.data.text import Corpus, encode, read_texts
from dsjax.data.tokenizer import BOS, Tokenizer, train_bpe
from dsjax.data.windows import Windows
from dsjax.errors import UserError


@pytest.fixture
def windows():
    """1000 tokens that are their own positions, in documents of 70."""
    corpus = Corpus(
        tokens=np.arange(1000, dtype=np.uint16), starts=np.arange(0, 1000, 70)
    )
    return Windows(corpus, length=32, segments=True)


class Numbers:
    """A source whose element n says whose it is, and n."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, index):
        return self.name, index


def take(iterator, count):
    return [next(iterator)["tokens"] for _ in range(count)]


# --- mixtures


@pytest.mark.parametrize("weights", [[1], [3, 1], [0.6, 0.3, 0.1], [1, 1e-3]])
def test_a_mixture_has_exact_shares(weights):
    mixture = Mixture([Numbers(k) for k in range(len(weights))], weights)
    drawn = [mixture[n] for n in range(2 * SLOTS)]
    shares = np.array(weights) / sum(weights)
    for source, share in enumerate(shares):
        numbers = [n for name, n in drawn if name == source]
        assert numbers == list(range(len(numbers))), "each element once, in order"
        assert abs(len(numbers) - 2 * SLOTS * share) <= 2
        so_far = np.cumsum([name == source for name, _ in drawn])
        steps = np.arange(1, len(drawn) + 1)
        assert np.abs(so_far - steps * share).max() <= len(weights)


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, 1e-6]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(UserError, match=r"weights \[1\.0, "):
        Mixture([Numbers(0), Numbers(1)], weights)


# --- batches


def test_batches_are_the_windows_in_order(windows):
    iterator = batches(windows, batch_size=4)
    for step in range(20):
        batch = next(iterator)
        for name in ("tokens", "segments"):
            rows = [windows[4 * step + row][name] for row in range(4)]
            np.testing.assert_array_equal(batch[name], rows)
            assert batch[name].dtype == np.int32


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_global_batch(windows, hosts):
    whole = take(batches(windows, batch_size=8), 10)
    parts = [
        take(batches(windows, batch_size=8, hosts=(host, hosts)), 10)
        for host in range(hosts)
    ]
    for step, expected in enumerate(whole):
        together = np.concatenate([part[step] for part in parts])
        np.testing.assert_array_equal(together, expected)


@pytest.mark.parametrize(("batch_size", "hosts"), [(8, 1), (8, 2), (4, 1), (20, 4)])
def test_a_saved_position_goes_on_exactly(windows, batch_size, hosts):
    """With another number of hosts and another microbatch, too."""
    iterator = batches(windows, batch_size=8, hosts=(1, 2))
    take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    parts = [
        batches(windows, batch_size=batch_size, hosts=(host, hosts))
        for host in range(hosts)
    ]
    for part in parts:
        take(part, 3)  # it has been elsewhere before
        part.set_state(state)
    rows = [row for _ in range(4) for part in parts for row in take(part, 1)[0]]
    expected = [windows[5 * 8 + n]["tokens"] for n in range(4 * batch_size)]
    np.testing.assert_array_equal(rows, expected)


def test_a_position_elsewhere_is_refused(windows):
    iterator = batches(windows, batch_size=8, data="one")
    take(iterator, 1)
    state = iterator.get_state()
    with pytest.raises(UserError, match="not those of the saved position"):
        batches(windows, batch_size=8, data="two").set_state(state)
    with pytest.raises(UserError, match=r"8 sequences .* microbatch of 3"):
        batches(windows, batch_size=3, data="one").set_state(state)
    with pytest.raises(UserError, match=r"batch_size=3 .* 2 hosts"):
        batches(windows, batch_size=3, hosts=(0, 2))


# --- the loader, from text to batches


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small directory of Python files, one of them with a byte that is no UTF-8."""
    root = tmp_path_factory.mktemp("library")
    for number in range(60):
        name = hashlib.sha256(bytes([number])).hexdigest()
        lines = [f"# {number}\ndef f{c}(x):\n    return {name}\n" for c in name[:9]]
        (root / f"m{number}.py").write_text("\n".join(lines))
    (root / "m0.py").write_bytes(b"# \xff\n")
    return StandardLibrary(vocab_size=320, held_out_percent=20, root=str(root))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def prepared(library, workdir):
    return prepare(Data(sources=library), workdir)


def test_the_standard_library_is_prepared_once(library, workdir, prepared):
    train = open_corpus(prepared.sources[0].path)
    held_out = open_corpus(prepared.held_out)
    tokenizer = Tokenizer.load(prepared.tokenizer)
    assert prepared.vocab_size == tokenizer.vocab_size == 320
    texts = [
        {tokenizer.decode(text) for text in np.split(c.tokens[:], c.starts[1:])}
        for c in (train, held_out)
    ]
    assert len(train.starts) + len(held_out.starts) == 60
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == set(read_texts(sorted(_root(library).glob("*"))))
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.npy")}
    assert prepare(Data(sources=library), workdir) == prepared
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*.npy")}


def _root(library):
    return Path(library.root)


def test_loader_separates_documents_and_fills_in(library, workdir, prepared):
    data = Data(sources=library, documents=Documents.SEPARATE, fim_rate=0.5)
    iterator = loader(data, length=64, microbatch=4, seed=0, workdir=workdir)
    rows = [next(iterator) for _ in range(50)]
    tokens = np.concatenate([row["tokens"] for row in rows])
    segments = np.concatenate([row["segments"] for row in rows])
    assert tokens.shape == segments.shape == (200, 65)
    assert tokens.dtype == segments.dtype == np.int32
    bos = Tokenizer.load(prepared.tokenizer).bos_id
    np.testing.assert_array_equal(
        np.diff(segments, axis=1), (tokens == bos)[:, 1:].astype(int)
    )
    begin, hole, end = Tokenizer.load(prepared.tokenizer).fim_ids
    documents = (tokens == bos).sum()
    for mark in (begin, hole, end):
        assert 0.3 < (tokens == mark).sum() / documents < 0.7
    plain = Data(sources=library)
    one = next(loader(plain, length=64, microbatch=4, seed=0, workdir=workdir))
    other = next(loader(plain, length=64, microbatch=4, seed=1, workdir=workdir))
    assert set(one) == {"tokens"}
    assert not np.array_equal(one["tokens"], other["tokens"])


def test_loader_mixes_directories(library, workdir, prepared):
    sources = (
        Source(path=prepared.sources[0].path, weight=3.0),
        Source(path=str(prepared.held_out), weight=1.0),
    )
    data = Data(sources=sources, held_out=str(prepared.held_out))
    iterator = loader(data, length=400, microbatch=8, seed=0, workdir=workdir)
    parts = [open_corpus(source.path) for source in sources]
    known = [
        {tuple(text[:12]) for text in np.split(part.tokens[:], part.starts[1:])}
        for part in parts
    ]
    found = np.zeros(2)
    for tokens in take(iterator, 100):
        for row in tokens:
            for place in np.flatnonzero(row[:-12] == 0):
                found += [tuple(row[place : place + 12]) in part for part in known]
    assert 0.7 < found[0] / found.sum() < 0.8


def test_loader_says_what_is_wrong(library, workdir, prepared, tmp_path):
    load = lambda data: loader(  # noqa: E731
        data, length=16, microbatch=2, seed=0, workdir=workdir
    )
    with pytest.raises(UserError, match=r"nowhere: no index\.json"):
        load(Data(sources=(Source(path="nowhere"),)))
    with pytest.raises(UserError, match=r"fim_rate=1\.5"):
        load(Data(sources=library, fim_rate=1.5))
    with pytest.raises(UserError, match="nothing to train on"):
        load(Data(sources=()))
    with pytest.raises(UserError, match="0 held out"):
        load(Data(sources=StandardLibrary(root=str(tmp_path))))
    tokenizer = train_bpe(["another text"], vocab_size=300)
    writer = Writer(tmp_path / "other", tokenizer)
    writer.add(encode(["a", "b"], tokenizer), bytes=2)
    writer.close()
    both = (prepared.sources[0], Source(path=str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"other has another tokenizer than"):
        load(Data(sources=both))


# --- held-out text


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize(("length", "stride"), [(50, 50), (50, 20), (100_000, 7)])
def test_held_out_tokens_are_targets_once(
    library, workdir, prepared, length, stride, hosts
):
    data = Data(sources=library, documents=Documents.SEPARATE)
    corpus = open_corpus(prepared.held_out)
    targets, rows = [], 0
    for host in range(hosts):
        held = held_out_batches(
            data,
            length=length,
            stride=stride,
            batch=4,
            workdir=workdir,
            hosts=(host, hosts),
        )
        for batch in held:
            tokens, mask = batch["tokens"], batch["mask"]
            assert tokens.shape == (4 // hosts, length + 1) == batch["segments"].shape
            targets.append(tokens[:, 1:][mask])
            rows += mask.any(axis=1).sum()
            bos = tokens[:, 1:][mask] == 0
            np.testing.assert_array_equal(np.diff(batch["segments"])[mask] == 1, bos)
    assert rows == len(held.chosen)
    if hosts == 1:
        np.testing.assert_array_equal(np.concatenate(targets), corpus.tokens[1:])
    assert sorted(np.concatenate(targets)) == sorted(corpus.tokens[1:])
    assert held.targets == len(corpus.tokens) - 1
    assert held.bytes == read_index(prepared.held_out).bytes
    assert held.bits_per_byte(np.log(2) * held.bytes) == pytest.approx(1.0)


def test_held_out_context_and_subset(library, workdir, prepared):
    data = Data(sources=library)
    held = held_out_batches(data, length=50, stride=20, batch=1, workdir=workdir)
    first, *rest = list(held)[:-1]
    assert first["mask"].all()
    assert all(row["mask"].tolist() == [[False] * 30 + [True] * 20] for row in rest)
    some = held_out_batches(data, length=50, batch=4, workdir=workdir, sequences=6)
    assert len(some) == 2 and some.targets == 6 * 50
    tokens = len(open_corpus(prepared.held_out).tokens) - 1
    whole = read_index(prepared.held_out).bytes
    assert some.bytes == pytest.approx(whole * 300 / tokens)
    last = list(some)[-1]
    assert last["mask"].any(axis=1).tolist() == [True, True, False, False]
    assert "segments" not in last


def test_held_out_bytes_are_those_of_the_files(library, prepared):
    """A byte that is no UTF-8 counts as what stands for it."""
    index = [read_index(path) for path in (prepared.sources[0].path, prepared.held_out)]
    on_disk = sum(path.stat().st_size for path in _root(library).glob("*"))
    assert sum(part.bytes for part in index) == on_disk + 2
    assert Tokenizer.load(prepared.tokenizer).bos_token == BOS
