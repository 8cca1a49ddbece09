"""Who decodes what on a GPU: the blocks of all rows, shared out to the multiprocessors.

Rows are laid end to end, each with what it costs to start one, and cut into equal parts,
so that each multiprocessor has as much to do as any other, whatever the lengths. A row
that lies in several parts has to be put together again; rows that are all about as long
are therefore left whole, or all cut into as many pieces, where that costs less than 5%.

Letters: B rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

SMS = 132  # of an H100 or H200
BLOCK = 64  # slots that are worked on together
START_COST = 2  # what a row costs beside its blocks, in blocks
MOST_ROWS = 1 << 15  # two numbers of rows share an integer


class Schedule(NamedTuple):
    """Of each part: its first row and, times 65536, the row after its last. Of each row:
    what those before it cost, and its blocks; of these the most, and the sum.
    """

    rows: Int[Array, " parts"]
    costs: Int[Array, " B"]
    counts: Int[Array, " B"]
    longest: Int[Array, " 1"]
    total: Int[Array, " 1"]


class Division(NamedTuple):
    """What a part takes; and what each row takes, if all are to take the same."""

    length: Int[Array, ""]
    even: Bool[Array, ""]
    stride: Int[Array, ""]

    def start(self, row: ArrayLike, cost: ArrayLike) -> Array:
        """Where a row begins, before which others cost so much."""
        return jnp.where(self.even, row * self.stride, cost)

    def blocks(self, part: ArrayLike, start: ArrayLike, count: ArrayLike):
        """(first block of a row that lies in a part, block after the last)."""
        begin = part * self.length - start
        return jnp.clip(begin, 0, count), jnp.clip(begin + self.length, 0, count)


def schedule(lengths_B: Int[Array, " B"], *, parts: int) -> Schedule:
    """Every row has a block at least: somebody has to write its zeros."""
    B = lengths_B.shape[0]
    counts_B = lax.div(lengths_B.astype(jnp.int32) + (BLOCK - 1), jnp.int32(BLOCK))
    counts_B = jnp.maximum(1, counts_B)
    longest, total = counts_B.max(), counts_B.sum()
    row_B = jnp.arange(B, dtype=jnp.int32)
    before_BB = row_B[:, None] > row_B
    costs_B = jnp.where(before_BB, counts_B + START_COST, 0).sum(1, dtype=jnp.int32)
    divided = division(longest, total, rows=B, parts=parts)
    starts_B = divided.start(row_B, costs_B)
    part = jnp.arange(parts, dtype=jnp.int32)[:, None]
    ahead = part * divided.length - starts_B
    over, begun = ahead >= counts_B, ahead > -divided.length
    # One sum: XLA would write the operands of two to memory.
    rows = (jnp.where(over, 1, 0) + jnp.where(begun, 65536, 0)).sum(1, dtype=jnp.int32)
    return Schedule(rows, costs_B, counts_B, longest[None], total[None])


def division(longest: Array, total: Array, *, rows: int, parts: int) -> Division:
    """Of the longest row's blocks, and of all, in a few operations: kernels do it again."""
    each, cuts = -(-rows // parts), max(1, parts // rows)
    length = lax.div(total + (START_COST * rows + parts - 1), jnp.int32(parts))
    if cuts == 1:
        stride = longest + START_COST
        equal = each * stride
    else:
        equal = lax.div(longest + (cuts - 1), jnp.int32(cuts))
        stride = cuts * equal
    even = 20 * equal <= 21 * length
    return Division(jnp.where(even, equal, length), even, stride)


def rows_of(packed: ArrayLike):
    """(first row of a part, row after its last)."""
    return packed & 65535, lax.shift_right_logical(packed, jnp.int32(16))
