"""Weights: created with their resting layout, gathered where a layer uses them.

Every weight keeps the [out, in] orientation of the published checkpoints, so that a
conversion is a reshape and nothing else.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from dsjax.sharding import axes_of, named


class RouterBias(nnx.Variable):
    """The selection bias of a router: moved by load balancing, never by a gradient."""


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    *,
    std: float,
    dtype: DTypeLike,
    **metadata,
) -> nnx.Param:
    """A normal(0, std) weight. Its metadata: `spec` tells how one layer's array rests on
    the mesh, `storage` which axes of it are gathered for its use, `looped` that its casts
    must stay where they are, as in a loop over layers that slices it from their stack.
    """
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), **metadata)


def filled(
    shape: tuple[int, ...], value: float, *, dtype: DTypeLike, **metadata
) -> nnx.Param:
    """A constant weight: norm scales start at 1, biases at 0. Metadata as of `weight`."""
    return nnx.Param(jnp.full(shape, value, dtype), **metadata)


def use(weight: nnx.Variable, dtype: DTypeLike) -> Array:
    """The weight in the compute dtype, gathered over the axes that only store it.

    Gathers one mesh axis at a time: two at once compile to a full-size all-reduce.
    """
    array = cast(weight[...], dtype, looped=weight.get_metadata("looped"))
    spec = spec_of(array)
    for axis in reversed(weight.get_metadata("storage")):
        gathered = P(*(_without(entry, axis) for entry in spec))
        if gathered != spec:
            array, spec = jax.sharding.reshard(array, gathered), gathered
    return array


def cast(array: Array, dtype: DTypeLike, *, looped: bool) -> Array:
    """A weight in the compute dtype, as it rests."""
    if array.dtype != dtype and looped:
        # Or XLA casts the stacked layers as a whole, before the loop over them.
        array = jax.lax.optimization_barrier(array)
    return array.astype(dtype)


def batch_axes(x: Array) -> str | tuple[str, ...] | None:
    """The mesh axes that cut the first dimension of an activation."""
    spec = spec_of(x)
    return spec[0] if len(spec) else None


def facing(x: Array, *weights: Array) -> Array:
    """An activation whose batch is whole along the axes that cut the weights it meets.

    A no-op in training, where weights are gathered and `tensor` cuts no batch. In the
    serving layout weights stay and the few tokens are gathered.
    """
    cut = {axis for w in weights for axis in axes_of(*spec_of(w))}
    spec = spec_of(x)
    rest = tuple(axis for axis in axes_of(spec[0]) if axis not in cut)
    return jax.sharding.reshard(x, P(rest or None, *spec[1:]))


def whole(x: Array) -> Array:
    """An activation with nothing cut but its batch."""
    return jax.sharding.reshard(x, P(spec_of(x)[0]))


def spec_of(array: Array) -> P:
    """How the mesh cuts an array."""
    return jax.typeof(array).sharding.spec


def _without(entry: str | tuple[str, ...] | None, axis: str):
    """An entry without `axis`; an expert dimension ("expert" alone) is no storage."""
    axes = (entry,) if isinstance(entry, str) else entry
    if not axes or axes == ("expert",) or axis not in axes:
        return entry
    rest = tuple(name for name in axes if name != axis)
    return rest[0] if len(rest) == 1 else rest or None


def flat(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every weight and router bias by its dotted path, "segments.0.attention.q_NHD"."""
    state = nnx.state(model, nnx.Any(nnx.Param, RouterBias))
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each weight of `flat(model)` rests on `mesh`."""
    return {
        path: named(variable.get_metadata("spec"), variable.shape, mesh)
        for path, variable in flat(model).items()
    }
