"""Training windows: every token once an epoch, documents whole, FIM as it is defined."""

import threading
import tracemalloc

import numpy as np
import pytest

from dsjax.data.text import Corpus, Joined
from dsjax.data.windows import Epoch, Fim, Windows, hashes, permutation

BEGIN, HOLE, END = MARKS = (60001, 60002, 60003)
FIM = Fim(rate=0.1, ids=MARKS)


def documents(lengths, **frame) -> Corpus:
    """Token k of the corpus is k: what a window holds tells where it is from."""
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    return Corpus(tokens=tokens, starts=starts, **frame)


@pytest.fixture
def corpus(rng):
    return documents(rng.integers(2, 90, size=200))


def whole_epoch(corpus: Corpus, epoch: int, **options) -> np.ndarray:
    """All tokens of an epoch in order: a window as long as the epoch."""
    size = Windows(corpus, length=1, **options).tokens_per_epoch
    return Windows(corpus, length=size, **options)[epoch]["tokens"][:-1]


def of_epoch(windows: Windows, epoch: int) -> range:
    """The windows that start in an epoch."""
    size, length = windows.tokens_per_epoch, windows.length
    return range(-(-epoch * size // length), -(-(epoch + 1) * size // length))


def split(corpus: Corpus, stream: np.ndarray) -> list[np.ndarray]:
    """A stream at its document starts: `head` = 1, so there the first token stands."""
    return np.split(stream, np.flatnonzero(np.isin(stream, corpus.starts))[1:])


@pytest.mark.parametrize("fim", [None, FIM])
@pytest.mark.parametrize("length", [1, 37, 20_000])
def test_windows_tile_the_stream_of_all_epochs(corpus, fim, length):
    windows = Windows(corpus, length=length, seed=3, fim=fim)
    epochs = 2 if length < 1000 else 6
    parts = [whole_epoch(corpus, e, seed=3, fim=fim) for e in range(epochs + 4)]
    stream = np.concatenate(parts)
    for epoch in range(epochs):
        found = [windows[n]["tokens"] for n in of_epoch(windows, epoch)]
        expected = [
            stream[n * length : (n + 1) * length + 1] for n in of_epoch(windows, epoch)
        ]
        assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
        assert len(found) < 20 or not np.array_equal(found, expected), "not shuffled"


def test_every_token_is_a_target_once_an_epoch(corpus):
    epochs, length = 3, 32
    windows = Windows(corpus, length=length, seed=1)
    count = len(corpus.tokens) * epochs // length
    targets = np.concatenate([windows[n]["tokens"][1:] for n in range(count + 1)])
    times = np.bincount(targets, minlength=len(corpus.tokens))
    # The stream's first token is no target; the last window reaches into the next epoch.
    assert (times == epochs).sum() >= len(corpus.tokens) - length - 1
    assert set(times) <= {epochs - 1, epochs, epochs + 1}


def test_an_epoch_is_all_documents_in_another_order(corpus):
    epochs = [whole_epoch(corpus, epoch, seed=5) for epoch in range(3)]
    for stream in epochs:
        assert sorted(stream) == list(range(len(corpus.tokens)))
        originals = np.split(corpus.tokens, corpus.starts[1:])
        found = split(corpus, stream)
        assert sorted(map(tuple, found)) == sorted(map(tuple, originals))
    firsts = {tuple(stream[np.isin(stream, corpus.starts)]) for stream in epochs}
    assert len(firsts) == 3
    again = whole_epoch(corpus, 1, seed=5)
    np.testing.assert_array_equal(again, epochs[1])
    assert not np.array_equal(whole_epoch(corpus, 1, seed=6), again)


def test_segments_number_the_documents_of_a_window(corpus):
    windows = Windows(corpus, length=300, seed=2, segments=True)
    for number in range(20):
        window = windows[number]
        tokens, segments = window["tokens"], window["segments"]
        assert segments.dtype == np.int32 and segments[0] == 0
        document = np.searchsorted(corpus.starts, tokens, side="right")
        np.testing.assert_array_equal(np.diff(segments), np.diff(document) != 0)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (1, 0), (0, 1)])
def test_fim_rearranges_a_tenth_of_the_documents(rng, head, tail):
    """Prefix, suffix, middle, framed by the marks; nothing lost, nothing else moved."""
    corpus = documents(rng.integers(2, 90, size=200), head=head, tail=tail)
    originals = np.split(corpus.tokens.astype(int), corpus.starts[1:])
    epoch = Epoch(corpus, FIM, key=(7, 0))
    pieces, sizes = epoch.read(0, len(corpus.tokens) + 3 * 20)
    parts = np.split(np.concatenate(pieces), np.cumsum(sizes)[:-1])
    seen = 0
    for document, found in zip(epoch.order, parts, strict=True):
        original = originals[document]
        if not np.isin(MARKS, found).any():
            np.testing.assert_array_equal(found, original)
            continue
        seen += 1
        begin, hole, end = (list(found).index(mark) for mark in MARKS)
        prefix, suffix = found[begin + 1 : hole], found[hole + 1 : end]
        middle = found[end + 1 : len(found) - tail]
        together = [found[:begin], prefix, middle, suffix, found[len(found) - tail :]]
        assert begin == head
        np.testing.assert_array_equal(np.concatenate(together), original)
    assert seen == 20


def test_fim_documents_and_cuts_are_uniform():
    """Each of 2000 documents is chosen about as often; cuts fall everywhere."""
    corpus = documents([8] * 2000)  # a text of 6 tokens: cuts at 0 ... 6
    chosen, cuts = np.zeros(2000), np.zeros((7, 7))
    for epoch in range(100):
        for document, pair in Epoch(corpus, FIM, key=(0, epoch))._cuts.items():
            chosen[document] += 1
            cuts[pair] += 1
    assert chosen.sum() == 100 * 200
    assert abs(chosen.mean() - 10) < 1e-9 and 8.0 < chosen.var() < 10.0  # binomial: 9
    expected = np.triu(np.full((7, 7), 2.0)) - np.eye(7)
    expected *= cuts.sum() / 49
    np.testing.assert_allclose(cuts, expected, atol=6 * np.sqrt(expected.max()))
    assert not np.tril(cuts, -1).any()


def test_fim_marks_are_in_the_windows(corpus):
    stream = whole_epoch(corpus, 0, fim=FIM)
    assert [np.sum(stream == mark) for mark in MARKS] == [20] * 3
    assert len(stream) == len(corpus.tokens) + 60
    other = whole_epoch(corpus, 1, fim=FIM)
    place = lambda s: corpus.starts[np.isin(corpus.starts, s[:-1][s[1:] == BEGIN])]  # noqa: E731
    assert set(place(stream)) != set(place(other)), "the same documents every epoch"
    segments = Windows(corpus, length=2000, fim=FIM, segments=True)[0]
    marks = np.isin(segments["tokens"], MARKS)
    inside = np.diff(segments["segments"])[marks[1:]]
    assert not inside.any(), "a mark is of its document's segment"


def test_a_corpus_of_shards_reads_the_same(corpus):
    cut = int(corpus.starts[70])
    parts = [corpus.tokens[:cut], corpus.tokens[cut:]]
    sharded = Corpus(tokens=Joined(parts), starts=corpus.starts)
    for number in (0, 5, 400):
        one = Windows(corpus, length=77, fim=FIM)[number]["tokens"]
        np.testing.assert_array_equal(
            one, Windows(sharded, length=77, fim=FIM)[number]["tokens"]
        )


def test_memory_goes_with_documents_and_windows_not_tokens(tmp_path):
    """10^9 tokens in a file with holes: a window takes a few bytes of 4 GB."""
    tokens = np.memmap(tmp_path / "tokens", np.uint32, "w+", shape=(10**9,))
    starts = np.arange(0, 10**9, 10**6)
    corpus = Corpus(tokens=np.asarray(tokens), starts=starts)
    windows = Windows(corpus, length=4096, fim=FIM, segments=True)
    tracemalloc.start()
    for number in (0, 1, 244_000, 300_000):
        assert windows[number]["tokens"].shape == (4097,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_threads_share_the_epochs(corpus):
    """Windows of several epochs asked for at once are those asked for in order."""
    windows = Windows(corpus, length=50, fim=FIM)
    count = 4 * len(corpus.tokens) // 50
    expected = [Windows(corpus, length=50, fim=FIM)[n]["tokens"] for n in (0, count)]
    found = {}

    def work(part):
        for number in range(part, count + 1, 4):
            found[number] = windows[number]["tokens"]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count + 1
    np.testing.assert_array_equal([found[0], found[count]], expected)
    assert len(windows._epochs) <= Windows.KEPT


def test_hashes_are_splitmix64():
    """The published test vector of the generator, and no dependence between keys."""
    state, expected = 0, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    assert expected[0] == 0xE220A8397B1DCDAF
    assert hashes(5).tolist() == expected
    assert hashes(3, 1, 2).tolist() != hashes(3, 2, 1).tolist()
    assert sorted(permutation(1000, 4)) == list(range(1000))
    correlation = np.corrcoef([permutation(5000, 0, epoch) for epoch in range(4)])
    assert np.abs(correlation - np.eye(4)).max() < 0.06
