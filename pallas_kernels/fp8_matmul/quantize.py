"""To e4m3 with a scale for every block, and back (DeepSeek-V3 report, section 3.3).

A value is float32(e4m3) * scale: the scale multiplies, as `weight_scale_inv` of published
checkpoints does, and the last block of either axis may be cut. A scale brings the largest
value of its block to 448, e4m3's own; V3's code takes no largest value below 1e-4.

Letters: M rows, K inner, N outer; k, n blocks of 128 of them.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

E4M3 = jnp.float8_e4m3fn
BLOCK = 128
LARGEST = 448.0  # beyond it e4m3 has only NaN
LEAST = 1e-4


def quantize_rows(
    x_MK: Float[Array, "*batch M K"],
) -> tuple[Float[Array, "*batch M K"], Float[Array, "*batch M k"]]:
    """See `pallas_kernels.fp8_matmul.api`. XLA makes a kernel of the largest values and
    one of the rest, so `x` is read twice.
    """
    return _quantize(x_MK, 1)


def quantize_blocks(
    w_NK: Float[Array, "*batch N K"],
) -> tuple[Float[Array, "*batch N K"], Float[Array, "*batch n k"]]:
    """Weights: e4m3 and a float32 scale for each 128 x 128 block; any leading axes."""
    return _quantize(w_NK, BLOCK)


def dequantize(
    q: Float[Array, "*batch R K"],
    scale: Float[Array, "*batch r k"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch R K"]:
    """The values of either form, which the scales' shape tells, rounded once to `dtype`."""
    rows, columns = q.shape[-2:]
    tall = 1 if scale.shape[-2] == rows else BLOCK
    tiles, size = _in_tiles(q.astype(jnp.float32), tall)
    values = (tiles * scale[..., :, None, :, None]).reshape(size)
    return values[..., :rows, :columns].astype(dtype)


def _quantize(a: Array, tall: int) -> tuple[Array, Array]:
    rows, columns = a.shape[-2:]
    tiles, size = _in_tiles(a.astype(jnp.float32), tall)
    largest = jnp.abs(tiles).max((-3, -1))
    scale = jnp.maximum(largest, LEAST) / LARGEST
    q = (tiles / scale[..., :, None, :, None]).reshape(size)
    return q[..., :rows, :columns].astype(E4M3), scale


def _in_tiles(a: Array, tall: int) -> tuple[Array, tuple[int, ...]]:
    """[..., r, tall, k, 128], filled up with zeros, and its shape as a matrix."""
    *batch, rows, columns = a.shape
    down, across = -(-rows // tall), -(-columns // BLOCK)
    missing = [(0, down * tall - rows), (0, across * BLOCK - columns)]
    a = jnp.pad(a, [(0, 0)] * len(batch) + missing)
    return a.reshape(*batch, down, tall, across, BLOCK), a.shape
