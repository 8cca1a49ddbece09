"""Reading and writing safetensors files piece by piece, on any path epath knows.

A file is eight bytes of header length, a JSON header, and the tensors' bytes. Nothing is
memory-mapped (mapped pages count as resident memory): a range of rows is one read. The
writer lays out the whole header first, then takes the tensors' bytes in order.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import ml_dtypes
import numpy as np
from etils import epath

from dsjax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: what it is, and where its bytes begin."""

    file: epath.Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` (all by default) of the first dimension."""
        stop = self.shape[0] if stop is None else stop
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        stride = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._read(self.offset + start * stride, out.reshape(-1).view(np.uint8))
        return out

    def piece(self, start: int, stop: int) -> bytes:
        """The stored bytes from `start` to `stop` of this tensor."""
        out = np.empty(stop - start, np.uint8)
        self._read(self.offset + start, out)
        return out.tobytes()

    def _read(self, offset: int, out: np.ndarray) -> None:
        done = 0
        with self.file.open("rb") as file:
            file.seek(offset)
            while done < out.size:
                count = file.readinto(memoryview(out)[done:])
                if not count:
                    raise UserError(f"{self.file}: truncated inside {self.name}")
                done += count


def read_header(file: epath.Path) -> dict[str, Stored]:
    """The tensors of one file, checked against its length.

    Raises UserError for a missing file, an unreadable header or a truncated file.
    """
    try:
        size = file.stat().length
    except FileNotFoundError:
        raise UserError(f"{file}: the shard is missing") from None
    with file.open("rb") as stream:
        prefix = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        if not 0 < length <= size - _LENGTH.size:
            raise UserError(
                f"{file}: unreadable safetensors header"
                f" (says {length} bytes, the file has {size})"
            )
        text = stream.read(length)
    start = _LENGTH.size + length
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {
            name: _stored(file, name, entry, start) for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: unreadable safetensors header ({error!r})") from None
    end = max((t.offset + t.nbytes for t in tensors.values()), default=start)
    if end > size:
        raise UserError(
            f"{file}: truncated, {size} bytes of the {end} its header tells"
        )
    return tensors


def _stored(file: epath.Path, name: str, entry: dict, start: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{file}: {name} has unknown dtype {entry['dtype']!r}")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    stored = Stored(file, name, DTYPES[entry["dtype"]], shape, start + begin)
    if stored.nbytes != end - begin or begin < 0:
        raise UserError(
            f"{file}: {name} is {entry['dtype']} {list(shape)}, {stored.nbytes} bytes,"
            f" but its offsets hold {end - begin}"
        )
    return stored


def open_directory(directory: epath.Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory: one file, or shards with an index.

    Raises UserError when there are none (`.bin` shards are named as such), when a shard
    is missing or broken, and when the index and the shards disagree.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    index = directory / INDEX
    if not index.exists():
        raise UserError(_nothing_found(directory))
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: unreadable index") from None
    headers = {shard: read_header(directory / shard) for shard in shards}
    for name, shard in places.items():
        if name not in headers[shard]:
            raise UserError(f"{index}: {name} should be in {shard}, which lacks it")
    for shard, tensors in headers.items():
        for name in tensors:
            if name not in places:
                raise UserError(f"{index}: no entry for {name}, which is in {shard}")
    return {name: headers[shard][name] for name, shard in places.items()}


def _nothing_found(directory: epath.Path) -> str:
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if any(name.endswith((".bin", ".bin.index.json", ".pt", ".pth")) for name in names):
        return f"{directory}: has .bin shards; convert them to safetensors first"
    loose = [name for name in names if name.endswith(".safetensors")]
    if loose:
        return f"{directory}: {len(loose)} safetensors shards but no {INDEX}"
    return f"{directory}: neither {SINGLE} nor {INDEX} is there"


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(
    tensors: Iterable[Planned], limit: int = SHARD_BYTES
) -> dict[str, list[Planned]]:
    """Files of at most `limit` bytes, in order: file name -> its tensors.

    One file when all fit. A tensor bigger than the limit has a file of its own.
    """
    groups: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    total = len(groups)
    return {
        f"model-{number:05d}-of-{total:05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def index_json(shards: dict[str, list[Planned]]) -> str:
    """The index that goes with more than one file."""
    total = sum(tensor.nbytes for group in shards.values() for tensor in group)
    places = {tensor.name: file for file, group in shards.items() for tensor in group}
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": places}, indent=2
    )


class Writer:
    """Writes one file: the header at once, then the tensors' bytes in their order."""

    def __init__(self, file: epath.Path, tensors: list[Planned]):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected, self._written = offset, 0
        self._stream = file.open("wb")
        self._stream.write(_LENGTH.pack(len(text)) + text)

    def write(self, array: np.ndarray) -> None:
        """The next bytes: the next rows of the tensor at hand, or the next tensor."""
        self._written += array.nbytes
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        if kind is None:
            assert self._written == self._expected, (self._written, self._expected)
