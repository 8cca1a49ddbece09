"""Files of documents, read in pieces: plain text, JSONL (also .gz, .zst), Parquet.

Reading is quick and stays in one process; a piece of the file is taken apart into texts
where it is tokenised. Every error names the file and the line, row or byte.
"""

import gzip
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsjax.errors import UserError

PIECE_BYTES = 2**20
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET = (".parquet",)


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Whole files, each one document."""

    paths: tuple[str, ...]
    size: int  # bytes of input, as every piece counts them

    def texts(self) -> Iterator[str]:
        """Each file's text. Raises UserError for bytes that are not UTF-8."""
        for path in self.paths:
            try:
                yield Path(path).read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Some whole lines of a JSONL file, the first of them line number `first`."""

    path: str
    first: int
    content: bytes
    field: str
    size: int

    def texts(self) -> Iterator[str]:
        """The field of each object. Raises UserError for a line that has none."""
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line.strip():
                yield self._text(line, f"{self.path}:{number}")

    def _text(self, line: bytes, place: str) -> str:
        try:
            value = json.loads(line)
        except ValueError as error:  # also bytes that are not UTF-8
            raise UserError(f"{place}: not JSON: {error}") from error
        if not isinstance(value, dict) or self.field not in value:
            there = ", ".join(value) if isinstance(value, dict) else repr(value)[:40]
            raise UserError(f"{place}: no field {self.field!r} in: {there}")
        return _checked(value[self.field], self.field, place)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some values of a Parquet column, the first of them of row number `first`."""

    path: str
    first: int
    values: list[Any]
    field: str
    size: int

    def texts(self) -> Iterator[str]:
        """The values. Raises UserError for one that is no text."""
        for number, value in enumerate(self.values, self.first):
            yield _checked(value, self.field, f"{self.path}: row {number}")


Piece = TextFiles | Lines | Rows


def _checked(text: Any, field: str, place: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{place}: {field!r} is {text!r:.40}, not text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: {field!r} holds half of a character") from error
    return text


def find(files: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and all those below directories that are, in sorted
    order; hidden ones and Python's caches are left out. Raises UserError for what is not there.
    """
    found: list[Path] = []
    for file in map(Path, files):
        if file.is_dir():
            below = sorted(path for path in file.rglob("*") if path.is_file())
            found += [path for path in below if not _hidden(path.relative_to(file))]
        elif file.exists():
            found.append(file)
        else:
            raise UserError(f"{file}: no such file or directory")
    if not found:
        raise UserError(f"no files in {', '.join(map(str, files))}")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def pieces(files: Iterable[Path], *, field: str = "text") -> Iterator[Piece]:
    """All of the files in order; the same pieces every time."""
    group: list[tuple[str, int]] = []
    for path in files:
        name = path.name.lower()
        if not name.endswith(JSONL + PARQUET):
            group.append((str(path), path.stat().st_size))
            if sum(size for _, size in group) >= PIECE_BYTES:
                yield _text_files(group)
                group = []
            continue
        if group:  # documents come out in the order of the files
            yield _text_files(group)
            group = []
        yield from (_rows if name.endswith(PARQUET) else _lines)(path, field)
    if group:
        yield _text_files(group)


def _text_files(group: list[tuple[str, int]]) -> TextFiles:
    paths, sizes = zip(*group)
    return TextFiles(paths=paths, size=sum(sizes))


def _lines(path: Path, field: str) -> Iterator[Lines]:
    first, before = 1, 0
    with path.open("rb") as raw, _decompressed(path, raw) as file:
        while content := _whole_lines(file, path):
            read = raw.tell()  # of the file as it is on disk, compressed or not
            yield Lines(
                path=str(path),
                first=first,
                content=content,
                field=field,
                size=read - before,
            )
            first, before = first + content.count(b"\n"), read


def _whole_lines(file: IO[bytes], path: Path) -> bytes:
    try:
        content = file.read(PIECE_BYTES)
        return content + file.readline() if content else content
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        import io

        zstandard = _optional("zstandard", path)
        reader = zstandard.ZstdDecompressor().stream_reader(
            raw, read_across_frames=True
        )
        return io.BufferedReader(reader)
    return raw


def _rows(path: Path, field: str) -> Iterator[Rows]:
    parquet = _optional("pyarrow.parquet", path)
    arrow = importlib.import_module("pyarrow")
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise UserError(f"{path}: no column {field!r} among: {', '.join(names)}")
        first, total = 1, file.metadata.num_rows
        whole = path.stat().st_size
        for batch in file.iter_batches(columns=[field], batch_size=1024):
            values = batch.column(0).to_pylist()
            done = whole * (first - 1 + len(values)) // total
            size = done - whole * (first - 1) // total
            yield Rows(
                path=str(path), first=first, values=values, field=field, size=size
            )
            first += len(values)
    except arrow.ArrowException as error:
        raise UserError(f"{path}: {error}") from error


def _optional(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{path}: reading it needs {package}: pip install 'dsjax[data]'"
        ) from error
