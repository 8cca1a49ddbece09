"""A corpus on disk: a directory of token shards that is mapped, not read, into memory.

    index.json          what is there: format, sizes, the tokenizer's digest
    tokens-00000.npy    uint16 or uint32 [tokens], documents end to end
    starts-00000.npy    int64 [documents], where each starts in its shard
    tokenizer.json ...  the tokenizer, as in a model directory

No document is cut by the end of a shard.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from dsjax.data.text import Corpus, Joined, frame, token_type
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError

FORMAT = "dsjax tokens 1"
SHARD_TOKENS = 2**28  # half a GiB of uint16


@dataclass(frozen=True, kw_only=True)
class Index:
    """What index.json holds. `bytes` are those of the texts in UTF-8; `head` and `tail`
    count the tokens around each text; `digest` is that of the documents' tokens.
    """

    vocab_size: int
    dtype: str
    head: int
    tail: int
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: list[dict[str, int]] = field(default_factory=list)
    tokenizer: str = ""  # sha256 of tokenizer.json
    digest: str = ""
    format: str = FORMAT


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yields OUT.partial, renamed to `out` when the body is done, removed on an error.

    Raises UserError when `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: choose another output or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Writer:
    """Writes documents into a directory as they come; `close` makes it readable.

    The shards depend on the documents alone, not on how they are handed over.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS
    ):
        self._directory, self._limit = directory, shard_tokens
        tokenizer.save(directory)
        head, tail = frame(tokenizer)
        self._index = Index(
            vocab_size=tokenizer.vocab_size,
            dtype=token_type(tokenizer.vocab_size).name,
            head=head,
            tail=tail,
            tokenizer=_sha256((directory / "tokenizer.json").read_bytes()),
        )
        self._digest = hashlib.sha256()
        self._documents: list[np.ndarray] = []
        self._size = 0

    def add(self, documents: Iterable[np.ndarray], *, bytes: int) -> None:
        """Appends documents, whose texts are `bytes` long together."""
        for document in documents:
            if self._size and self._size + len(document) > self._limit:
                self._flush()
            self._documents.append(document)
            self._size += len(document)
        self._index = replace(self._index, bytes=self._index.bytes + bytes)

    def _flush(self) -> None:
        tokens = np.concatenate(self._documents).astype(self._index.dtype)
        lengths = np.array([len(document) for document in self._documents], np.int64)
        number = len(self._index.shards)
        for array in (tokens, lengths):
            self._digest.update(memoryview(array).cast("B"))
        np.save(self._directory / f"tokens-{number:05d}.npy", tokens)
        starts = np.cumsum(lengths) - lengths
        np.save(self._directory / f"starts-{number:05d}.npy", starts)
        shard = {"documents": len(lengths), "tokens": len(tokens)}
        self._index = replace(
            self._index,
            documents=self._index.documents + len(lengths),
            tokens=self._index.tokens + len(tokens),
            shards=[*self._index.shards, shard],
        )
        self._documents, self._size = [], 0

    def close(self) -> Index:
        """Writes what is left and index.json. Raises UserError when nothing came."""
        if self._documents:
            self._flush()
        if not self._index.documents:
            raise UserError(f"{self._directory.name}: no documents to tokenize")
        self._index = replace(self._index, digest=self._digest.hexdigest())
        text = json.dumps(asdict(self._index), indent=2) + "\n"
        (self._directory / "index.json").write_text(text)
        return self._index


def read_index(directory: str | Path) -> Index:
    """Raises UserError where `dsjax tokenize` did not write."""
    path = Path(directory) / "index.json"
    try:
        return Index(**_of_this_format(json.loads(path.read_text())))
    except FileNotFoundError as error:
        raise UserError(
            f"{directory}: no index.json: not what `dsjax tokenize` writes"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def _of_this_format(values: dict) -> dict:
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')!r} is not {FORMAT!r}")
    return values


def open_corpus(directory: str | Path) -> Corpus:
    """The corpus of a directory: its tokens stay on disk until they are used, its
    document starts (8 bytes each) are read. Raises UserError for files that do not fit
    the index.
    """
    directory, index = Path(directory), read_index(directory)
    tokens, starts, base = [], [], 0
    for number, shard in enumerate(index.shards):
        part = _load(directory / f"tokens-{number:05d}.npy", shard["tokens"])
        tokens.append(part)
        begin = _load(directory / f"starts-{number:05d}.npy", shard["documents"])
        starts.append(begin + base)
        base += len(part)
    return Corpus(
        tokens=Joined(tokens),
        starts=np.concatenate(starts),
        head=index.head,
        tail=index.tail,
    )


def _load(path: Path, size: int) -> np.ndarray:
    try:
        array = np.asarray(np.load(path, mmap_mode="r"))  # a plain view slices faster
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    if array.shape != (size,):
        raise UserError(f"{path} has shape {array.shape}, index.json says ({size},)")
    return array


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
