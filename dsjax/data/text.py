"""Documents to batches of packed windows: the pre-training pipeline, on Grain.

Letters: B batch, S window length (one more than the model's T: a window holds inputs
and their shifted targets).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError

if TYPE_CHECKING:  # imported where it is used, so that tokenising needs no Grain
    import grain

Batch = dict[str, np.ndarray]  # "tokens" int32 [B, S], "segments" int32 [B, S] if asked


def read_texts(files: Iterable[str | Path]) -> Iterator[str]:
    """The files' texts; bytes that are not UTF-8 become replacement characters."""
    for file in files:
        try:
            yield Path(file).read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents end to end: `tokens` [n] (the smallest unsigned type) and where each
    document starts [documents].
    """

    tokens: np.ndarray
    starts: np.ndarray


def tokenize(texts: Iterable[str], tokenizer: Tokenizer, *, chunk: int = 256) -> Corpus:
    """Every text as one document: the tokenizer's ids (with its begin-of-sequence
    token), then end of sequence.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = list(tokenizer.eos_ids[:1])
    texts = iter(texts)
    documents: list[np.ndarray] = []
    while part := list(islice(texts, chunk)):
        documents += [
            np.asarray(ids + end, dtype) for ids in tokenizer.encode_batch(part)
        ]
    if not documents:
        raise UserError("no documents to tokenize")
    ends = np.cumsum([len(document) for document in documents])
    return Corpus(
        tokens=np.concatenate(documents), starts=np.concatenate([[0], ends[:-1]])
    )


class Windows:
    """A corpus cut into windows of `length` + 1 tokens, neighbours sharing one, so that
    every token is a target once.

    Documents are packed with no regard to windows, as in V3 (section 4.1). With
    `segments`, a window also tells each token's document, numbered from 0 inside the
    window, for attention that stays inside a document. Grain reads this as a
    random-access source.
    """

    def __init__(self, corpus: Corpus, *, length: int, segments: bool = False):
        self._corpus, self._length, self._segments = corpus, length, segments

    def __len__(self) -> int:
        return (len(self._corpus.tokens) - 1) // self._length

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self._length
        stop = start + self._length + 1
        window = {"tokens": self._corpus.tokens[start:stop].astype(np.int32)}
        if self._segments:
            positions = np.arange(start, stop)
            document = np.searchsorted(self._corpus.starts, positions, side="right")
            window["segments"] = (document - document[0]).astype(np.int32)
        return window


def batches(
    source: Sequence[Batch],
    *,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> "grain.IterDataset":
    """Batches of `batch_size` / hosts windows for host `shard` = (index, hosts),
    shuffled anew in every epoch.

    The order is one global shuffle that depends on `seed` alone: the hosts' parts of
    step n together are the same windows for any number of hosts. An epoch is a whole
    number of global batches; what is left over differs from epoch to epoch. `iter()` of
    the result has `get_state()` and `set_state()`: its place in the data, to be saved
    beside the model.
    """
    import grain

    index, hosts = shard
    if batch_size % hosts:
        raise UserError(f"batch_size={batch_size} must divide by {hosts} hosts")
    usable = len(source) - len(source) % batch_size
    if not usable:
        raise UserError(
            f"{len(source)} windows do not fill one batch of batch_size={batch_size}"
        )
    dataset = grain.MapDataset.source(source).seed(seed).shuffle()
    dataset = dataset[:usable][index::hosts].repeat(epochs)
    return dataset.batch(batch_size // hosts).to_iter_dataset()
