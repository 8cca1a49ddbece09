"""Documents and their token ids, end to end, in memory or on disk."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import numpy as np

from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError


def read_texts(files: Iterable[str | Path]) -> Iterator[str]:
    """The files' texts; bytes that are not UTF-8 become replacement characters."""
    for file in files:
        try:
            yield Path(file).read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error


class Joined:
    """Arrays as if they were one, none of them copied: `len()` and slices."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = list(arrays)
        self._starts = [0, *accumulate(map(len, self._arrays))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        index = bisect_right(self._starts, start, hi=len(self._arrays)) - 1
        base = self._starts[index]
        if stop <= self._starts[index + 1]:
            return self._arrays[index][start - base : stop - base]
        head = self._arrays[index][start - base :]
        return np.concatenate([head, self[base + len(self._arrays[index]) : stop]])


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents end to end: `tokens` [n] (the smallest unsigned type) and where each
    document starts [documents].

    A document is `head` tokens before its text (begin of sequence), the text, and
    `tail` tokens after it (end of sequence).
    """

    tokens: np.ndarray | Joined
    starts: np.ndarray
    head: int = 1
    tail: int = 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]."""
        return np.diff(self.starts, append=len(self.tokens))

    def length(self, document: int) -> int:
        """Tokens of one document."""
        last = document + 1 == len(self.starts)
        end = len(self.tokens) if last else self.starts[document + 1]
        return int(end - self.starts[document])


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Every text as one document: the tokenizer's ids (with its begin-of-sequence
    token), then end of sequence.
    """
    dtype = token_type(tokenizer.vocab_size)
    end = list(tokenizer.eos_ids[:1])
    return [np.asarray(ids + end, dtype) for ids in tokenizer.encode_batch(texts)]


def frame(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many tokens `encode` puts before a text and after it."""
    return len(tokenizer.encode("")), len(tokenizer.eos_ids[:1])


def tokenize(texts: Iterable[str], tokenizer: Tokenizer, *, chunk: int = 256) -> Corpus:
    """The texts `encode`d, in memory."""
    texts = iter(texts)
    documents: list[np.ndarray] = []
    while part := list(islice(texts, chunk)):
        documents += encode(part, tokenizer)
    if not documents:
        raise UserError("no documents to tokenize")
    ends = np.cumsum([len(document) for document in documents])
    head, tail = frame(tokenizer)
    return Corpus(
        tokens=np.concatenate(documents),
        starts=np.concatenate([[0], ends[:-1]]),
        head=head,
        tail=tail,
    )
