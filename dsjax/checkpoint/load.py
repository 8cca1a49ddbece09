"""Either form of checkpoint straight onto the mesh; and a model back to disk.

No host ever holds the model: each reads what its own devices keep, in slabs of bounded
size, and each slab goes to its devices before it is forgotten.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh
from jax.sharding import Sharding as Placement
from jax.typing import DTypeLike

from dsjax.checkpoint import config_json, orbax
from dsjax.checkpoint.convert import PathLike
from dsjax.checkpoint.hf import HfSource, array_shapes
from dsjax.checkpoint.orbax import PARAMS, OrbaxSource
from dsjax.checkpoint.redundant import by_slots, fill_tables
from dsjax.checkpoint.streaming import (
    Region,
    Source,
    float_dtype,
    ordered,
    progress_bar,
    size,
    split,
    workers,
)
from dsjax.checkpoint.work import (
    check_absent,
    fingerprint,
    partial_directory,
    partial_path,
)
from dsjax.config import ModelConfig
from dsjax.errors import UserError
from dsjax.nn.options import Precision
from dsjax.nn.replicas import Placement as Replication
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import Sharding, make_mesh

SLAB_BYTES = 16 << 20


def open_source(directory: epath.Path) -> Source:
    """A checkpoint directory of either form. Raises UserError when it is neither."""
    if config_json.is_ours(config_json.read_json(directory / "config.json")):
        source = OrbaxSource.open(directory)
        source.check(array_shapes(source.config))
        return source
    return HfSource.open(directory)


def load(
    path: PathLike,
    *,
    dtype: DTypeLike | None = "float32",
    mesh: Mesh | None = None,
    sharding: Sharding | None = None,
    place: Callable[[ModelConfig, int], Replication] | None = None,
    progress: bool = False,
) -> Transformer:
    """A Transformer from a Hugging Face or a dsjax directory, on the mesh.

    dtype: of weights and computation; None is the dtype of the stored embedding. FP8
    blocks are dequantised straight to it, without a bfloat16 between.
    mesh: by default the mesh of ones. place: where experts go that lie in more than one
    slot, from the architecture and the devices of the expert axis; each of these reads
    its slots alone. Raises UserError for what `convert` refuses, too.
    """
    asked = None if dtype is None else float_dtype(dtype)
    source = open_source(epath.Path(path))
    dtype = source.dtypes["embedding_VD"] if asked is None else asked
    mesh = make_mesh() if mesh is None else mesh
    placement = None
    if place is not None:
        placement = place(source.config, mesh.shape["expert"])
        source = by_slots(source, placement)
    model = Transformer.abstract(
        source.config,
        mesh=mesh,
        sharding=sharding,
        precision=Precision(compute=dtype, params=dtype),
        slots=placement and placement.slots,
    )
    if placement is not None:
        fill_tables(model, placement)
    variables = flat(model)
    places = {path: variable.get_value() for path, variable in variables.items()}
    for path, array in assemble(source, places, progress=progress):
        variables[path].set_value(array)
    return model


@dataclass(frozen=True)
class _Slab:
    """A region that one read brings, and the devices that keep parts of it.

    parts: for each device, the part of the slab that it keeps and where its own shard
    has it; whole: the slab is all that these devices keep of this array.
    """

    path: str
    region: Region
    dtype: np.dtype
    parts: list[tuple[jax.Device, Region, tuple[int, ...]]]
    whole: bool
    last: bool


def assemble(
    source: Source,
    places: dict[str, jax.ShapeDtypeStruct],
    *,
    slab_bytes: int = SLAB_BYTES,
    progress: bool = False,
) -> Iterator[tuple[str, jax.Array]]:
    """Yields (path, array) for every ShapeDtypeStruct with a sharding in `places`."""
    slabs = [
        slab
        for path, place in places.items()
        for slab in _slabs(path, place, slab_bytes)
    ]
    total = sum(_nbytes(slab.region, slab.dtype) for slab in slabs)

    def read(slab: _Slab) -> np.ndarray:
        return source.read(slab.path, slab.region, slab.dtype)

    buffers: dict[jax.Device, jax.Array] = {}
    jobs = ordered(slabs, read, workers=workers(source.directory))
    with progress_bar("load", total, show=progress) as bar:
        for slab, values in jobs:
            place = places[slab.path]
            _put(slab, values, buffers, place.sharding.shard_shape(place.shape))
            bar.update(values.nbytes)
            if slab.last:
                yield slab.path, _join(place, buffers)
                buffers = {}


def _put(
    slab: _Slab,
    values: np.ndarray,
    buffers: dict[jax.Device, jax.Array],
    shard: tuple[int, ...],
) -> None:
    """Gives each device its part: the whole shard, or a piece put into its place."""
    with jax.set_mesh(None):  # one device at a time, whatever mesh the caller entered
        for device, part, start in slab.parts:
            piece = jax.device_put(values[part], device)
            if not slab.whole:
                if device not in buffers:
                    buffers[device] = jnp.zeros(shard, slab.dtype, device=device)
                piece = _place(buffers[device], piece, start)
                jax.block_until_ready(piece)  # or slabs would pile up
            buffers[device] = piece


@partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    """Writes `piece` into `buffer`, in place.

    As bits: XLA's CPU rewrites a bfloat16 update in float32, the whole buffer each time.
    """
    bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
    wide, part = (jax.lax.bitcast_convert_type(x, bits) for x in (buffer, piece))
    updated = jax.lax.dynamic_update_slice(wide, part, start)
    return jax.lax.bitcast_convert_type(updated, buffer.dtype)


def _join(
    place: jax.ShapeDtypeStruct, buffers: dict[jax.Device, jax.Array]
) -> jax.Array:
    shards = list(buffers.values())
    jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(place.shape, place.sharding, shards)


def _nbytes(region: Region, dtype: np.dtype) -> int:
    return math.prod(size(region)) * dtype.itemsize


def _slabs(path: str, place: jax.ShapeDtypeStruct, limit: int) -> Iterator[_Slab]:
    """The reads that fill this host's shards of one array.

    Devices whose shards span the same rows share their reads, even when each keeps
    other columns: files hold whole rows.
    """
    shape, dtype = place.shape, np.dtype(place.dtype)
    leading = max(1, len(shape) - 1)
    groups: dict[tuple, list[tuple[jax.Device, Region]]] = {}
    for device, region in _regions(place.sharding, shape).items():
        rows = tuple((part.start, part.stop) for part in region[:leading])
        groups.setdefault(rows, []).append((device, region))
    slabs = []
    for members in groups.values():
        bounds = _bounds([region for _, region in members])
        regions = list(split(bounds, leading, dtype.itemsize, limit))
        for region in regions:
            parts = [_part(region, device, kept) for device, kept in members]
            slabs.append((region, parts, len(regions) == 1))
    for number, (region, parts, whole) in enumerate(slabs, 1):
        yield _Slab(path, region, dtype, parts, whole, number == len(slabs))


def _regions(sharding: Placement, shape: tuple[int, ...]) -> dict[jax.Device, Region]:
    return {
        device: tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


def _bounds(regions: list[Region]) -> Region:
    """The smallest region that holds all of these."""
    return tuple(
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*regions)
    )


def _part(
    slab: Region, device: jax.Device, kept: Region
) -> tuple[jax.Device, Region, tuple[int, ...]]:
    """What `device`, which keeps `kept`, takes of a slab, and where it puts it."""
    inside = tuple(
        slice(
            max(mine.start, part.start) - part.start,
            min(mine.stop, part.stop) - part.start,
        )
        for part, mine in zip(slab, kept)
    )
    start = tuple(max(0, part.start - mine.start) for part, mine in zip(slab, kept))
    return device, inside, start


def save(model: Transformer, path: PathLike) -> None:
    """Writes a model, sharded or not, as a dsjax (Orbax) checkpoint.

    Every host calls it; each writes its shards. Raises UserError when `path` exists,
    and for a model whose experts lie in several slots.
    """
    if model.slots is not None:
        raise UserError("a model with redundant experts is not saved: load one without")
    out = epath.Path(path)
    check_absent(out)
    arrays = {name: variable.get_value() for name, variable in flat(model).items()}
    first = jax.process_index() == 0
    work = partial_directory(out, fingerprint("save", str(model.config)))
    with work if first else nullcontext(partial_path(out)) as work:
        sync_global_devices("dsjax: the directory is there")
        with ocp.StandardCheckpointer() as checkpointer:
            tree = orbax.nested(arrays)
            checkpointer.save((work / PARAMS).resolve(), tree, force=True)
        if first:
            dtype = arrays["embedding_VD"].dtype.name
            description = config_json.Description(config=model.config, dtype=dtype)
            config_json.write(work, description)
            if model.tokenizer is not None:
                model.tokenizer.save(work)
    sync_global_devices("dsjax: the checkpoint is whole")
