"""A corpus as an endless sequence of training windows, each computed when asked for.

An epoch is all documents in a new order, some of them rearranged for fill-in-the-middle
(FIM). The epochs follow each other without a gap, and window i of `length` + 1 tokens
starts at token i x length of that stream: neighbours share one token, and every token is
a target exactly once an epoch. Documents are packed with no regard to windows, as in V3
(section 4.1). The windows that start in an epoch come in a new order, too.

An epoch takes memory for each document and each window, never for each token.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dsjax.data.text import Corpus

Window = dict[str, np.ndarray]  # "tokens" int32 [S], "segments" int32 [S] if asked


@dataclass(frozen=True, kw_only=True)
class Fim:
    """Fill in the middle as V3 does it (section 4.1): begin, prefix, hole, suffix, end,
    middle, for a share `rate` of the documents.

    `ids` are those of begin, hole and end. The cuts fall between tokens.
    """

    rate: float
    ids: tuple[int, int, int]


def hashes(count: int, *key: int) -> np.ndarray:
    """uint64 [count], uniform: a function of `key` and the position alone (SplitMix64),
    the same with every version of every library.
    """
    seed = np.zeros(1, np.uint64)
    for part in key:
        seed = _mix(seed + np.uint64(part & (2**64 - 1)) + _STEP)
    return _mix(seed + np.arange(1, count + 1, dtype=np.uint64) * _STEP)


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(count: int, *key: int) -> np.ndarray:
    """int64 [count]: 0 ... count - 1 in an order that depends on `key` alone."""
    return np.argsort(hashes(count, *key), kind="stable")


class Epoch:
    """One pass over a corpus: the order of its documents, and which are rearranged how.

    Exactly a share `fim.rate` of the documents is, so that all epochs are equally long.
    """

    def __init__(self, corpus: Corpus, fim: Fim | None, *, key: tuple[int, ...]):
        self._corpus, self._fim = corpus, fim
        lengths = corpus.lengths
        self.order = permutation(len(lengths), *key, 0)
        self._cuts: dict[int, tuple[int, int]] = {}
        if fim is not None:
            chosen = permutation(len(lengths), *key, 1)[: _share(fim, len(lengths))]
            self._cuts = self._cut(chosen, lengths[chosen], key)
            lengths[chosen] += len(fim.ids)
        self._ends = np.cumsum(lengths[self.order])

    def _cut(self, chosen, lengths, key) -> dict[int, tuple[int, int]]:
        """Two places of each text, in order: between any two tokens or at its ends."""
        room = np.maximum(lengths - self._corpus.head - self._corpus.tail, 0) + 1
        draws = [hashes(len(chosen), *key, salt) >> np.uint64(11) for salt in (2, 3)]
        cuts = np.sort([(u * 2.0**-53 * room).astype(np.int64) for u in draws], axis=0)
        return dict(zip(chosen.tolist(), zip(*cuts.tolist())))

    def read(self, start: int, stop: int) -> tuple[list[np.ndarray], list[int]]:
        """Tokens `start` to `stop` of the epoch: their pieces, and how many tokens are
        of each document.
        """
        pieces, sizes = [], []
        index = int(np.searchsorted(self._ends, start, side="right"))
        begin = int(self._ends[index - 1]) if index else 0
        while begin < stop:
            end = int(self._ends[index])
            low, high = max(start, begin), min(stop, end)
            document = int(self.order[index])
            pieces += self._part(document, low - begin, high - begin)
            sizes.append(high - low)
            index, begin = index + 1, end
        return pieces, sizes

    def _part(self, document: int, low: int, high: int) -> Iterator[np.ndarray]:
        """Tokens `low` to `high` of a document as this epoch has it."""
        tokens, base = self._corpus.tokens, int(self._corpus.starts[document])
        if document not in self._cuts:
            yield tokens[base + low : base + high]
            return
        for piece in self._pieces(document):
            size = 1 if isinstance(piece, int) else piece[1] - piece[0]
            if low < size and high > 0:
                if isinstance(piece, int):
                    yield np.array([piece])
                else:
                    first = base + piece[0]
                    yield tokens[first + max(low, 0) : first + min(high, size)]
            low, high = low - size, high - size

    def _pieces(self, document: int) -> tuple[int | tuple[int, int], ...]:
        """A rearranged document: ids of marks, and (start, stop) of parts of itself."""
        length, head = self._corpus.length(document), self._corpus.head
        text_end = max(length - self._corpus.tail, head)
        begin, hole, end = self._fim.ids
        first, second = (head + cut for cut in self._cuts[document])
        return (
            (0, head),
            begin,
            (head, first),
            hole,
            (second, text_end),
            end,
            (first, second),
            (text_end, length),
        )


def _share(fim: Fim | None, documents: int) -> int:
    return 0 if fim is None else round(fim.rate * documents)


class Windows:
    """Window n of the training order, for n = 0, 1, ... without an end.

    With `segments`, a window also tells each token's document, numbered from 0 inside
    the window, for attention that stays inside a document. Grain reads this as a
    random-access source.
    """

    KEPT = 2  # epochs in memory: threads that work ahead are in the next one already

    def __init__(
        self,
        corpus: Corpus,
        *,
        length: int,
        seed: int = 0,
        segments: bool = False,
        fim: Fim | None = None,
    ):
        self.corpus, self.length, self.segments = corpus, length, segments
        self._fim, self._seed = fim, seed
        self._epochs: dict[int, tuple[Epoch, np.ndarray]] = {}
        self._lock = threading.Lock()

    @cached_property
    def tokens_per_epoch(self) -> int:
        """All documents, with what FIM adds to them."""
        added = 0 if self._fim is None else len(self._fim.ids)
        documents = len(self.corpus.starts)
        return len(self.corpus.tokens) + added * _share(self._fim, documents)

    def __len__(self) -> int:
        return sys.maxsize  # what Grain takes for endless

    def __getitem__(self, index: int) -> Window:
        index = int(index)
        number = index * self.length // self.tokens_per_epoch
        _, order = self._epoch(number)
        first = self._first(number)
        start = (first + int(order[index - first])) * self.length
        return self._window(start, start + self.length + 1)

    def _first(self, epoch: int) -> int:
        """The first window that starts in an epoch = how many start before it."""
        return -(-epoch * self.tokens_per_epoch // self.length)

    def _epoch(self, number: int) -> tuple[Epoch, np.ndarray]:
        """An epoch and the order of its windows."""
        with self._lock:
            if number not in self._epochs:
                key = (self._seed, number)
                count = self._first(number + 1) - self._first(number)
                epoch = Epoch(self.corpus, self._fim, key=key)
                self._epochs[number] = epoch, permutation(count, *key, 4)
                for old in list(self._epochs)[: -self.KEPT]:
                    del self._epochs[old]
            return self._epochs[number]

    def _window(self, start: int, stop: int) -> Window:
        """Tokens `start` to `stop` of all epochs' stream."""
        pieces, sizes = [], []
        while start < stop:
            number, offset = divmod(start, self.tokens_per_epoch)
            end = min(offset + stop - start, self.tokens_per_epoch)
            epoch, _ = self._epoch(number)
            more, counts = epoch.read(offset, end)
            pieces, sizes = pieces + more, sizes + counts
            start += end - offset
        window = {"tokens": np.concatenate(pieces, dtype=np.int32)}
        if self.segments:
            window["segments"] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        return window
