"""`dsjax tokenize`: files of text to token shards, in parallel.

The documents come out in the order of the files, whatever the number of processes.
Whether one is held out is decided by its text alone: a copy of it, in another file or
another run, falls on the same side.
"""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsjax.data.inputs import Piece, find, pieces
from dsjax.data.shards import SHARD_TOKENS, Index, Writer, whole_directory
from dsjax.data.text import encode
from dsjax.data.tokenizer import Tokenizer, train_bpe
from dsjax.errors import UserError

AHEAD = 4  # pieces in flight for each process
BPE_BYTES = 1e9  # of input, at most, that a BPE is trained on


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The documents of a piece, end to end; `held_out` [documents] tells which."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    held_out: np.ndarray
    size: int  # bytes of input

    def part(self, held_out: bool) -> tuple[list[np.ndarray], int]:
        """The documents of one side, and the bytes of their texts."""
        documents = np.split(self.tokens, np.cumsum(self.lengths)[:-1])
        chosen = np.flatnonzero(self.held_out == held_out)
        return [documents[k] for k in chosen], int(self.text_bytes[chosen].sum())


def tokenize_files(
    files: Iterable[str | Path],
    out: str | Path,
    *,
    bpe: int | None = None,
    tokenizer: str | Path | None = None,
    field: str = "text",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    held_out_percent: float = 0.0,
    progress: bool = True,
) -> dict[str, Index]:
    """Writes `out`, or `out`/train and `out`/held_out where a share is held out, and
    returns what is in them by their names ("" is `out` itself).

    Either a BPE of `bpe` ids is trained on what is not held out, or `tokenizer` is one:
    a directory or a tokenizer.json. Raises UserError for what cannot be read; `out`
    then does not come to be.
    """
    if (bpe is None) == (tokenizer is None):
        raise UserError("either train a BPE or name a tokenizer")
    if not 0 <= held_out_percent < 100:
        raise UserError(f"held_out_percent={held_out_percent} must be from 0 below 100")
    found, out = find(files), Path(out)
    with whole_directory(out) as partial:
        if tokenizer is not None:
            chosen = open_tokenizer(Path(tokenizer))
        else:
            chosen = _train(found, field, bpe, held_out_percent, progress)
        encoded = encode_files(
            found,
            chosen,
            field=field,
            workers=workers or os.cpu_count() or 1,
            held_out_percent=held_out_percent,
            progress=progress,
        )
        return write(
            encoded,
            partial,
            chosen,
            shard_tokens=shard_tokens,
            split=held_out_percent > 0,
        )


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a directory, or of a tokenizer.json with its neighbours."""
    directory = path.parent if path.name == "tokenizer.json" else path
    tokenizer = Tokenizer.load(directory)
    if tokenizer is None:
        raise UserError(f"{path}: no tokenizer.json")
    if not tokenizer.eos_ids:
        raise UserError(f"{path}: no end-of-sequence token to end documents with")
    return tokenizer


def is_held_out(text: str, percent: float) -> bool:
    """Decided by a hash of the text: the same on every machine."""
    return _uniform(text, b"held out") * 100 < percent


def _uniform(text: str, purpose: bytes) -> float:
    digest = hashlib.blake2b(text.encode("utf-8"), key=purpose, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _train(
    files: list[Path], field: str, size: int, percent: float, progress: bool
) -> Tokenizer:
    """A BPE of all training documents, or of a sample where they are very many."""
    total = sum(path.stat().st_size for path in files)
    share = min(1.0, BPE_BYTES / max(total, 1))

    def texts() -> Iterator[str]:
        with _bar(total, "training a BPE", progress) as bar:
            for piece in pieces(files, field=field):
                for text in piece.texts():
                    chosen = share == 1.0 or _uniform(text, b"sample") < share
                    if chosen and not is_held_out(text, percent):
                        yield text
                bar.update(piece.size)

    return train_bpe(texts(), vocab_size=size)


def _bar(total: int, name: str, progress: bool) -> tqdm:
    hidden = None if progress else True  # None: where stderr is no terminal
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=hidden)


def encode_files(
    files: list[Path],
    tokenizer: Tokenizer,
    *,
    field: str = "text",
    workers: int = 1,
    held_out_percent: float = 0.0,
    progress: bool = True,
) -> Iterator[Encoded]:
    """The files' documents, a piece at a time, in order."""
    total = sum(path.stat().st_size for path in files)
    parts = pieces(files, field=field)
    with (
        _mapped(tokenizer, held_out_percent, workers) as map_in_order,
        _bar(total, "tokenizing", progress) as bar,
    ):
        for encoded in map_in_order(parts):
            yield encoded
            bar.update(encoded.size)


def write(
    encoded: Iterable[Encoded],
    out: Path,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = SHARD_TOKENS,
    split: bool = False,
) -> dict[str, Index]:
    """Writes what `encode_files` yields below `out`; a directory for each side."""
    names = {"train": False, "held_out": True} if split else {"": False}
    writers = {
        name: Writer(out / name, tokenizer, shard_tokens=shard_tokens) for name in names
    }
    for piece in encoded:
        for name, held_out in names.items():
            documents, size = piece.part(held_out)
            writers[name].add(documents, bytes=size)
    return {name: writer.close() for name, writer in writers.items()}


# --- processes

Mapper = Callable[[Iterable[Piece]], Iterator[Encoded]]


@contextmanager
def _mapped(tokenizer: Tokenizer, percent: float, workers: int) -> Iterator[Mapper]:
    """Yields a map over pieces: in this process, where the tokenizer uses all cores, or
    in `workers` others, few pieces ahead of what is taken.
    """
    if workers == 1:
        yield lambda parts: (_encode(part, tokenizer, percent) for part in parts)
        return
    state = tokenizer.backend.to_str(), tokenizer.config, tokenizer.generation, percent
    with ExitStack() as stack:
        executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _begin, state
        )
        stack.callback(executor.shutdown, cancel_futures=True)
        yield lambda parts: _in_order(executor, parts, AHEAD * workers)


def _in_order(
    executor: Executor, parts: Iterable[Piece], ahead: int
) -> Iterator[Encoded]:
    waiting: deque = deque()
    try:
        for part in parts:
            waiting.append(executor.submit(_work, part))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended: out of memory? try fewer --workers"
        ) from error


_worker: tuple[Tokenizer, float]  # of a worker process


def _begin(backend: str, config: dict, generation: dict, percent: float) -> None:
    import signal

    import tokenizers

    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to end
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizers.Tokenizer.from_str(backend)
    _worker = Tokenizer(tokenizer, config=config, generation=generation), percent


def _work(piece: Piece) -> Encoded:
    return _encode(piece, *_worker)


def _encode(piece: Piece, tokenizer: Tokenizer, percent: float) -> Encoded:
    texts = [text for text in piece.texts() if text]
    documents = encode(texts, tokenizer)
    return Encoded(
        tokens=np.concatenate(documents) if documents else np.zeros(0, np.uint16),
        lengths=np.array([len(document) for document in documents], np.int64),
        text_bytes=np.array([len(text.encode("utf-8")) for text in texts], np.int64),
        held_out=np.array([is_held_out(text, percent) for text in texts], bool),
        size=piece.size,
    )
