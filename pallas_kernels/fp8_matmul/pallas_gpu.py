"""Block-scaled FP8 products for Hopper GPUs, in Pallas Mosaic GPU.

One kernel, dense and grouped. A block of the grid stays and takes one tile of the output
after the other: one warpgroup copies to a ring of buffers in shared memory, across the
end of a tile, and two multiply, 64 rows each. For every 128 of the inner axis the matrix
unit starts from zero, 128 columns at a time. What it gives is scaled and added to float32
sums in registers by one warpgroup while products of the other run. Where rows are many,
two blocks share what they read of the weights.

Letters: M rows, K inner, N outer, G groups; k, n blocks of 128.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.fp8_matmul.products_gpu import (
    ATOM,
    descriptor,
    finish_product,
    start_product,
)
from pallas_kernels.fp8_matmul.quantize import BLOCK
from pallas_kernels.grouped_matmul.ring_gpu import to_be_free
from pallas_kernels.grouped_matmul.tiles_gpu import (
    Schedule,
    place,
    schedule,
    tile_count,
    walk,
)
from pallas_kernels.mosaic import SMS, copy_rows, is_hopper, load

ROWS, COLUMNS = 128, 256  # of a block's tile
HALF = ROWS // 2  # rows of a warpgroup
PARTS = COLUMNS // BLOCK  # products of a warpgroup in a step
STAGES = 4  # buffers of operands: a power of two
TOGETHER = 4  # steps whose scales are copied at once: a line of 16 bytes, the least
BUFFERS = 4  # of scales: enough even if each is for one step only
W_ROWS = 8  # rows of w_scale in a copy, which is to have 128 bytes
BAND = 16  # columns of tiles that are walked together
LINE = 128  # bytes of a row of a swizzled buffer
FEWEST = 128  # rows, columns and inner size that copies need
ALIGN = 16  # bytes that rows of arrays are multiples of
MANY_ROWS = 1024  # of a group, from where two blocks share its weights


def lacks(x: Array, w: Array) -> str:
    """What keeps the kernel from these operands; empty where nothing does."""
    N, K = w.shape[-2:]
    if N < FEWEST or K < FEWEST or N % ALIGN or K % ALIGN:
        return f"takes N and K of at least {FEWEST} that {ALIGN} divides"
    return "" if is_hopper() else "needs a GPU of Hopper's generation"


def dense(
    x_MK: Float[Array, "M K"],
    x_scale_Mk: Float[Array, "M k"],
    w_NK: Float[Array, "N K"],
    w_scale_nk: Float[Array, "n k"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """(x scaled) @ (w scaled).T; see `pallas_kernels.fp8_matmul.api`.

    One group of all rows. A kernel that knew its rows and steps when it was compiled was
    a seventh slower (benchmarks/fp8_matmul.md).
    """
    sizes = jnp.full(1, len(x_MK), jnp.int32)
    return _product(x_MK, x_scale_Mk, w_NK[None], w_scale_nk[None], sizes, dtype)


def grouped(
    x_MK: Float[Array, "M K"],
    x_scale_Mk: Float[Array, "M k"],
    w_GNK: Float[Array, "G N K"],
    w_scale_Gnk: Float[Array, "G n k"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """Row m of group g times w[g].T; see `pallas_kernels.fp8_matmul.api`."""
    return _product(x_MK, x_scale_Mk, w_GNK, w_scale_Gnk, sizes_G, dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is to do."""

    M: int
    N: int
    K: int
    groups: int
    dtype: Any  # of the result
    pair: bool  # two blocks, one below the other, share w

    @property
    def steps(self) -> int:
        return pl.cdiv(self.K, BLOCK)

    @property
    def blocks(self) -> int:
        """Of a cluster."""
        return 2 if self.pair else 1

    @property
    def rows(self) -> int:
        """Of a cluster's tile."""
        return ROWS * self.blocks

    @property
    def across(self) -> int:
        return pl.cdiv(self.N, COLUMNS)

    @property
    def chunk(self) -> int:
        """Columns that are stored at once."""
        return LINE // jnp.dtype(self.dtype).itemsize


def _product(x, x_scale, w, w_scale, sizes, dtype) -> Array:
    rows = x.shape[0]
    x, x_scale = _padded(x, FEWEST, 1), _padded(x_scale, FEWEST, TOGETHER)
    w_scale = _padded(w_scale, W_ROWS, TOGETHER)
    (M, K), (G, N, _) = x.shape, w.shape
    pair = M >= MANY_ROWS * G
    plan = _Plan(M, N, K, G, jnp.dtype(dtype), pair)
    tiles = schedule(sizes, M, plan.rows)

    def kernel(*refs):
        *refs, y = refs

        def scope(*buffers):
            _run(_Block(plan, refs[:-4], *refs[-4:], y, *buffers))

        pl.run_scoped(
            scope,
            _two_views((STAGES, ROWS, BLOCK), x.dtype),
            _two_views((STAGES, COLUMNS, BLOCK), w.dtype),
            plgpu.SMEM((BUFFERS, ROWS, TOGETHER), jnp.float32),
            plgpu.SMEM((BUFFERS, W_ROWS, TOGETHER), jnp.float32),
            _two_views((2, HALF, plan.chunk), plan.dtype),
            plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
            to_be_free(STAGES, pair=pair),
            collective_axes="warpgroup",
        )

    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), plan.dtype),
        grid=(SMS // plan.blocks,),
        grid_names=("cluster",),
        cluster=(plan.blocks,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*tiles, x, x_scale, w, w_scale)
    return y[:rows]


def _padded(a: Array, least: int, multiple: int) -> Array:
    """With zeros up to the `least` rows and a multiple of columns; seldom a copy."""
    rows, columns = a.shape[-2:]
    more = max(least - rows, 0), -columns % multiple
    if not any(more):
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, size) for size in more])


def _two_views(shape: tuple[int, ...], dtype):
    """One piece of shared memory, seen as matrix units do and as copies do. Both lie
    the same, but copies of the first must start at every eighth row of an array.
    """
    tiling = plgpu.TilingTransform((8, LINE // jnp.dtype(dtype).itemsize))
    swizzle = plgpu.SwizzleTransform(LINE)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle)),
        plgpu.SMEM(shape, dtype, transforms=(swizzle,)),
    )


class _Block:
    """One block of the grid. Steps count on from tile to tile."""

    def __init__(self, plan: _Plan, tiles, *refs):
        self.plan = plan
        # Asked for here, once: in the loop over steps it would take a sixth of the rate.
        self.warpgroup = lax.axis_index("warpgroup")
        self.above = lax.axis_index("pair") * ROWS
        self.mine = pl.ds(self.warpgroup * HALF, HALF)
        self.x, self.x_scale, self.w, self.w_scale, self.y, *buffers = refs
        x_in, w_in, self.x_scale_in, self.w_scale_in, out, *barriers = buffers
        (self.x_in, self.x_landing), (self.w_in, self.w_landing) = x_in, w_in
        self.out, self.leaving = out
        self.full, self.free = barriers
        own = self.warpgroup * (HALF * BLOCK // ATOM)
        self.x_start = descriptor(self.x_in.at[0]) + own
        self.w_start = descriptor(self.w_in.at[0])
        self.schedule = Schedule(*tiles)
        self.down = tile_count(self.schedule, plan.M, plan.rows)

    def place(self, index):
        """Group, first row, rows of the group, first column, and how many steps: none
        for surplus rows, which so get zeros.
        """
        plan = self.plan
        number, column = walk(index, self.down, plan.across, BAND)
        group, start, count = place(self.schedule, number, plan.rows)
        steps = jnp.where(group < plan.groups, plan.steps, 0)
        count = jnp.clip(count - self.above, 0, ROWS)
        return group, start + self.above, count, column * COLUMNS, steps

    def scales(self, tile, k):
        """The buffer of the scales of a step, and which of them. `tile` counts those
        that have steps: buffers are to be used in turn.
        """
        buffers = tile * pl.cdiv(self.plan.steps, TOGETHER) + lax.div(k, TOGETHER)
        return buffers & (BUFFERS - 1), k & (TOGETHER - 1)

    def copy_tile(self, tile, index, step):
        """Copies in what a tile needs; returns the step after."""
        group, start, _, column, steps = self.place(index)
        rows, shared = pl.ds(start, ROWS), ("pair",) if self.plan.pair else None

        def load(k, step):
            slot = self.slot(step)
            full = self.full.at[slot]

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(self.free.at[slot])

            inner = pl.ds(k * BLOCK, BLOCK)
            x = self.x.at[rows, inner]
            plgpu.copy_gmem_to_smem(x, self.x_landing.at[slot], full)
            w = self.w.at[group, pl.ds(column, COLUMNS), inner]
            w_landing = self.w_landing.at[slot]
            plgpu.copy_gmem_to_smem(w, w_landing, full, collective_axes=shared)
            self.copy_scales(tile, k, group, rows, column, full)
            return step + 1

        return lax.fori_loop(0, steps, load, step)

    def copy_scales(self, tile, k, group, rows, column, full) -> None:
        """Copies in the scales of several steps with the first of them."""
        buffer, first = self.scales(tile, k)

        @pl.when(first == 0)
        def _():
            inner = pl.ds(pl.multiple_of(k, TOGETHER), TOGETHER)
            x_scale = self.x_scale.at[rows, inner]
            plgpu.copy_gmem_to_smem(x_scale, self.x_scale_in.at[buffer], full)
            w_scale = self.w_scale.at[
                group, pl.ds(lax.div(column, BLOCK), W_ROWS), inner
            ]
            plgpu.copy_gmem_to_smem(w_scale, self.w_scale_in.at[buffer], full)

        @pl.when(first > 0)
        def _():
            plgpu.barrier_arrive(full)
            plgpu.barrier_arrive(full)

    def multiply_tile(self, tile, index, step):
        """Makes a tile of what is copied in; returns the step after."""
        group, start, count, column, steps = self.place(index)
        above = self.warpgroup * HALF
        zero = lax.shift_right_logical(group, 30)  # though no compiler knows

        def add(k, carry):
            step, *rest = carry
            more = k + 1 < steps
            return step + 1, *self.add_products(tile, k, step, more, zero, *rest)

        zeros = jnp.zeros((HALF, BLOCK), jnp.float32)
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        pl.when(steps > 0)(lambda: self.wait_full(step))
        first = step, zeros, [zeros] * PARTS
        step, _, sums = lax.fori_loop(0, steps, add, first)
        self.store(sums, start + above, jnp.clip(count - above, 0, HALF), column)
        return step

    def add_products(self, tile, k, step, more, zero, product, sums):
        """The last product, and the sums of a warpgroup's rows with those of one step
        added. Whatever can be is done while a product runs.
        """
        buffer, number = self.scales(tile, k)
        slot = self.slot(step)
        x = self.x_start + slot * (ROWS * BLOCK // ATOM)
        w = self.w_start + slot * (COLUMNS * BLOCK // ATOM)
        added = []
        for part, total in enumerate(sums):
            to = w + part * (BLOCK * BLOCK // ATOM)
            product = start_product(product, x, to, zero)
            scale = self.row_scales(buffer, number)
            scale *= self.w_scale_in[buffer, part, number]
            if part == PARTS - 1:
                pl.when(more)(lambda: self.wait_full(step + 1))
            product = finish_product(product)
            if part == PARTS - 1:
                plgpu.barrier_arrive(self.free.at[slot])
            total += product * lax.broadcast_in_dim(scale, total.shape, [0])
            # Keeps the next product, to the same registers, behind.
            product, total = lax.optimization_barrier((product, total))
            added.append(total)
        return product, added

    def wait_full(self, step) -> None:
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def slot(self, step):
        return step & (STAGES - 1)

    def row_scales(self, buffer, number):
        """Those of a warpgroup's rows for one step."""
        return load(
            self.x_scale_in.at[buffer, self.mine, number],
            layout=plgpu.Layout.WGMMA.reduce(1),
            optimized=False,
        )

    def store(self, sums, start, count, column) -> None:
        """Writes the first `count` of a warpgroup's rows, the first of them at `start`."""
        plan, warpgroup = self.plan, self.warpgroup
        for first in range(0, COLUMNS, plan.chunk):
            part, within = divmod(first, BLOCK)
            chunk = sums[part][:, within : within + plan.chunk]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.out[warpgroup] = chunk.astype(plan.dtype)
            plgpu.commit_smem()
            columns = pl.ds(column + first, plan.chunk)
            copy_rows(self.leaving.at[warpgroup], self.y.at[:, columns], start, count)
            plgpu.commit_smem_to_gmem_group()

    def drain(self, steps) -> None:
        """Waits until all buffers that were filled are empty."""

        def one(step, _):
            plgpu.barrier_wait(self.free.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - STAGES, 0), steps, one, None)


def _run(block: _Block) -> None:
    """What the warpgroups of a block do."""
    plan, warpgroup = block.plan, block.warpgroup
    cluster, clusters = lax.axis_index("cluster"), SMS // plan.blocks
    tiles = lax.div(block.down * plan.across - cluster + clusters - 1, clusters)

    def each(one_tile):
        def one(number, carry):
            tile, step = carry
            after = one_tile(tile, cluster + number * clusters, step)
            return tile + (after > step).astype(jnp.int32), after

        return lax.fori_loop(0, tiles, one, (0, 0))[1]

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        steps = each(block.copy_tile)
        if plan.pair:  # neither may end while the other's signals are on their way
            block.drain(steps)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        each(block.multiply_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
