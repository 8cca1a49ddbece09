"""Copies of rows at their places on a Hopper GPU, in Pallas Mosaic GPU.

A gather goes from place to place and reads a row once for each of its copies. Between two
of them it has read and written more than the L2 cache holds, so all of these reads are the
memory's. Here a row is read once, into shared memory, and copied from there to all of its
places: of k copies, k + 1 rows move instead of 2 k.

Letters: N rows, M places, R places of a row at most, D elements of a row.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import SMS, is_hopper, load

SMEM = 200 * 2**10  # bytes of rows that an SM's blocks hold
EACH = (4, 2, 1)  # blocks on an SM, the most that have room: each sends one copy a time
SLOTS = 3  # buffers of a block: one leaves while others fill
ROWS = 8  # read together, at most
FEWEST = 4  # at least: their places are read from every 16 bytes on
LINES = (256, 128)  # elements of a line: no copy is wider
WHOLE = 32  # numbers that are copied at least: 128 bytes
MOST = 256  # and at most
PLACES = 128  # that are looked through together for those without a row


def lacks(shape: tuple[int, int], places: int, most: int, dtype: DTypeLike) -> str:
    """Why the kernel does not take x of `shape` [N, D], M `places` and R, the `most` of a
    row; nothing where it does.
    """
    if not places or not most or 0 in shape:
        return f"takes no empty operands ({shape}, {places} places)"
    if jnp.dtype(dtype).itemsize not in (2, 4):
        return f"takes 16 or 32 bits ({dtype})"
    if shape[1] % LINES[-1]:
        return f"takes rows that {LINES[-1]} divides ({shape})"
    if not _cut(shape[1], most, dtype):
        return f"takes shorter rows and fewer places of each ({shape}, {most})"
    return "" if is_hopper() else "needs a GPU of Hopper's generation"


def _cut(size: int, most: int, dtype: DTypeLike) -> tuple[int, int] | None:
    """How many blocks of an SM there are, and how many rows one reads together: a power
    of two.
    """
    for each in EACH:
        fit = SMEM // (each * SLOTS * size * jnp.dtype(dtype).itemsize)
        fit = min(fit, MOST // most, ROWS)
        if fit >= FEWEST:
            return each, 2 ** (fit.bit_length() - 1)
    return None


def spread_rows(
    x_ND: Float[Array, "N D"], places_NR: Int[Array, "N R"], row_M: Int[Array, " M"]
) -> Float[Array, "M D"]:
    """See `pallas_kernels.spread_rows.api`."""
    (N, D), (_, R), (M,), dtype = x_ND.shape, places_NR.shape, row_M.shape, x_ND.dtype
    line = next(line for line in LINES if D % line == 0)
    lines = D // line, line
    each, rows = _cut(D, R, dtype)
    blocks, numbers = each * SMS, pl.cdiv(rows * R, WHOLE) * WHOLE

    def kernel(*refs):
        _Block(N, R, blocks, lax.axis_index("block"), *refs).run()

    spread = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, *lines), dtype),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((SLOTS, rows, *lines), dtype),
            plgpu.SMEM((SLOTS, numbers), jnp.int32),
            plgpu.SMEM((PLACES,), jnp.int32),
            plgpu.SMEM(lines, dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    operands = places_NR.reshape(-1).astype(jnp.int32), row_M.astype(jnp.int32)
    return spread(x_ND.reshape(N, *lines), *operands).reshape(M, D)


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of threads: rows, some at a time, and then places without a row."""

    N: int
    R: int
    blocks: int
    number: Any  # the block's
    x: Any  # [N, lines, line]
    places: Any  # [N R]
    row: Any  # [M]
    out: Any  # [M, lines, line]
    buffer: Any  # [SLOTS, rows at a time, lines, line]
    here: Any  # [SLOTS, numbers]: their places
    rows_here: Any  # [PLACES]
    zeros: Any  # [lines, line]
    full: Any
    told: Any

    @property
    def rows(self) -> int:
        """That are read together."""
        return self.buffer.shape[1]

    def run(self) -> None:
        steps = self.share(pl.cdiv(self.N, self.rows))
        for step in range(SLOTS - 1):
            pl.when(step < steps)(functools.partial(self.fetch, step))
        lax.fori_loop(0, steps, functools.partial(self.send, steps), None)
        # What lies outside of an array is copied as zeros.
        plgpu.copy_gmem_to_smem(self.x.at[self.N], self.zeros, self.told)
        plgpu.barrier_wait(self.told)
        looks = self.share(pl.cdiv(self.out.shape[0], PLACES))
        lax.fori_loop(0, looks, self.fill, None)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def share(self, total: int):
        """How many of so many are this block's."""
        return lax.div(total - self.number + self.blocks - 1, self.blocks)

    def at(self, step):
        """A step's slot, and its first row."""
        slot = lax.rem(step, SLOTS)
        return slot, (self.number + step * self.blocks) * self.rows

    def fetch(self, step) -> None:
        """Copies in a step's rows and their places."""
        slot, first = self.at(step)
        full = self.full.at[slot]
        source = self.x.at[pl.ds(first, self.rows)]
        plgpu.copy_gmem_to_smem(source, self.buffer.at[slot], full)
        source = self.places.at[pl.ds(first * self.R, self.here.shape[1])]
        plgpu.copy_gmem_to_smem(source, self.here.at[slot], full)

    def send(self, steps, step, _) -> None:
        """Copies a step's rows to all of their places."""
        slot, first = self.at(step)
        plgpu.barrier_wait(self.full.at[slot])
        send_row = functools.partial(self.send_row, slot, first)
        lax.fori_loop(0, self.rows, send_row, None)
        plgpu.commit_smem_to_gmem_group()
        # All but these have left, and with them the buffer to fill next.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        further = step + SLOTS - 1
        pl.when(further < steps)(lambda: self.fetch(further))

    def send_row(self, slot, first, number, _) -> None:
        for choice in range(self.R):
            place = self.here[slot, number * self.R + choice]
            there = (place < self.out.shape[0]) & (first + number < self.N)
            source = self.buffer.at[slot, number]
            pl.when(there)(functools.partial(self.copy, source, place))

    def copy(self, source, place) -> None:
        plgpu.copy_smem_to_gmem(source, self.out.at[place], commit_group=False)

    def fill(self, number, _) -> None:
        """Zeros for those of PLACES that no row goes to."""
        # The thread that copies has read all numbers when it copies in the next ones;
        # what the others read then does not matter.
        start = (self.number + number * self.blocks) * PLACES
        source = self.row.at[pl.ds(start, PLACES)]
        plgpu.copy_gmem_to_smem(source, self.rows_here, self.told)
        plgpu.barrier_wait(self.told)
        layout = plgpu.Layout.WG_STRIDED((PLACES,), vec_size=1)
        most = load(self.rows_here, layout=layout).max(0)

        def look(i, _):
            empty = self.rows_here[i] >= self.N
            pl.when(empty)(lambda: self.copy(self.zeros, start + i))

        pl.when(most >= self.N)(lambda: lax.fori_loop(0, PLACES, look, None))
