"""A grouped matmul as one batched product: for GPUs, while they have no kernel of ours.

Rows are copied into blocks that belong to one group each, and every block is multiplied
with a copy of its group's matrix: one large batched product instead of the many small
ones of `reference`, paid with memory. A block of b rows does b products for each matrix
element copied, so that the copy costs about as much as the product at b = 256.

Letters: M rows, K inner, N outer, G groups, I blocks, b rows of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_matmul.layers import Matrices
from pallas_kernels.grouped_matmul.reference import block_rows

MOST_COPIED = 2**30  # matrix elements: 2 GiB in bfloat16


class Layout(NamedTuple):
    """Where rows go. A row index of M stands for no row."""

    rows_Ib: Int[Array, "I b"]  # which row each place of a block holds
    group_I: Int[Array, " I"]
    place_M: Int[Array, " M"]  # where each row is in the flattened blocks
    real_M: Bool[Array, " M"]  # False past the sum of the sizes


def fits(rows: int, w_GNK: Matrices) -> bool:
    """Whether the copies of matrices stay within MOST_COPIED elements."""
    groups, outer, inner = w_GNK.shape
    return _blocks(rows, groups) * outer * inner <= MOST_COPIED


@jax.custom_vjp
def padded(
    x_MK: Float[Array, "M K"], w_GNK: Float[Array, "G N K"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """x[m] @ w[group of m].T; see `pallas_kernels.grouped_matmul.api`."""
    layout = _layout(x_MK.shape[0], sizes_G)
    return _rows(x_MK, w_GNK, layout, "ibk,ink->ibn")


def _forward(x_MK, w_GNK, sizes_G):
    return padded(x_MK, w_GNK, sizes_G), (x_MK, w_GNK, sizes_G)


def _backward(saved, dy_MN):
    x_MK, w_GNK, sizes_G = saved
    layout = _layout(x_MK.shape[0], sizes_G)
    dx_MK = _rows(dy_MN, w_GNK, layout, "ibn,ink->ibk")
    dw_INK = jnp.einsum(
        "ibn,ibk->ink",
        _into_blocks(dy_MN, layout),
        _into_blocks(x_MK, layout),
        preferred_element_type=jnp.float32,
    )
    dw_GNK = jax.ops.segment_sum(
        dw_INK, layout.group_I, w_GNK.shape[0], indices_are_sorted=True
    )
    return dx_MK, dw_GNK.astype(w_GNK.dtype), None


padded.defvjp(_forward, _backward)


def _blocks(rows: int, groups: int) -> int:
    """Enough blocks for any sizes: each group fills all of its blocks but one."""
    return rows // block_rows(rows, groups) + groups


def _layout(rows: int, sizes_G: Array) -> Layout:
    groups, sizes = sizes_G.shape[0], sizes_G.astype(jnp.int32)
    b, count = block_rows(rows, groups), _blocks(rows, groups)
    row_ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // b))
    row_starts, block_starts = row_ends - sizes, block_ends + (-sizes // b)

    block_I = jnp.arange(count)
    group_I = jnp.searchsorted(block_ends, block_I, side="right")
    group_I = jnp.minimum(group_I, groups - 1)  # blocks past the last hold no row
    first_I = row_starts[group_I] + (block_I - block_starts[group_I]) * b
    rows_Ib = first_I[:, None] + jnp.arange(b)
    rows_Ib = jnp.where(rows_Ib < row_ends[group_I][:, None], rows_Ib, rows)

    row_M = jnp.arange(rows)
    group_M = jnp.searchsorted(row_ends, row_M, side="right")
    group_M = jnp.minimum(group_M, groups - 1)
    place_M = block_starts[group_M] * b + row_M - row_starts[group_M]
    return Layout(rows_Ib, group_I, place_M, row_M < row_ends[-1])


def _into_blocks(x: Array, layout: Layout) -> Array:
    return x.at[layout.rows_Ib].get(mode="fill", fill_value=0)


def _rows(x: Array, w: Array, layout: Layout, product: str) -> Array:
    """Every row times its group's matrix; `product` is the einsum of the blocks."""
    blocks = _into_blocks(x, layout)
    y = jnp.einsum(
        product, blocks, w[layout.group_I], preferred_element_type=jnp.float32
    )
    y = y.astype(x.dtype).reshape(-1, y.shape[-1])
    return jnp.where(layout.real_M[:, None], y.at[layout.place_M].get(mode="clip"), 0)
