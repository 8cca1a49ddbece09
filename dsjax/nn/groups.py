"""A long batch in groups of rows, one after the other, where its arrays are large."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dsjax.sharding import axes_of
from pallas_kernels.flash_attention import api as flash_attention


def groups(x_BTD: Array, token_bytes: int, *, at_once: int) -> int:
    """The fewest equal groups of a device's rows that keep each within `at_once` bytes,
    if there are such; a row is never cut.
    """
    batch, length, *_ = x_BTD.shape
    rows = batch // _devices(x_BTD)
    return equal_parts(rows, math.ceil(rows * length * token_bytes / at_once))


def equal_parts(size: int, least: int) -> int:
    """The smallest divisor of `size` that is `least` or more; `size`, if it is less."""
    return next(n for n in range(max(min(least, size), 1), size + 1) if size % n == 0)


def in_groups(function: Callable[..., Array], number: int, *arrays: Any) -> Array:
    """`function(*arrays)`, whose first axis is the batch, in `number` groups of rows.

    All arrays are cut over the mesh alike; a group has rows of every device. For the
    gradient a group is computed again, but for what attention keeps: that the softmax is
    not computed a third time.
    """
    if number == 1:
        return function(*arrays)
    policy = jax.checkpoint_policies.save_only_these_names(flash_attention.KEPT)
    body = jax.checkpoint(function, policy=policy, prevent_cse=False)
    parts = jax.tree.map(lambda x: _split(x, number), arrays)
    _, result = jax.lax.scan(lambda _, part: (None, body(*part)), None, parts)
    return _join(result)


def _devices(x: Array) -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in axes_of(jax.typeof(x).sharding.spec[0]))


def _split(x: Array, number: int) -> Array:
    """[B, ...] -> [number, B / number, ...], each device's rows staying there."""
    spec, rest = jax.typeof(x).sharding.spec, x.shape[1:]
    devices = _devices(x)
    x = jnp.reshape(
        x,
        (devices, number, -1, *rest),
        out_sharding=P(spec[0], None, None, *spec[1:]),
    )
    x = jnp.moveaxis(x, 1, 0)
    return jnp.reshape(x, (number, -1, *rest), out_sharding=P(None, *spec))


def _join(x: Array) -> Array:
    """The reverse of `_split`."""
    number, rows, *rest = x.shape
    _, *spec = jax.typeof(x).sharding.spec
    devices = _devices(x[0])
    x = jnp.reshape(
        x,
        (number, devices, rows // devices, *rest),
        out_sharding=P(None, spec[0], None, *spec[1:]),
    )
    x = jnp.moveaxis(x, 0, 1)
    return jnp.reshape(x, (number * rows, *rest), out_sharding=P(*spec))
