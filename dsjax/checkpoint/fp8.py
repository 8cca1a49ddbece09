"""Weights stored as float8 e4m3 with one scale for each block of rows and columns.

A quantised `X.weight` [R, C] comes with `X.weight_scale_inv` [ceil(R / r), ceil(C / c)]
for blocks of r x c (128 x 128 as published). The scale is a multiplier, whatever its name
says: weight = float32(e4m3) * scale, then rounded once to the target dtype (V3, 3.3).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of a weight: the last block of either dimension may be cut."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def dequantise(
    weight_RC: np.ndarray,
    scale_SZ: np.ndarray,
    *,
    first_row: int,
    block: tuple[int, int],
    dtype: np.dtype,
) -> np.ndarray:
    """Rows `first_row`... of a quantised weight, in `dtype`.

    weight_RC: e4m3 [R, C], any run of whole rows. scale_SZ: float32, of the whole tensor.
    """
    rows, columns = weight_RC.shape
    of_row = np.arange(first_row, first_row + rows) // block[0]
    scale_RZ = scale_SZ.astype(np.float32)[of_row]
    if columns % block[1]:
        scale_RC = np.repeat(scale_RZ, block[1], axis=1)[:, :columns]
        return np.asarray(_times(weight_RC.view(np.uint8), scale_RC, dtype=dtype))
    return np.asarray(_times(weight_RC.view(np.uint8), scale_RZ, dtype=dtype))


@partial(jax.jit, static_argnames="dtype")
def _times(bytes_RC: jax.Array, scale_RZ: jax.Array, *, dtype: np.dtype) -> jax.Array:
    """Each of Z equal runs of a row times its own scale."""
    rows, columns = bytes_RC.shape
    runs = scale_RZ.shape[1]
    values = _decode(bytes_RC).reshape(rows, runs, columns // runs)
    return (values * scale_RZ[:, :, None]).reshape(rows, columns).astype(dtype)


def _decode(bits: jax.Array) -> jax.Array:
    """E4m3 bits (uint8) to float32, exactly.

    Shifted to float16's places they are the value / 256 (the exponents' biases are 7 and
    15), subnormals included. XLA's own conversion on a CPU is five times slower.
    """
    wide = bits.astype(jnp.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256
    return jnp.where((wide & 0x7F) == 0x7F, jnp.nan, value)
