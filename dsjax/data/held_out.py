"""Held-out text as fixed windows in which every token is a target once.

The documents stand end to end in stored order, as training packs them, and a window
begins where it begins: a document's start has other documents before it. Nothing is
rearranged or shuffled. The loss of all targets, over the bytes of the texts, is bits a
byte; the marks between documents are targets, too, but for the very first token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsjax.data.mixture import Data, Documents
from dsjax.data.prepare import prepare
from dsjax.data.shards import open_corpus, read_index
from dsjax.data.text import Corpus
from dsjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Windows `chosen` of a corpus, in batches of `batch` over all hosts.

    Iterating gives this host's rows of each batch: "tokens" int32 [b, length + 1],
    "mask" bool [b, length] (which targets count) and, where asked, "segments". Every
    host gets the same number of batches; rows without a window have an empty mask.
    """

    corpus: Corpus
    text_bytes: int  # of the whole corpus
    chosen: range | np.ndarray
    length: int
    stride: int
    batch: int
    hosts: tuple[int, int]
    segments: bool

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.batch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        index, count = self.hosts
        size = self.batch // count
        for start in range(0, len(self) * self.batch, self.batch):
            first = start + index * size
            rows = [self._row(place) for place in range(first, first + size)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    @property
    def targets(self) -> int:
        """How many tokens are scored, over all hosts."""
        return sum(self._scored(int(window)) for window in self.chosen)

    @property
    def bytes(self) -> float:
        """The bytes of text that the targets stand for: all there are, or the chosen
        windows' share by their number of targets.
        """
        return self.text_bytes * self.targets / (len(self.corpus.tokens) - 1)

    def bits_per_byte(self, nats: float) -> float:
        """From the summed loss of all targets of all hosts."""
        return nats / math.log(2) / self.bytes

    def _span(self, window: int) -> tuple[int, int, int]:
        """Where a window begins and ends, and from where on its targets are new."""
        begin = window * self.stride
        end = min(begin + self.length, len(self.corpus.tokens) - 1)
        new = begin if window == 0 else begin + self.length - self.stride
        return begin, end, new

    def _scored(self, window: int) -> int:
        _, end, new = self._span(window)
        return end - new

    def _row(self, place: int) -> dict[str, np.ndarray]:
        tokens, mask = np.zeros(self.length + 1, np.int32), np.zeros(self.length, bool)
        segments = np.full(self.length + 1, self.length + 1, np.int32)  # of the padding
        if place < len(self.chosen):
            begin, end, new = self._span(int(self.chosen[place]))
            tokens[: end + 1 - begin] = self.corpus.tokens[begin : end + 1]
            mask[new - begin : end - begin] = True
            positions = np.arange(begin, end + 1)
            document = np.searchsorted(self.corpus.starts, positions, side="right")
            segments[: len(document)] = document - document[0]
        row = {"tokens": tokens, "mask": mask}
        return row | {"segments": segments} if self.segments else row


def held_out_batches(
    data: Data,
    *,
    length: int,
    batch: int,
    workdir: str | Path,
    sequences: int = 0,
    stride: int | None = None,
    hosts: tuple[int, int] = (0, 1),
) -> HeldOut:
    """The held-out windows of `length` targets, the next one `stride` tokens further
    (`length`: no token is read twice). `sequences`: only so many, evenly spread.

    With a smaller stride every target but the first window's has at least `length -
    stride` tokens before it. Raises UserError when nothing is held out.
    """
    directory = prepare(data, workdir).held_out
    stride = length if stride is None else stride
    if directory is None:
        raise UserError("data.held_out is None: there is nothing to evaluate on")
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must be from 1 to length={length}")
    if batch % hosts[1]:
        raise UserError(f"batch={batch} must divide by {hosts[1]} hosts")
    corpus = open_corpus(directory)
    count = 1 + -(-max(len(corpus.tokens) - 1 - length, 0) // stride)
    chosen = range(count)
    if 0 < sequences < count:
        chosen = np.arange(sequences) * count // sequences
    return HeldOut(
        corpus=corpus,
        text_bytes=read_index(directory).bytes,
        chosen=chosen,
        length=length,
        stride=stride,
        batch=batch,
        hosts=hosts,
        segments=data.documents is Documents.SEPARATE,
    )
