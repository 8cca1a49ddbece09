"""Copies of rows at their places on a Hopper GPU, in Pallas Mosaic GPU.

A gather goes from place to place and reads a row once for each of its copies. Between two
of them it has read and written more than the L2 cache holds, so all of these reads are the
memory's. Here a row is read once, into shared memory, and copied from there to all of its
places: of k copies, k + 1 rows move instead of 2 k.

Letters: N rows, M places, R places of a row at most, D elements of a row.
"""

import functools

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

    def kernel(x, places, row, out, buffer, here, rows_here, zeros, full, told):
        block = lax.axis_index("block")

        def share(total: int):
            return lax.div(total - block + blocks - 1, blocks)

        def at(step):
            return lax.rem(step, SLOTS), (block + step * blocks) * rows

        def fetch(step):
            slot, first = at(step)
            source = x.at[pl.ds(first, rows)]
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])
            source = places.at[pl.ds(first * R, numbers)]
            plgpu.copy_gmem_to_smem(source, here.at[slot], full.at[slot])

        def send(step, _):
            slot, first = at(step)
            plgpu.barrier_wait(full.at[slot])
            lax.fori_loop(0, rows, functools.partial(send_row, slot, first), None)
            plgpu.commit_smem_to_gmem_group()
            # All but these have left, and with them the buffer to fill next.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            pl.when(step + SLOTS - 1 < steps)(lambda: fetch(step + SLOTS - 1))

        def send_row(slot, first, number, _):
            for choice in range(R):
                place = here[slot, number * R + choice]
                pl.when((place < M) & (first + number < N))(
                    lambda place=place: copy(buffer.at[slot, number], place)
                )

        def copy(source, place):
            plgpu.copy_smem_to_gmem(source, out.at[place], commit_group=False)

        def fill(number, _):
            # The thread that copies has read all numbers when it copies in the next ones;
            # what the others read then does not matter.
            start = (block + number * blocks) * PLACES
            source = row.at[pl.ds(start, PLACES)]
            plgpu.copy_gmem_to_smem(source, rows_here, told)
            plgpu.barrier_wait(told)
            layout = plgpu.Layout.WG_STRIDED((PLACES,), vec_size=1)
            most = load(rows_here, layout=layout).max(0)

            def look(i, _):
                pl.when(rows_here[i] >= N)(lambda: copy(zeros, start + i))

            pl.when(most >= N)(lambda: lax.fori_loop(0, PLACES, look, None))

        steps = share(pl.cdiv(N, rows))
        for step in range(SLOTS - 1):
            pl.when(step < steps)(functools.partial(fetch, step))
        lax.fori_loop(0, steps, send, None)
        # What lies outside of an array is copied as zeros.
        plgpu.copy_gmem_to_smem(x.at[N], zeros, told)
        plgpu.barrier_wait(told)
        lax.fori_loop(0, share(pl.cdiv(M, PLACES)), fill, None)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

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
