"""A data mixture's directories of token shards, checked, and made where they are to be."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dsjax.data.mixture import Data, Source, StandardLibrary
from dsjax.data.shards import Writer, read_index, whole_directory
from dsjax.data.stdlib import python_source
from dsjax.data.text import encode, read_texts
from dsjax.data.tokenizer import Tokenizer, train_bpe
from dsjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Token shards on disk: what to train on, what is held out, and their tokenizer.

    `tokenizer` is a directory with tokenizer.json and its neighbours.
    """

    tokenizer: Path
    sources: tuple[Source, ...]
    held_out: Path | None
    vocab_size: int


def prepare(data: Data, workdir: str | Path) -> Prepared:
    """Finds the data's directories; the standard library is tokenised into `workdir`
    the first time, and read from there ever after.

    Raises UserError for directories that are not there or of different tokenizers.
    """
    if isinstance(data.sources, StandardLibrary):
        root = standard_library(data.sources, Path(workdir))
        sources, held_out = (Source(path=str(root / "train")),), root / "held_out"
    else:
        sources, held_out = tuple(data.sources), None
    if data.held_out is not None:
        held_out = Path(data.held_out)
    if not sources:
        raise UserError("data.sources is empty: there is nothing to train on")
    directories = [Path(source.path) for source in sources]
    return Prepared(
        tokenizer=directories[0],
        sources=sources,
        held_out=held_out,
        vocab_size=_common_vocabulary(directories, held_out),
    )


def _common_vocabulary(directories: list[Path], held_out: Path | None) -> int:
    first = read_index(directories[0])
    for other in directories[1:] + ([] if held_out is None else [held_out]):
        if read_index(other).tokenizer != first.tokenizer:
            raise UserError(f"{other} has another tokenizer than {directories[0]}")
    return first.vocab_size


def standard_library(library: StandardLibrary, workdir: Path) -> Path:
    """A directory of train/ and held_out/: the .py files of the standard library, its
    tests included, with a BPE trained on the training files.

    What is in `workdir` already is used as it is, even where Python has changed since:
    a run goes on with the text that it began with.
    """
    key = (library.vocab_size, library.held_out_percent, library.root)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    out = workdir / f"standard_library_{digest}"
    workdir.mkdir(parents=True, exist_ok=True)
    with _one_process(out.with_suffix(".lock")):
        if not out.exists():
            with whole_directory(out) as partial:
                _write_library(library, partial)
    return out


def _write_library(library: StandardLibrary, out: Path) -> None:
    root = None if library.root is None else Path(library.root)
    split = python_source(
        held_out_percent=library.held_out_percent, root=root, tests=True
    )
    if not split.train or not split.held_out:
        raise UserError(
            f"{root or 'the standard library'}: {len(split.train)} files to train on, "
            f"{len(split.held_out)} held out"
        )
    texts = tqdm(
        read_texts(split.train),
        total=len(split.train),
        desc=f"training a BPE of {library.vocab_size} ids",
        unit="file",
        disable=None,  # hidden where stderr is no terminal
    )
    tokenizer = train_bpe(texts, vocab_size=library.vocab_size)
    for name, files in (("train", split.train), ("held_out", split.held_out)):
        _write_files(files, tokenizer, out / name)


def _write_files(
    files: tuple[Path, ...], tokenizer: Tokenizer, out: Path, *, chunk: int = 256
) -> None:
    writer = Writer(out, tokenizer)
    starts = range(0, len(files), chunk)
    for start in tqdm(starts, desc=f"tokenising {out.name}", unit="part", disable=None):
        texts = list(read_texts(files[start : start + chunk]))
        size = sum(len(text.encode("utf-8")) for text in texts)
        writer.add(encode(texts, tokenizer), bytes=size)
    writer.close()


@contextmanager
def _one_process(lock: Path) -> Iterator[None]:
    """Processes that prepare the same data wait for the first of them."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
