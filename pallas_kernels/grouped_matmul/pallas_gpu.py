"""Grouped matmuls for Hopper GPUs, in Pallas Mosaic GPU.

Two kernels. `_Rows` multiplies rows with their group's matrices or the transposes: the
forward products and the gradients by rows. `_Weights` sums outer products over a group's
rows: the gradient by weights. In both a block of the grid stays for the whole run and
makes one tile of the output after the other. One warpgroup copies operands to a ring of
buffers in shared memory and runs ahead, over the ends of tiles; two multiply, each its
half of a tile's rows, one step in flight while the next is issued, and neither waits for
the other, so that one may store while the other multiplies.

Letters: M rows, I inner, O outer, G groups.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.tiles_gpu import (
    LINE,
    SMS,
    Groups,
    Schedule,
    Tiles,
    by_size,
    place,
    row_tiles,
    schedule,
    tile_count,
    walk,
    weight_tiles,
)

ALIGN = 8  # rows of a swizzled tile
CHUNK_ROWS = 64  # rows that are stored at once
LEAST_ROWS = 256  # the tallest tile

Ref = Any


def product(
    x_MI: Float[Array, "M I"], w_GOI: Float[Array, "G O I"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M O"]:
    """x[m] @ w[group of m].T; zeros for rows of no group. bfloat16."""
    return _rows([x_MI], [w_GOI], sizes_G, turned=True)[0]


def row_gradient(
    dy_MO: Float[Array, "M O"], w_GOI: Float[Array, "G O I"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M I"]:
    """dy[m] @ w[group of m]."""
    return _rows([dy_MO], [w_GOI], sizes_G, turned=False)[0]


def both(
    x_MI: Float[Array, "M I"],
    gate_GOI: Float[Array, "G O I"],
    up_GOI: Float[Array, "G O I"],
    sizes_G: Int[Array, " G"],
) -> tuple[Float[Array, "M O"], Float[Array, "M O"]]:
    """The products of x with gate and with up; x is read once."""
    return _rows([x_MI], [gate_GOI, up_GOI], sizes_G, turned=True)


def swiglu(
    x_MI: Float[Array, "M I"],
    gate_GOI: Float[Array, "G O I"],
    up_GOI: Float[Array, "G O I"],
    scale_M: Float[Array, " M"],
    sizes_G: Int[Array, " G"],
) -> Float[Array, "M O"]:
    """silu(x @ gate.T) * (x @ up.T) * scale, rounded once."""
    return _gated(x_MI, gate_GOI, up_GOI, scale_M, sizes_G, apart=False)[0]


def all_three(
    x_MI: Float[Array, "M I"],
    gate_GOI: Float[Array, "G O I"],
    up_GOI: Float[Array, "G O I"],
    scale_M: Float[Array, " M"],
    sizes_G: Int[Array, " G"],
) -> tuple[Float[Array, "M O"], Float[Array, "M O"], Float[Array, "M O"]]:
    """Both products, and SwiGLU of what is rounded."""
    return _gated(x_MI, gate_GOI, up_GOI, scale_M, sizes_G, apart=True)


def swiglu_row_gradient(
    dgate_MO: Float[Array, "M O"],
    dup_MO: Float[Array, "M O"],
    gate_GOI: Float[Array, "G O I"],
    up_GOI: Float[Array, "G O I"],
    sizes_G: Int[Array, " G"],
) -> Float[Array, "M I"]:
    """dgate[m] @ gate + dup[m] @ up, summed before it is rounded."""
    return _rows([dgate_MO, dup_MO], [gate_GOI, up_GOI], sizes_G, turned=False)[0]


def _gated(x, gate, up, scale, sizes, *, apart):
    return _rows([x], [gate, up], sizes, turned=True, scale=scale, apart=apart)


class _Ring(NamedTuple):
    """Buffers that one warpgroup fills and two empty in turn. Steps count on from tile
    to tile.
    """

    stages: int
    full: Ref
    free: Ref

    def slot(self, step):
        return lax.rem(step, self.stages)

    def to_fill(self, step):
        """The slot for a step, once it is empty."""

        @pl.when(step >= self.stages)
        def _():
            plgpu.barrier_wait(self.free.at[self.slot(step)])

        return self.slot(step)

    def filled(self, step):
        """The slot of a step, once it is full."""
        plgpu.barrier_wait(self.full.at[self.slot(step)])
        return self.slot(step)

    def release(self, step) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def sum_up(self, multiply: Callable, steps, step, shape: tuple[int, int]):
        """Runs `multiply(acc, number, slot)` for some steps; returns what they added
        up to. A buffer is released when the products after its own are issued.
        """

        def one(acc, number, step):
            multiply(acc, number, self.filled(step))
            plgpu.wgmma_wait(1)

            @pl.when(number > 0)
            def _():
                self.release(step - 1)

            return step + 1

        def run(acc):
            end = lax.fori_loop(0, steps, functools.partial(one, acc), step)
            total = acc[...]

            @pl.when(steps > 0)
            def _():
                self.release(end - 1)

            return total

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def drain(self, steps) -> None:
        """Waits until all buffers that were filled are empty."""

        def one(step, _):
            plgpu.barrier_wait(self.free.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.stages, 0), steps, one, None)

    def skip(self, steps, step) -> None:
        def one(_, step):
            self.filled(step)
            self.release(step)
            return step + 1

        lax.fori_loop(0, steps, one, step)


def _run(block, tiles, blocks: int = 1) -> None:
    """What the three warpgroups of a block do, if tiles are done by `blocks` at once."""
    clusters = SMS // blocks
    cluster, warpgroup = lax.axis_index("cluster"), lax.axis_index("warpgroup")
    waves = lax.div(tiles, clusters)  # all of them whole

    def index(wave):
        """Back and forth: tiles get smaller."""
        turned = clusters - 1 - cluster
        return wave * clusters + jnp.where(lax.rem(wave, 2) == 0, cluster, turned)

    def each(one_tile):
        def one(wave, step):
            return one_tile(index(wave), step)

        more = (index(waves) < tiles).astype(jnp.int32)
        return lax.fori_loop(0, waves + more, one, 0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        steps = each(block.copy_tile)
        if blocks > 1:  # none may end while the other's signals are on their way
            block.ring.drain(steps)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        each(block.multiply_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _call(kernel: Callable, outputs: list, *operands: Array, blocks: int = 1):
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(SMS // blocks,),
        grid_names=("cluster",),
        cluster=(blocks,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=1024,  # what is not needed buffers could have
        ),
    )(*operands)


def _padded(a: Array, *multiples: int) -> Array:
    """With zeros up to multiples of these in its last axes; 2-dimensional ones with a
    tile's rows at least. No copy is made where it is so already.
    """
    least = (LEAST_ROWS, 0) if a.ndim == 2 else (0, 0)
    sizes = [
        max(pl.cdiv(size, multiple) * multiple, floor)
        for size, multiple, floor in zip(a.shape[-2:], multiples, least)
    ]
    more = [(0, new - old) for new, old in zip(sizes, a.shape[-2:])]
    if not any(after for _, after in more):
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + more)


def _swizzled(dtype, columns: int):
    """The transforms of a tile for matrix units; and those for copies to or from any
    row of an array. Either way the same bytes lie at the same places.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.SwizzleTransform(min(columns * itemsize, 128))
    tiling = plgpu.TilingTransform((ALIGN, swizzle.swizzle // itemsize))
    return (tiling, swizzle), (swizzle,)


def _smem(shape: tuple[int, ...], dtype):
    return plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype, shape[-1])[0])


def _smem_of_any_row(shape: tuple[int, ...], dtype, *widths: int):
    """Two views of the same memory for each width: tiled, whose copies must start at
    every eighth row of an array, and flat, which is a line wide and whose copies need
    not. Narrower views are higher: all are of the same bytes.
    """
    *batch, rows = shape
    views = [
        plgpu.SMEM((*batch, rows * LINE // width, width), dtype, transforms=transforms)
        for width in widths
        for transforms in _swizzled(dtype, width)
    ]
    return plgpu.RefUnion(*views)


@dataclasses.dataclass(frozen=True)
class _RowsPlan:
    """What a kernel of rows is to do."""

    tiles: Tiles
    turned: bool
    lhs: int  # how many
    matrices: int
    scaled: bool  # makes SwiGLU
    apart: bool  # makes the products
    M: int
    inner: int
    outer: int
    groups: int
    dtype: Any

    @property
    def parts(self) -> int:
        """Products that are kept apart, side by side in a tile."""
        return self.matrices // self.lhs

    @property
    def width(self) -> int:
        """Columns of the output that a tile is for."""
        return self.tiles.columns // self.parts

    @property
    def across(self) -> int:
        """Tiles, of clusters, in a row of them."""
        blocks = 2 if self.tiles.pair == "columns" else 1
        return pl.cdiv(self.outer, self.width * blocks)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.inner, LINE)

    @property
    def segments(self) -> int:
        """Pieces that a tile's rows are copied in. Of a pair's tile both blocks have some
        above and some below, so that they have the same to do if it is not full.
        """
        return 2 if self.tiles.pair == "rows" else 1

    @property
    def copies(self) -> int:
        """Into one buffer of the ring."""
        return self.segments + self.parts

    @property
    def outputs(self) -> int:
        return self.parts * self.apart + self.scaled


def _rows(
    xs, ws, sizes, *, turned, scale=None, apart=True, tiles=None
) -> tuple[Array, ...]:
    """Sum over i of xs[i] [M, I] times ws[i][g], [O, I] if `turned` else [I, O]. Of a
    single x with several w the products `apart`, and SwiGLU of both if there is a scale.
    """
    wanted = xs[0].shape[0], ws[0].shape[1 if turned else 2]
    xs = [_padded(x, ALIGN, LINE) for x in xs]
    ws = [_padded(w, LINE, LINE) for w in ws]
    (M, inner), (groups, *matrix) = xs[0].shape, ws[0].shape
    outer = matrix[0 if turned else 1]
    tiles = tiles or row_tiles(outer, turned=turned, apart=len(ws) // len(xs))
    scaled, dtype = scale is not None, xs[0].dtype
    plan = _RowsPlan(
        *(tiles, turned, len(xs), len(ws), scaled, apart),
        *(M, inner, outer, groups, dtype),
    )
    scales = ()
    if scaled:  # a tile may end after the last row
        more = M - scale.shape[0] + tiles.all_rows
        scales = (jnp.pad(scale.astype(jnp.float32), (0, more)),)
    out = jax.ShapeDtypeStruct((M, outer), dtype)

    empty = plgpu.Barrier
    if tiles.pair:
        empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("pair",))

    def kernel(*refs):
        def scope(*buffers):
            block = _Rows(plan, refs, *buffers)
            _run(block, block.down * plan.across, tiles.blocks)

        lines = (tiles.stages, tiles.columns, LINE)
        if not turned:
            lines = (tiles.stages, LINE, tiles.columns)
        pl.run_scoped(
            scope,
            _smem_of_any_row((tiles.stages, tiles.rows), dtype, LINE),
            _smem(lines, dtype),
            _smem_of_any_row((2, tiles.leaving, CHUNK_ROWS), dtype, LINE, LINE // 2),
            plgpu.Barrier(num_arrivals=plan.copies, num_barriers=tiles.stages),
            empty(num_arrivals=2, num_barriers=tiles.stages),
            collective_axes="warpgroup",
        )

    operands = (*schedule(sizes, M, tiles.all_rows), *xs, *ws, *scales)
    outputs = _call(kernel, [out] * plan.outputs, *operands, blocks=tiles.blocks)
    return tuple(y[: wanted[0], : wanted[1]] for y in outputs)


class _Rows:
    """One block of the kernel of rows."""

    def __init__(self, plan: _RowsPlan, refs, x_in, w_in, out, full, free):
        self.plan = plan
        fields = len(Schedule._fields)
        self.schedule = Schedule(*refs[:fields])
        self.down = tile_count(self.schedule, plan.M, plan.tiles.all_rows)
        refs, self.ys = refs[fields : -plan.outputs], refs[-plan.outputs :]
        self.xs, refs = refs[: plan.lhs], refs[plan.lhs :]
        self.ws, self.scales = refs[: plan.matrices], refs[plan.matrices :]
        self.x_in, self.x_landing = x_in
        self.w_in = w_in
        narrow = [view.at[:, :, :CHUNK_ROWS] for view in out[2:]]
        self.out = {LINE: out[:2], LINE // 2: narrow}
        self.ring = _Ring(plan.tiles.stages, full, free)

    def place(self, index):
        """Group, first row, rows of the group, first column, and how often to multiply
        with each matrix: never for surplus rows, which so get zeros.
        """
        tiles = self.plan.tiles
        number, column = walk(index, self.down, self.plan.across, tiles.band)
        group, start, count = place(self.schedule, number, tiles.all_rows)
        if tiles.pair == "columns":
            column = column * 2 + lax.axis_index("pair")
        steps = jnp.where(group < self.plan.groups, self.plan.steps, 0)
        return group, start, count, column * self.plan.width, steps

    def above(self, warpgroup):
        """Rows of a tile before those of a warpgroup."""
        if self.plan.tiles.pair == "rows":
            warpgroup = 2 * warpgroup + lax.axis_index("pair")
        return warpgroup * self.plan.tiles.half

    def shared(self, split: str) -> tuple[str, ...] | None:
        """The axis over which what is not split is copied once for both blocks."""
        return ("pair",) if self.plan.tiles.pair == split else None

    def copy_tile(self, index, step):
        """Copies in what a tile needs; returns the step after."""
        plan = self.plan
        group, start, count, column, steps = self.place(index)
        columns = pl.ds(column, plan.width)

        def load(x, ws, number, step):
            slot = self.ring.to_fill(step)
            full = self.ring.full.at[slot]
            inner = pl.ds(number * LINE, LINE)
            self.copy_rows(x.at[:, inner], start, count, slot)
            for part, w in enumerate(ws):
                here = pl.ds(part * plan.width, plan.width)
                there = (columns, inner) if plan.turned else (inner, columns)
                here = (here,) if plan.turned else (slice(None), here)
                plgpu.copy_gmem_to_smem(
                    w.at[(group, *there)],
                    self.w_in.at[(slot, *here)],
                    full,
                    collective_axes=self.shared("rows"),
                )
            return step + 1

        for number, x in enumerate(self.xs):
            ws = self.ws[number * plan.parts : (number + 1) * plan.parts]
            step = lax.fori_loop(0, steps, functools.partial(load, x, ws), step)
        return step

    def copy_rows(self, x, start, count, slot) -> None:
        """Copies in the rows of a tile, but no segment that is not the group's."""
        full, tiles = self.ring.full.at[slot], self.plan.tiles
        if self.plan.segments == 1:
            rows, shared = pl.ds(start, tiles.rows), self.shared("columns")
            landing = self.x_landing.at[slot]
            plgpu.copy_gmem_to_smem(x.at[rows], landing, full, collective_axes=shared)
            return
        for segment in range(self.plan.segments):
            above = self.above(segment)

            @pl.when(count > above)
            def _(segment=segment, above=above):
                rows = pl.ds(start + above, tiles.half)
                landing = pl.ds(segment * tiles.half, tiles.half)
                landing = self.x_landing.at[slot, landing]
                plgpu.copy_gmem_to_smem(x.at[rows], landing, full)

            @pl.when(count <= above)
            def _():
                plgpu.barrier_arrive(full)

    def multiply_tile(self, index, step):
        """Makes a tile of what is copied in; returns the step after."""
        plan, half = self.plan, self.plan.tiles.half
        _, start, count, column, steps = self.place(index)
        steps = steps * plan.lhs
        warpgroup = lax.axis_index("warpgroup")
        above = self.above(warpgroup)
        start, count = start + above, jnp.clip(count - above, 0, half)

        def multiply(acc, _, slot):
            w = self.w_in.at[slot]
            mine = self.x_in.at[slot, pl.ds(warpgroup * half, half)]
            plgpu.wgmma(acc, mine, w.T if plan.turned else w)

        @pl.when(count > 0)
        def _():
            total = self.ring.sum_up(multiply, steps, step, (half, plan.tiles.columns))
            self.store(total, start, count, column)

        @pl.when(count == 0)
        def _():
            self.ring.skip(steps, step)

        return step + steps

    def store(self, total, start, count, column) -> None:
        """Writes the first `count` of a warpgroup's rows, the first of them at `start`."""
        plan, number = self.plan, 0
        for r, c, width in _chunks(plan.tiles.half, plan.width, LINE):
            rows = slice(r, r + CHUNK_ROWS)
            products = [
                total[rows, first + c : first + c + width]
                for first in range(0, plan.tiles.columns, plan.width)
            ]
            chunks = [product.astype(plan.dtype) for product in products] * plan.apart
            if plan.scaled:
                # What is kept is what it is made of, here and when it is made again.
                of = [chunk.astype(jnp.float32) for chunk in chunks] or products
                made = _swiglu(*of, self.scales[0], start + r)
                chunks = [*chunks, made.astype(plan.dtype)]
            for chunk, y in zip(chunks, self.ys, strict=True):
                tiled, flat = self.out[width]
                slot = _to_leave(chunk, tiled, number)
                number += 1
                _copy_rows(
                    flat.at[slot],
                    y.at[:, pl.ds(column + c, width)],
                    start + r,
                    jnp.clip(count - r, 0, CHUNK_ROWS),
                )
                plgpu.commit_smem_to_gmem_group()


def _chunks(rows: int, columns: int, width: int) -> list[tuple[int, int, int]]:
    """Where the pieces of a tile begin that are stored one after the other, and how wide
    they are.
    """
    return [
        (r, c, min(width, columns - c))
        for r in range(0, rows, CHUNK_ROWS)
        for c in range(0, columns, width)
    ]


def _to_leave(chunk, out, number: int):
    """Puts one of a tile's chunks in shared memory, where an earlier one has left it.
    Those of the tile before have had the time.
    """
    leaving = out.shape[1]
    if number == 0:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    elif number >= leaving:
        plgpu.wait_smem_to_gmem(leaving - 1, wait_read_only=True)
    slot = lax.axis_index("warpgroup"), number % leaving
    out[slot] = chunk
    plgpu.commit_smem()
    return slot


def _copy_rows(tile, y, start, count) -> None:
    """Copies the first `count` rows of a tile to rows from `start` on: at once, or in
    runs of powers of two, since the size of a copy is fixed when it is compiled.
    """
    tall = tile.shape[0]

    def copy(first, rows: int):
        here = y.at[pl.ds(start + first, rows)]
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(first, rows)], here, commit_group=False)

    @pl.when(count == tall)
    def _():
        copy(0, tall)

    @pl.when(count < tall)
    def _():
        run = tall // 2
        while run:
            pl.when((count & run) != 0)(
                functools.partial(copy, count & ~(2 * run - 1), run)
            )
            run //= 2


def _swiglu(gated, lifted, scales, start):
    """silu(gated) * lifted * the scales of rows from `start` on."""
    here = scales.at[pl.ds(start, gated.shape[0])]
    scale = plgpu.load(here, (), layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    silu = gated / (1 + jnp.exp(-gated))
    return silu * lifted * lax.broadcast_in_dim(scale, gated.shape, [0])


def weight_gradient(
    dy_MO: Float[Array, "M O"],
    x_MI: Float[Array, "M I"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
) -> Float[Array, "G O I"]:
    """dw[g] = sum of dy[m] outer x[m] over the rows of group g; zeros if it has none."""
    wanted = dy_MO.shape[1], x_MI.shape[1]
    dy_MO, x_MI = _padded(dy_MO, ALIGN, LINE), _padded(x_MI, ALIGN, LINE)
    outer, inner, groups = dy_MO.shape[1], x_MI.shape[1], sizes_G.shape[0]
    tiles = tiles or weight_tiles(outer, inner)
    stages, leaving, chunk = (
        tiles.stages,
        tiles.leaving,
        128 // jnp.dtype(dtype).itemsize,
    )

    def kernel(*refs):
        def scope(*buffers):
            block = _Weights(tiles, refs, *buffers)
            _run(block, groups * block.tiles_each)

        pl.run_scoped(
            scope,
            _smem((stages, LINE, tiles.rows), dy_MO.dtype),
            _smem((stages, LINE, tiles.columns), x_MI.dtype),
            _smem((2, leaving, CHUNK_ROWS, chunk), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="warpgroup",
        )

    out = jax.ShapeDtypeStruct((groups, outer, inner), dtype)
    dw_GOI = _call(kernel, [out], *by_size(sizes_G), dy_MO, x_MI)[0]
    return dw_GOI[:, : wanted[0], : wanted[1]]


class _Weights:
    """One block of the kernel of weights: rows of its tiles are columns of dy, and what
    is summed over are rows of dy and x, LINE at a time, from the last before the group
    that a swizzled tile can start at.
    """

    def __init__(self, tiles: Tiles, refs, dy_in, x_in, out, full, free, masked):
        self.tiles = tiles
        self.groups = Groups(*refs[:-3])
        self.dy, self.x, self.dw = refs[-3:]
        self.dy_in, self.x_in, self.out, self.masked = dy_in, x_in, out, masked
        self.ring = _Ring(tiles.stages, full, free)
        groups, outer, inner = self.dw.shape
        self.last = groups - 1
        self.down, self.across = (
            pl.cdiv(outer, tiles.rows),
            pl.cdiv(inner, tiles.columns),
        )
        self.tiles_each = self.down * self.across

    def place(self, index):
        """Rank of the group, tile in its matrix, first row of the first step, and steps."""
        rank = lax.div(index, self.tiles_each)
        down, across = walk(
            index - rank * self.tiles_each, self.down, self.across, self.tiles.band
        )
        begin, end = self.groups.begin[rank], self.groups.end[rank]
        start = lax.div(begin, ALIGN) * ALIGN
        steps = lax.div(end - start + LINE - 1, LINE)
        steps = jnp.where(end > begin, steps, 0)
        o, i = down * self.tiles.rows, across * self.tiles.columns
        return rank, o, i, start, steps

    def copy_tile(self, index, step):
        _, o, i, start, steps = self.place(index)

        def load(number, step):
            slot = self.ring.to_fill(step)
            full = self.ring.full.at[slot]
            rows = pl.ds(pl.multiple_of(start + number * LINE, ALIGN), LINE)
            dy = self.dy.at[rows, pl.ds(o, self.tiles.rows)]
            x = self.x.at[rows, pl.ds(i, self.tiles.columns)]
            plgpu.copy_gmem_to_smem(dy, self.dy_in.at[slot], full)
            plgpu.copy_gmem_to_smem(x, self.x_in.at[slot], full)
            return step + 1

        return lax.fori_loop(0, steps, load, step)

    def multiply_tile(self, index, step):
        rank, o, i, start, steps = self.place(index)
        tiles, warpgroup = self.tiles, lax.axis_index("warpgroup")
        begin, end = self.groups.begin[rank], self.groups.end[rank]
        all_rows = self.groups.ends[self.last]
        mine = pl.ds(warpgroup * tiles.half, tiles.half)
        half_x = pl.ds(warpgroup * (tiles.columns // 2), tiles.columns // 2)

        def multiply(acc, number, slot):
            here = start + number * LINE
            dy = self.dy_in.at[slot, :, mine]

            @pl.when((begin > here) | (end < here + LINE))
            def _():
                _keep_rows(dy, begin - here, end - here)

            # Surplus rows may hold anything: infinity times 0 would not be 0.
            @pl.when(all_rows < here + LINE)
            def _():
                _keep_rows(self.x_in.at[slot, :, half_x], 0, all_rows - here)
                plgpu.barrier_arrive(self.masked)
                plgpu.barrier_wait(self.masked)

            plgpu.wgmma(acc, dy.T, self.x_in.at[slot])

        shape = tiles.half, tiles.columns
        total = self.ring.sum_up(multiply, steps, step, shape)
        self.store(total, self.groups.group[rank], o + warpgroup * tiles.half, i)
        return step + steps

    def store(self, total, group, o, i) -> None:
        width = self.out.shape[-1]
        for number, (r, c, _) in enumerate(_chunks(*total.shape, width)):
            chunk = total[r : r + CHUNK_ROWS, c : c + width]
            slot = _to_leave(chunk.astype(self.dw.dtype), self.out, number)
            here = pl.ds(o + r, CHUNK_ROWS), pl.ds(i + c, width)
            plgpu.copy_smem_to_gmem(self.out.at[slot], self.dw.at[(group, *here)])


def _keep_rows(tile, first, last) -> None:
    """Zeros in all rows but `first` to `last`."""
    index = plgpu.broadcasted_iota(jnp.int32, tile.shape, 0, layout=plgpu.Layout.WGMMA)
    values = tile[...]
    mine = (index >= first) & (index < last)
    tile[...] = jnp.where(mine, values, jnp.zeros_like(values))
    plgpu.commit_smem()
