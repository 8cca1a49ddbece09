"""Published safetensors -> Orbax, and back: streams through a bounded window.

Both directions read one piece of one published tensor at a time, write it, and forget it.
Everything that can be wrong with the input is found before the first byte is written.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from etils import epath
from jax.typing import DTypeLike
from tqdm import tqdm

from dsjax.checkpoint import config_json, hf_config_write, orbax, table
from dsjax.checkpoint.hf import HfSource, array_shapes
from dsjax.checkpoint.orbax import CHUNK_BYTES, OrbaxSource
from dsjax.checkpoint.safetensors import (
    INDEX,
    SHARD_BYTES,
    Planned,
    Writer,
    index_json,
    plan_shards,
)
from dsjax.checkpoint.streaming import (
    Region,
    float_dtype,
    ordered,
    progress_bar,
    size,
    split,
    whole,
    workers,
)
from dsjax.checkpoint.work import (
    check_absent,
    check_space,
    copy_companions,
    fingerprint,
    partial_directory,
)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class _Chunk:
    """One chunk to be copied into an Orbax array."""

    path: str
    region: Region
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(size(self.region)) * self.dtype.itemsize


def convert(
    source: PathLike,
    out: PathLike,
    *,
    dtype: DTypeLike | None = None,
    progress: bool = True,
) -> None:
    """Hugging Face safetensors in `source` -> a dsjax (Orbax) checkpoint in `out`.

    dtype: of the written weights; by default each keeps the one that it is stored in
    (FP8 blocks become bfloat16). A router's selection bias always keeps its own.
    Run again after an interruption, it goes on from OUT.partial.
    Raises UserError for a checkpoint that does not fit, an output that exists, a full disk.
    """
    source, out = epath.Path(source), epath.Path(out)
    check_absent(out)
    model = HfSource.open(source)
    dtypes = _target_dtypes(model.dtypes, dtype)
    check_space(out, _nbytes(model, dtypes))
    with partial_directory(out, _source_digest(model, dtypes)) as work:
        arrays = {
            path: _begin(model, work / orbax.PARAMS, path, dtypes[path])
            for path in model.shapes
        }
        _copy_chunks(model, arrays, dtypes, out, progress)
        orbax.finish(work / orbax.PARAMS, list(model.shapes))
        copy_companions(source, work)
        description = config_json.Description(
            config=model.config,
            dtype=dtypes[table.EMBEDDING.path].name,
            published=model.published,
        )
        config_json.write(work, description)


def _target_dtypes(
    stored: dict[str, np.dtype], dtype: DTypeLike | None
) -> dict[str, np.dtype]:
    if dtype is None:
        return stored
    wanted = float_dtype(dtype)
    return {
        path: kept if path.endswith("router.bias_E") else wanted
        for path, kept in stored.items()
    }


def _nbytes(model: HfSource, dtypes: dict[str, np.dtype]) -> int:
    """Bytes of all arrays as they will be written."""
    return sum(
        math.prod(shape) * dtypes[path].itemsize for path, shape in model.shapes.items()
    )


def _source_digest(model: HfSource, dtypes: dict[str, np.dtype]) -> str:
    files = sorted({stored.file for stored in model.stored.values()})
    stats = [
        (file.name, stat.length, stat.mtime) for file in files for stat in [file.stat()]
    ]
    names = {path: dtype.name for path, dtype in dtypes.items()}
    return fingerprint("convert", CHUNK_BYTES, model.published, stats, names)


def _begin(
    model: HfSource, params: epath.Path, path: str, dtype: np.dtype
) -> orbax.Array:
    shape = model.shapes[path]
    chunk = orbax.chunk_shape(
        shape,
        leading=model.leading(path),
        rows=model.rows(path),
        itemsize=dtype.itemsize,
    )
    return orbax.Array.create(params, path, shape=shape, dtype=dtype, chunk=chunk)


def _copy_chunks(
    model: HfSource,
    arrays: dict[str, orbax.Array],
    dtypes: dict[str, np.dtype],
    out: epath.Path,
    progress: bool,
) -> None:
    """Copies what is not there yet, in the order of the source's files."""
    pending = [
        _Chunk(path, region, dtypes[path])
        for path, array in arrays.items()
        for region in array.pending()
    ]
    pending.sort(key=lambda chunk: model.position(chunk.path, chunk.region))
    total = _nbytes(model, dtypes)
    left = sum(chunk.nbytes for chunk in pending)

    def copy(chunk: _Chunk) -> None:
        values = model.read(chunk.path, chunk.region, chunk.dtype)
        arrays[chunk.path].write(chunk.region, values)

    with progress_bar("convert", total, done=total - left, show=progress) as bar:
        jobs = ordered(pending, copy, workers=workers(model.directory, out))
        for chunk, _ in jobs:
            bar.update(chunk.nbytes)


def export(
    source: PathLike,
    out: PathLike,
    *,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """A dsjax (Orbax) checkpoint in `source` -> Hugging Face safetensors in `out`.

    One file, or shards of at most `shard_bytes` with an index. The MTP layer's copies of
    embedding and head, which published checkpoints have, are written again.
    Run again after an interruption, it goes on from the last whole shard.
    Raises UserError for a checkpoint that is not whole, an output that exists, a full disk.
    """
    source, out = epath.Path(source), epath.Path(out)
    check_absent(out)
    model = OrbaxSource.open(source)
    shapes = array_shapes(model.config)
    model.check(shapes)
    dtypes = _target_dtypes(model.dtypes, dtype)
    tensors = [
        *table.tensors(model.config, shapes),
        *table.copies(model.config, shapes),
    ]
    published = hf_config_write.write(
        model.config,
        dtype=dtypes[table.EMBEDDING.path].name,
        source=_with_token_ids(source, model.description.published),
    )
    shards = plan_shards(
        (Planned(t.name, dtypes[t.path], t.shape) for t in tensors), shard_bytes
    )
    by_name = {tensor.name: tensor for tensor in tensors}
    total = sum(planned.nbytes for group in shards.values() for planned in group)
    check_space(out, total)
    digest = _orbax_digest(source, dtypes, shards)
    with (
        partial_directory(out, digest) as work,
        progress_bar("export", total, show=progress) as bar,
    ):
        for file, group in shards.items():
            if (work / file).exists():
                bar.update(sum(planned.nbytes for planned in group))
            else:
                _write_shard(model, work / file, group, by_name, bar)
        if len(shards) > 1:
            (work / INDEX).write_text(index_json(shards))
        copy_companions(source, work)
        (work / "config.json").write_text(json.dumps(published, indent=2) + "\n")


def _write_shard(
    model: OrbaxSource,
    file: epath.Path,
    group: list[Planned],
    by_name: dict[str, table.Tensor],
    bar: tqdm,
) -> None:
    """Writes one file under another name, and names it when it is whole."""
    unfinished = file.parent / (file.name + ".unfinished")

    def jobs() -> Iterator[tuple[str, Region, np.dtype]]:
        for planned in group:
            tensor = by_name[planned.name]
            yield from _pieces(tensor, planned.dtype)

    def read(job: tuple[str, Region, np.dtype]) -> np.ndarray:
        return model.read(*job)

    with Writer(unfinished, group) as writer:
        for _, values in ordered(jobs(), read, workers=workers(model.directory)):
            writer.write(values)
            bar.update(values.nbytes)
    unfinished.rename(file)


def _pieces(
    tensor: table.Tensor, dtype: np.dtype
) -> Iterator[tuple[str, Region, np.dtype]]:
    """A published tensor as runs of its rows: regions of our array, in order."""
    place = tuple(slice(i, i + 1) for i in tensor.index)
    for part in split(whole(tensor.box), tensor.rows, dtype.itemsize, CHUNK_BYTES):
        yield tensor.path, place + part, dtype


def _orbax_digest(
    source: epath.Path, dtypes: dict[str, np.dtype], shards: dict[str, list[Planned]]
) -> str:
    """Of the checkpoint and its time of writing, which Orbax notes with the arrays, or
    beside them where a run saved them with the rest of its state.
    """
    when = "_CHECKPOINT_METADATA"
    files = [source / "config.json", source / orbax.PARAMS / when, source / when]
    texts = [file.read_text() for file in files if file.exists()]
    names = {path: dtype.name for path, dtype in dtypes.items()}
    return fingerprint("export", texts, names, sorted(shards))


def _with_token_ids(source: epath.Path, published: dict | None) -> dict:
    """The published config, with what the generation config knows about token ids."""
    file = source / "generation_config.json"
    known = config_json.read_json(file) if file.exists() else {}
    ids = {k: v for k, v in known.items() if k.endswith("_token_id")}
    return ids | (published or {})
