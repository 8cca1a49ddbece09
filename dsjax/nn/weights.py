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

from dsjax.sharding import REST, named


class RouterBias(nnx.Variable):
    """The selection bias of a router: moved by load balancing, never by a gradient."""


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], *, spec: P, std: float, dtype: DTypeLike
) -> nnx.Param:
    """A normal(0, std) weight. `spec` tells how one layer's array rests on the mesh."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), spec=spec)


def filled(
    shape: tuple[int, ...], value: float, *, spec: P, dtype: DTypeLike
) -> nnx.Param:
    """A constant weight: norm scales start at 1, biases at 0."""
    return nnx.Param(jnp.full(shape, value, dtype), spec=spec)


def use(weight: nnx.Variable, dtype: DTypeLike) -> Array:
    """The weight in the compute dtype, gathered over the axes that only store it.

    Gathers one mesh axis at a time: two at once compile to a full-size all-reduce.
    """
    array = cast(weight, dtype)
    spec = _spec(array)
    for axis in reversed(REST):
        gathered = P(*(_without(entry, axis) for entry in spec))
        if gathered != spec:
            array, spec = jax.sharding.reshard(array, gathered), gathered
    return array


def cast(weight: nnx.Variable, dtype: DTypeLike) -> Array:
    """The weight in the compute dtype, as it rests."""
    array = weight[...]
    if array.dtype == dtype:
        return array
    # Or XLA casts the stacked layers as a whole, before the loop over them.
    return jax.lax.optimization_barrier(array).astype(dtype)


def batch_axes(x: Array) -> str | tuple[str, ...] | None:
    """The mesh axes that cut the first dimension of an activation."""
    spec = _spec(x)
    return spec[0] if len(spec) else None


def _spec(array: Array) -> P:
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
