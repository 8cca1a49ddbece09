"""A portable grouped matmul: blocks of rows, one group's matrix at a time.

XLA's own ragged product is dense outside TPUs: it multiplies every row with every
group. Here a loop walks over blocks of rows. A block never spans two groups, and the
number of blocks follows the group sizes at run time, so that the work is that of the
rows there are, plus on average half a block a group.

Letters: M rows, K inner, N outer, G groups, b rows of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class _Block(NamedTuple):
    group: Int[Array, ""]
    start: Int[Array, ""]  # its first row
    mask: Array  # [b, 1]: rows of the group; the others belong to the next one


def block_rows(rows: int, groups: int) -> int:
    """Rows a block: about half a group of mean size, a power of two from 8 to 512."""
    half = max(rows // (2 * groups), 1)
    return min(max(1 << (half - 1).bit_length(), 8), 512)


def block_count(sizes_G: Int[Array, " G"], b: int) -> Int[Array, ""]:
    """How many blocks the loop runs: every group rounded up to whole blocks."""
    return (-(-sizes_G // b)).sum()


def blocked(
    x_MK: Float[Array, "M K"], w_GNK: Float[Array, "G N K"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """x[m] @ w[group of m].T; see `pallas_kernels.grouped_matmul.api`."""
    return _rows(x_MK, w_GNK, sizes_G, "bk,nk->bn")


def gradients(
    dy_MN: Float[Array, "M N"],
    x_MK: Float[Array, "M K"],
    w_GNK: Float[Array, "G N K"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "M K"], Float[Array, "G N K"]]:
    """By rows, dy[m] @ w[group of m], and by weights, dy_g.T @ x_g in `dtype`."""
    dx_MK = _rows(dy_MN, w_GNK, sizes_G, "bn,nk->bk")
    return dx_MK, _weight_gradient(x_MK, dy_MN, sizes_G).astype(dtype)


def _rows(x: Array, w: Array, sizes: Array, product: str) -> Array:
    """Every row times its group's matrix; `product` is the einsum of one block."""
    rows, out = x.shape[0], w.shape[1 if product.endswith("n") else 2]
    b = block_rows(rows, w.shape[0])
    x = jnp.pad(x, ((0, b), (0, 0)))  # the last block may reach past the end

    def step(block: _Block, y: Array) -> Array:
        here = jax.lax.dynamic_slice_in_dim(x, block.start, b)
        matrix = jax.lax.dynamic_index_in_dim(w, block.group, keepdims=False)
        part = jnp.einsum(product, here, matrix, preferred_element_type=jnp.float32)
        # Rows past the group are zero now and overwritten by the next group's block.
        part = jnp.where(block.mask, part, 0).astype(y.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, part, block.start, axis=0)

    y = jnp.zeros((rows + b, out), x.dtype)
    return _walk(sizes, b, step, y)[:rows]


def _weight_gradient(x: Array, dy: Array, sizes: Array) -> Float[Array, "G N K"]:
    """dw[g]: the sum over the group's rows of dy outer x, in float32."""
    rows, groups = x.shape[0], sizes.shape[0]
    b = block_rows(rows, groups)
    x, dy = (jnp.pad(a, ((0, b), (0, 0))) for a in (x, dy))

    def step(block: _Block, dw: Array) -> Array:
        here = jax.lax.dynamic_slice_in_dim(x, block.start, b)
        there = jax.lax.dynamic_slice_in_dim(dy, block.start, b)
        # Both: another row may hold anything, and 0 times infinity is not 0.
        here, there = (jnp.where(block.mask, rows, 0) for rows in (here, there))
        part = jnp.einsum("bn,bk->nk", there, here, preferred_element_type=jnp.float32)
        sum_so_far = jax.lax.dynamic_index_in_dim(dw, block.group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            dw, sum_so_far + part, block.group, axis=0
        )

    dw = jnp.zeros((groups, dy.shape[1], x.shape[1]), jnp.float32)
    return _walk(sizes, b, step, dw)


def _walk(
    sizes: Array, b: int, step: Callable[[_Block, Array], Array], start: Array
) -> Array:
    """Runs `step` for every block in row order, handing its result on."""
    # XLA for GPUs fails on a loop whose bounds it can evaluate from constant sizes.
    sizes = jax.lax.optimization_barrier(sizes.astype(jnp.int32))
    row_ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // b))

    def body(i: Array, carry: Array) -> Array:
        group = jnp.searchsorted(block_ends, i, side="right").astype(jnp.int32)
        first_block = block_ends[group] + (-sizes[group] // b)
        row = row_ends[group] - sizes[group] + (i - first_block) * b
        mask = row + jnp.arange(b) < row_ends[group]
        return step(_Block(group, row, mask[:, None]), carry)

    return jax.lax.fori_loop(0, block_count(sizes, b), body, start)
