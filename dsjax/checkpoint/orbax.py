"""Plain Orbax checkpoints, written and read region by region.

`Writer` makes what `ocp.StandardCheckpointer` makes (without OCDBT), array by array and
chunk by chunk, so that a stacked array may be bigger than memory. Each array is a zarr3
store of its own; a chunk is a run of rows of one published tensor, at most 16 MiB, and one
file: its existence tells that it is done. Orbax's own metadata comes last.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from dsjax.checkpoint import config_json
from dsjax.checkpoint.streaming import Region, cast, size, split, whole
from dsjax.config import ModelConfig
from dsjax.errors import UserError

CHUNK_BYTES = 16 << 20
PARAMS = "params"


def chunk_shape(
    shape: tuple[int, ...], *, leading: int, rows: int, itemsize: int
) -> tuple[int, ...]:
    """Single layers and experts, cut along the row dimensions to at most CHUNK_BYTES."""
    box = whole((1,) * leading + shape[leading:])
    first = next(split(box, leading + rows, itemsize, CHUNK_BYTES))
    return size(first)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths to nested dictionaries: the tree that Orbax sees."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _kvstore(path: epath.Path) -> dict[str, Any]:
    """Where tensorstore finds a directory."""
    text = str(path)
    if text.startswith("gs://"):
        bucket, _, rest = text.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": rest.rstrip("/") + "/"}
    return {"driver": "file", "path": str(path.resolve()) + "/"}


@dataclass(frozen=True, kw_only=True)
class Array:
    """One array being written."""

    store: ts.TensorStore
    chunk: tuple[int, ...]

    @classmethod
    def create(
        cls,
        params: epath.Path,
        path: str,
        *,
        shape: tuple[int, ...],
        dtype: np.dtype,
        chunk: tuple[int, ...],
    ) -> "Array":
        """Begins or goes on with `params`/`path`."""
        spec = {
            "driver": "zarr3",
            "kvstore": _kvstore(params / path),
            "metadata": {
                "shape": shape,
                "data_type": dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": chunk},
                },
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "store_data_equal_to_fill_value": True,
        }
        store = ts.open(spec, open=True, create=True).result()
        return cls(store=store, chunk=chunk)

    def pending(self) -> Iterator[Region]:
        """The chunks that are not there yet."""
        keys = self.store.kvstore.list().result()
        done = {key for key in keys if key.startswith(b"c/")}
        counts = [-(-n // step) for n, step in zip(self.store.shape, self.chunk)]
        for place in itertools.product(*map(range, counts)):
            if ("c/" + "/".join(map(str, place))).encode() not in done:
                yield tuple(
                    slice(i * step, min((i + 1) * step, n))
                    for i, step, n in zip(place, self.chunk, self.store.shape)
                )

    def write(self, region: Region, values: np.ndarray) -> None:
        """Writes one whole chunk; it is on disk when this returns."""
        self.store[region].write(values).result()


def finish(params: epath.Path, paths: list[str]) -> None:
    """Adds Orbax's metadata to `params`: until then nothing can restore it.

    Orbax itself writes it, for a tree of the same names with one number in each place;
    shapes are not part of it, how the arrays are stored is.
    """
    with tempfile.TemporaryDirectory() as place:
        skeleton = epath.Path(place) / "skeleton"
        with ocp.StandardCheckpointer() as checkpointer:
            tree = nested({path: np.zeros(1, np.float32) for path in paths})
            checkpointer.save(skeleton.resolve(), tree)
        for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            if (skeleton / name).exists():
                (params / name).write_text((skeleton / name).read_text())
        metadata = json.loads((skeleton / "_METADATA").read_text())
    metadata |= {"use_ocdbt": False, "use_zarr3": True}
    (params / "_METADATA").write_text(json.dumps(metadata))


@dataclass(frozen=True, kw_only=True)
class OrbaxSource:
    """A dsjax checkpoint directory: config.json and params/."""

    directory: epath.Path
    description: config_json.Description
    stores: dict[str, ts.TensorStore]

    @classmethod
    def open(cls, directory: epath.Path) -> "OrbaxSource":
        """Opens every array. Raises UserError when the directory is incomplete."""
        values = config_json.read_json(directory / "config.json")
        params = directory / PARAMS
        if not (params / "_METADATA").exists():
            raise UserError(
                f"{directory}: no {PARAMS}/_METADATA: not a whole checkpoint"
            )
        metadata = json.loads((params / "_METADATA").read_text())
        paths = [
            ".".join(str(part["key"]) for part in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
        ]
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        stores = {}
        for path in paths:
            base = _kvstore(params / path)
            if metadata.get("use_ocdbt"):
                base = {"driver": "ocdbt", "base": _kvstore(params), "path": path + "/"}
            try:
                stores[path] = ts.open({"driver": driver, "kvstore": base}).result()
            except ValueError as error:
                raise UserError(f"{params}: cannot open {path}: {error}") from None
        return cls(
            directory=directory, description=config_json.parse(values), stores=stores
        )

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.description.config

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by dotted path."""
        return {path: tuple(store.shape) for path, store in self.stores.items()}

    @cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Stored dtypes by dotted path."""
        return {path: store.dtype.numpy_dtype for path, store in self.stores.items()}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError when the arrays are not those of the architecture."""
        for path in expected.keys() | self.shapes.keys():
            if path not in self.shapes:
                raise UserError(f"{self.directory}: missing array {path}")
            if path not in expected:
                raise UserError(f"{self.directory}: unknown array {path}")
            if self.shapes[path] != expected[path]:
                raise UserError(
                    f"{self.directory}: {path} has shape {list(self.shapes[path])},"
                    f" expected {list(expected[path])}"
                )

    def read(self, path: str, region: Region, dtype: np.dtype) -> np.ndarray:
        """A region of an array in `dtype`."""
        return cast(self.stores[path][region].read().result(), dtype)
