"""Activations to e4m3 in one pass, for Hopper GPUs, in Pallas Mosaic GPU.

A block of the grid takes 64 tiles of 1 x 128, one below the other, straight from memory
to registers and back: the lanes that share a tile find its largest value by shuffles.
Blocks are small and many, so that reading, computing and writing overlap.

Letters: M rows, K inner; k blocks of 128 of it.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.fp8_matmul.quantize import BLOCK, E4M3, LARGEST, LEAST
from pallas_kernels.mosaic import is_hopper, load, store

ROWS = 64  # of a block of the grid
VECTOR = 16  # bytes that a lane reads at once
DTYPES = (jnp.bfloat16, jnp.float32)


def lacks(x: Array) -> str:
    """What keeps the kernel from this operand; empty where nothing does."""
    *batch, columns = x.shape
    rows = math.prod(batch)
    if x.dtype not in DTYPES:
        return "takes bfloat16 and float32"
    if rows < ROWS or not columns or columns % BLOCK:
        return f"takes {ROWS} rows at least, and columns that {BLOCK} divides"
    return "" if is_hopper() else "needs a GPU of Hopper's generation"


def quantize_rows(
    x_MK: Float[Array, "*batch M K"],
) -> tuple[Float[Array, "*batch M K"], Float[Array, "*batch M k"]]:
    """See `pallas_kernels.fp8_matmul.api`."""
    *batch, K = x_MK.shape
    q, scale = _rows(x_MK.reshape(-1, K))
    return q.reshape(x_MK.shape), scale.reshape(*batch, K // BLOCK)


def _rows(x_MK: Array) -> tuple[Array, Array]:
    M, K = x_MK.shape
    layout = _by_rows(x_MK.dtype)

    def kernel(x, q, scale):
        # The last rows again rather than a cut block: what two write is the same.
        start = jnp.minimum(lax.axis_index("row") * ROWS, M - ROWS)
        k, rows = lax.axis_index("column"), pl.ds(start, ROWS)
        here = rows, pl.ds(k * BLOCK, BLOCK)
        values = load(x.at[here], layout=layout, optimized=False).astype(jnp.float32)
        largest = jnp.maximum(jnp.abs(values).max(1), LEAST)
        inverse = lax.broadcast_in_dim(LARGEST / largest, values.shape, [0])
        q[here] = (values * plgpu.layout_cast(inverse, layout)).astype(E4M3)
        store(scale.at[rows, k], largest * (1 / LARGEST))

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((M, K), E4M3),
            jax.ShapeDtypeStruct((M, K // BLOCK), jnp.float32),
        ),
        grid=(pl.cdiv(M, ROWS), K // BLOCK),
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(x_MK)


def _by_rows(dtype):
    """Four warps, of one row each or, of half as many bytes, two: a lane reads `VECTOR`
    bytes of a row.
    """
    vector = VECTOR // jnp.dtype(dtype).itemsize
    if BLOCK // vector == 32:
        tiling, warps, lanes = Tiling(((4, BLOCK), (vector,))), (-3,), (-2,)
    else:
        tiling = Tiling(((8, BLOCK), (2, BLOCK), (vector,)))
        warps, lanes = (-5,), (-3, -2)
    return plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=lanes, vector_dim=-1)
