"""Taking rows on a Hopper GPU, in Pallas Mosaic GPU: copies, and nothing else.

What a gather of XLA's takes is arithmetic with indices, of every element. Here a row is
one copy into shared memory, and some rows together are one copy out of it: both are the
copy engine's, and a block has many on their way.

Letters: N rows there are, M rows wanted, D elements of one, L lines of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

SMS = 132  # of an H100 or H200
SMEM = 200 * 2**10  # bytes of rows that an SM's blocks hold
EACH = (4, 2, 1)  # blocks on an SM, the most that have room: each sends one copy a time
ROWS = 16  # that leave together, at most
AHEAD = 2  # buffers that fill, at least, while one leaves
LINES = (256, 128)  # elements of a line: no copy is wider
INDICES = 32  # that are copied at once: no copy is smaller than 128 bytes


def lacks(wanted: int, shape: tuple[int, ...], dtype: DTypeLike) -> str:
    """Why the kernel does not take this; nothing where it does."""
    if not wanted or 0 in shape:
        return f"takes no empty operands ({wanted} of {shape})"
    if jnp.dtype(dtype).itemsize not in (2, 4):
        return f"takes 16 or 32 bits ({dtype})"
    if shape[1] % LINES[-1]:
        return f"takes rows that {LINES[-1]} divides ({shape})"
    if not _cut(shape[1], dtype):
        return f"takes shorter rows ({shape})"
    if jax.default_backend() != "gpu":  # compiled ahead of time: for a Hopper GPU
        return ""
    capability = jax.devices()[0].compute_capability
    return "" if capability.startswith("9.") else "needs a GPU of Hopper's generation"


def _cut(size: int, dtype: DTypeLike) -> tuple[int, int] | None:
    """How many blocks of an SM there are, and how many rows leave one together: a power
    of two, four at least, since indices are read from every 16 bytes on.
    """
    for each in EACH:
        fit = SMEM // (each * (AHEAD + 1) * size * jnp.dtype(dtype).itemsize)
        if fit >= 4:
            return each, min(ROWS, 2 ** (fit.bit_length() - 1))
    return None


def take_rows(
    x_ND: Float[Array, "N D"], index_M: Int[Array, " M"]
) -> Float[Array, "M D"]:
    """x[index], zeros for an index past the end: what lies outside is copied as such."""
    (_, size), (wanted,), dtype = x_ND.shape, index_M.shape, x_ND.dtype
    line = next(line for line in LINES if size % line == 0)
    each, rows = _cut(size, dtype)
    slots = min(SMEM // (each * rows * size * dtype.itemsize), 2 * (AHEAD + 1))
    blocks = each * SMS
    total = pl.cdiv(wanted, rows)  # steps of all blocks

    def kernel(x, index, out, buffer, indices, full, told):
        block = lax.axis_index("block")
        steps = lax.div(total - block + blocks - 1, blocks)

        def first(step):
            return (block + step * blocks) * rows

        def tell(step):
            slot = lax.rem(step, slots)
            source = index.at[pl.ds(first(step), INDICES)]
            plgpu.copy_gmem_to_smem(source, indices.at[slot], told.at[slot])

        def fetch(step):
            slot = lax.rem(step, slots)
            plgpu.barrier_wait(told.at[slot])
            for row in range(rows):
                source = x.at[indices[slot, row]]
                plgpu.copy_gmem_to_smem(source, buffer.at[slot, row], full.at[slot])
            pl.when(step + 1 < steps)(lambda: tell(step + 1))

        def send(step, _):
            slot = lax.rem(step, slots)
            plgpu.barrier_wait(full.at[slot])
            plgpu.copy_smem_to_gmem(buffer.at[slot], out.at[pl.ds(first(step), rows)])
            # All but the last have left, and with them the buffer to fill next.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            pl.when(step + slots - 1 < steps)(lambda: fetch(step + slots - 1))

        pl.when(steps > 0)(lambda: tell(0))
        for step in range(slots - 1):
            pl.when(step < steps)(lambda step=step: fetch(step))
        lax.fori_loop(0, steps, send, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lines = (size // line, line)
    taken_MLl = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((wanted, *lines), dtype),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((slots, rows, *lines), dtype),
            plgpu.SMEM((slots, INDICES), jnp.int32),
            plgpu.Barrier(num_arrivals=rows, num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(x_ND.reshape(-1, *lines), index_M.astype(jnp.int32))
    return taken_MLl.reshape(wanted, size)
