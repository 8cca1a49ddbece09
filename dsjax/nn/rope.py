"""Rotary position embedding: plain, YaRN (V2, V3) and Llama 3.1's scaling.

Letters: B batch, T length, R rotated size; a further axis before R (heads) is allowed.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import Llama3, Rope, Yarn


def frequencies(rope: Rope, size: int) -> np.ndarray:
    """Radians a position for each of the size / 2 rotated pairs, float64."""
    plain = rope.theta ** -(np.arange(0, size, 2) / size)
    match rope.scaling:
        case None:
            return plain
        case Yarn() as yarn:
            return _yarn(plain, yarn, rope.theta, size)
        case Llama3() as llama3:
            return _llama3(plain, llama3)


def _yarn(plain: np.ndarray, yarn: Yarn, theta: float, size: int) -> np.ndarray:
    """Fast pairs keep their frequency, slow ones are divided by the factor.

    The ramp between them runs over the pairs that turn beta_fast to beta_slow times
    within the original length (arXiv 2309.00071, section 3.2).
    """

    def pair_with(rotations: float) -> float:
        wave = yarn.original_length / (rotations * 2 * math.pi)
        return size * math.log(wave) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), size - 1)
    width = max(high - low, 0.001)  # two equal ends would divide by zero
    slow = np.clip((np.arange(size // 2) - low) / width, 0, 1)
    return plain * (1 - slow) + plain / yarn.factor * slow


def _llama3(plain: np.ndarray, llama3: Llama3) -> np.ndarray:
    """Long wavelengths are stretched by the factor, the middle is interpolated."""
    turns = llama3.original_length * plain / (2 * math.pi)
    low, high = llama3.low_frequency_factor, llama3.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return plain * keep + plain / llama3.factor * (1 - keep)


def rotate(
    x: Float[Array, "B T ... R"], positions_BT: Int[Array, "B T"], rope: Rope
) -> Float[Array, "B T ... R"]:
    """`x` turned by its positions, computed in float32, returned in its dtype.

    Interleaved pairs come out as two halves, [evens, odds]: queries and keys agree on
    that order, so their products do not change, and later code sees one layout.
    """
    size = x.shape[-1]
    frequency = jnp.asarray(frequencies(rope, size), jnp.float32)
    angle = positions_BT.astype(jnp.float32)[..., None] * frequency
    scale = rope.scaling.rotation_scale if isinstance(rope.scaling, Yarn) else 1.0
    heads = (1,) * (x.ndim - 3)
    angle = angle.reshape(*positions_BT.shape, *heads, size // 2)
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    x32 = x.astype(jnp.float32)
    if rope.interleaved:
        pairs = x32.reshape(*x.shape[:-1], size // 2, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = x32[..., : size // 2], x32[..., size // 2 :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotate_end(
    x: Float[Array, "B T ... H"], positions_BT: Int[Array, "B T"], rope: Rope, size: int
) -> Float[Array, "B T ... H"]:
    """`x` with the last `size` of its elements rotated. On a GPU they are written over the
    old ones, where those are not asked for again, and so is the gradient: the rest is not
    moved.
    """
    end = rotate(x[..., -size:], positions_BT, rope)
    return _with_end(x, end)


def _forward(x, positions_BT, rope, size):
    return rotate_end(x, positions_BT, rope, size), positions_BT


def _backward(rope, size, positions_BT, dy):
    dend = dy[..., -size:]
    turn = functools.partial(rotate, positions_BT=positions_BT, rope=rope)
    (dend,) = jax.linear_transpose(turn, dend)(dend)
    return _with_end(dy, dend), None


rotate_end.defvjp(_forward, _backward)


def _with_end(x: Array, end: Array) -> Array:
    # XLA's compiler for CPUs would make `end` of what it writes over, as it writes.
    start = x.shape[-1] - end.shape[-1]
    return jax.lax.platform_dependent(
        x,
        end,
        cuda=lambda x, end: jax.lax.dynamic_update_slice_in_dim(x, end, start, -1),
        default=lambda x, end: jnp.concatenate([x[..., :start], end], axis=-1),
    )
