"""Checkpoint files byte by byte: safetensors, index, FP8 blocks, config.json.

Written out here, without the safetensors library, so as to be independent of what the
code under test reads them with.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]

FP8_MAX = 448.0  # the largest e4m3 value
_TAGS = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
_DTYPES = {
    "F32": np.dtype("float32"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


def write_files(
    config: Mapping[str, Any], values: Tensors, directory: Path, *, shards: int = 1
) -> Path:
    """Makes a checkpoint directory; returns it.

    With several shards a scale lies in another shard than its weight.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        write_safetensors(values, directory / "model.safetensors")
        return directory
    weight_map = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {
            name: value
            for i, (name, value) in enumerate(values.items())
            if i % shards == number
        }
        write_safetensors(part, directory / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    size = sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


def write_safetensors(values: Tensors, path: Path) -> None:
    """A safetensors file: header length, header (JSON), then the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, value in values.items():
        header[name] = {
            "dtype": _TAGS[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values.values():
            file.write(np.ascontiguousarray(value).tobytes())


def read(directory: Path) -> tuple[dict[str, Any], Tensors]:
    """(config.json, all tensors as stored) of a checkpoint directory."""
    values: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(content[first:last], _DTYPES[entry["dtype"]])
            values[name] = flat.reshape(entry["shape"])
    return json.loads((directory / "config.json").read_text()), values


def digest(directory: Path) -> str:
    """SHA-256 of the names and bytes of all files in `directory`."""
    whole = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def quantize(value: np.ndarray, block: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`value` [M, N] as e4m3 [M, N] and a float32 multiplier for each of its blocks.

    The multipliers are [ceil(M / block[0]), ceil(N / block[1])].
    """
    rows, columns = (range(0, n, b) for n, b in zip(value.shape, block))
    quantized = np.empty(value.shape, ml_dtypes.float8_e4m3fn)
    scale = np.empty((len(rows), len(columns)), np.float32)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            at = np.s_[row : row + block[0], column : column + block[1]]
            scale[i, j] = np.abs(value[at]).max() / np.float32(FP8_MAX)
            quantized[at] = (value[at] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return quantized, scale
