"""The Hopper kernel of products of rows with their group's matrices, or the transposes.

Letters: M rows, I inner, O outer, G groups.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.grouped_matmul.items_gpu import (
    Grid,
    Items,
    Table,
    schedule_items,
)
from pallas_kernels.grouped_matmul.layers import Matrices, OfLayer, apart
from pallas_kernels.grouped_matmul.ring_gpu import (
    ALIGN,
    CHUNK_ROWS,
    BackAndForth,
    Block,
    Ring,
    back_and_forth,
    call,
    chunks,
    clusters,
    padded,
    run,
    smem,
    smem_of_any_row,
    to_be_free,
    to_leave,
)
from pallas_kernels.grouped_matmul.tiles_gpu import (
    LINE,
    Schedule,
    Tiles,
    place,
    place_by_group,
    row_tiles,
    schedule,
    tile_count,
    walk,
)
from pallas_kernels.mosaic import copy_rows, load


def _lying(w: Matrices) -> tuple[Array, Array]:
    """Matrices one after the other, and which of them is the first group's: of a layer
    among all layers no copy is made.
    """
    whole = all(size % LINE == 0 and size > LINE for size in w.shape[1:])
    if isinstance(w, OfLayer) and whole:
        first = w.layer.astype(jnp.int32) * w.shape[0]
        return w.stack_YGNK.reshape(-1, *w.shape[1:]), first[None]
    return padded(apart(w), LINE, LINE), jnp.zeros(1, jnp.int32)


@dataclasses.dataclass(frozen=True)
class _RowsPlan:
    """What a kernel of rows is to do."""

    tiles: Tiles
    turned: bool
    lhs: int  # how many
    matrices: int
    scaled: bool  # makes SwiGLU
    products: bool  # makes the products themselves
    M: int
    inner: int
    outer: int
    groups: int
    dtype: DTypeLike

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
        """Tiles in a row of them."""
        return pl.cdiv(self.outer, self.width)

    @property
    def steps(self) -> int:
        """Buffers of the ring that one matrix takes."""
        return pl.cdiv(self.inner, LINE)

    @property
    def copies(self) -> int:
        """Into one buffer of the ring."""
        return self.tiles.blocks + self.parts

    @property
    def outputs(self) -> int:
        """Arrays that are written."""
        return self.parts * self.products + self.scaled

    @property
    def made(self) -> int:
        """Columns of what is made of a tile: see `_Products.made`."""
        return self.tiles.columns if self.products else self.width

    @property
    def grid(self) -> Grid:
        """Of items."""
        tiles = self.tiles
        sizes = self.M, self.groups, tiles.half, self.across, tiles.band
        return Grid(*sizes, clusters(tiles.blocks))

    def schedule(self, sizes_G: Int[Array, " G"]) -> Schedule | Table:
        """Whose rows are which."""
        if self.tiles.items:
            return schedule_items(sizes_G, self.grid)
        return schedule(sizes_G, self.M, self.tiles.all_rows)


class _Place(NamedTuple):
    """Where a tile lies, of a block: of an item's two columns, its own."""

    group: Int[Array, ""]
    start: Int[Array, ""]  # the first row
    count: Int[Array, ""]  # rows of the group's from there on
    column: Int[Array, ""]  # the first
    steps: Int[Array, ""]  # how often to multiply with each matrix
    wide: Bool[Array, ""] | bool  # the blocks share rows, not a matrix


class _Part(NamedTuple):
    """What of a tile is a warpgroup's."""

    start: Int[Array, ""]  # its first row
    count: Int[Array, ""]  # rows from there on that are the group's
    column: Int[Array, ""]  # the first
    steps: Int[Array, ""]  # how often to multiply


def multiply_rows(
    xs: Sequence[Float[Array, "M I"]],
    ws: Sequence[Matrices],
    sizes_G: Int[Array, " G"],
    *,
    turned: bool,
    scale_M: Float[Array, " M"] | None = None,
    products: bool = True,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "M O"], ...]:
    """Sum over i of xs[i] times ws[i][g], [O, I] if `turned` else [I, O]. Of a single x
    with two w the two `products`, and SwiGLU of them if there is a scale. Rows of no
    group give zeros. bfloat16, summed in float32.
    """
    wanted, groups = (xs[0].shape[0], ws[0].shape[1 if turned else 2]), sizes_G.shape[0]
    xs = [padded(x, ALIGN, LINE) for x in xs]
    ws, firsts = zip(*map(_lying, ws))
    (M, inner), (_, *matrix) = xs[0].shape, ws[0].shape
    outer = matrix[0 if turned else 1]
    parts = len(ws) // len(xs)
    tiles = tiles or row_tiles(M, groups, outer, inner, turned=turned, parts=parts)
    scaled, dtype = scale_M is not None, xs[0].dtype
    plan = _RowsPlan(
        *(tiles, turned, len(xs), len(ws), scaled, products),
        *(M, inner, outer, groups, dtype),
    )
    scales = ()
    if scaled:  # a tile may end after the last row
        more = M - scale_M.shape[0] + tiles.all_rows
        scales = (jnp.pad(scale_M.astype(jnp.float32), (0, more)),)
    out = jax.ShapeDtypeStruct((M, outer), dtype)

    def kernel(*refs):
        def scope(*buffers):
            run(_Products(plan, refs, *buffers), tiles.blocks)

        lines = (tiles.stages, tiles.columns, LINE)
        if not turned:
            lines = (tiles.stages, LINE, tiles.columns)
        pl.run_scoped(
            scope,
            smem_of_any_row((tiles.stages, tiles.rows), dtype, LINE),
            smem(lines, dtype),
            smem_of_any_row((2, tiles.leaving, CHUNK_ROWS), dtype, LINE, LINE // 2),
            plgpu.Barrier(num_arrivals=plan.copies, num_barriers=tiles.stages),
            to_be_free(tiles.stages, pair=tiles.pair),
            collective_axes="warpgroup",
        )

    operands = (*plan.schedule(sizes_G), firsts[0], *xs, *ws, *scales)
    outputs = call(kernel, [out] * plan.outputs, *operands, blocks=tiles.blocks)
    return tuple(y[: wanted[0], : wanted[1]] for y in outputs)


class _Rows(Block):
    """One block of a kernel of rows, but for what it makes of a tile's sums."""

    def __init__(self, plan: _RowsPlan, refs, x_in, w_in, out, full, free):
        self.plan = plan
        table = Table if plan.tiles.items else Schedule
        fields = len(table._fields)
        self.schedule = table(*refs[:fields])
        self.order = self.make_order()
        self.first_matrix = refs[fields]
        refs, self.ys = refs[fields + 1 : -plan.outputs], refs[-plan.outputs :]
        self.xs, refs = refs[: plan.lhs], refs[plan.lhs :]
        self.ws, self.scales = refs[: plan.matrices], refs[plan.matrices :]
        self.x_in, self.x_landing = x_in
        self.w_in = w_in
        narrow = [view.at[:, :, :CHUNK_ROWS] for view in out[2:]]
        self.out = {LINE: out[:2], LINE // 2: narrow}
        self.ring = Ring(plan.tiles.stages, full, free)

    def make_order(self) -> BackAndForth | Items:
        """The order of tiles."""
        plan, tiles = self.plan, self.plan.tiles
        if tiles.items:
            return Items(self.schedule, plan.grid, lax.axis_index("cluster"))
        self.down = tile_count(self.schedule, plan.M, tiles.all_rows)
        return back_and_forth(self.down * plan.across, tiles.blocks)

    def place(self, wave) -> _Place:
        """Where a wave's tile lies; after the last one, any. Surplus rows are never
        multiplied, and so get zeros.
        """
        plan, tiles, wide = self.plan, self.plan.tiles, False
        index = self.order.number(wave)
        if tiles.items:
            group, (start, count, column, wide, *_) = self.order.item(index)
            column = column + jnp.where(wide, lax.axis_index("pair"), 0)
        elif tiles.by_group:
            group, start, count, column = place_by_group(
                self.schedule, index, plan.across, tiles.all_rows, tiles.band
            )
        else:
            number, column = walk(index, self.down, plan.across, tiles.band)
            group, start, count = place(self.schedule, number, tiles.all_rows)
        steps = jnp.where(group < plan.groups, plan.steps, 0)
        return _Place(group, start, count, column * plan.width, steps, wide)

    def above(self, warpgroup, wide):
        """Rows of a tile before those of a warpgroup. The blocks of a pair take turns, so
        that they have the same to do if the tile is not full.
        """
        tiles, number = self.plan.tiles, warpgroup
        if tiles.pair:
            number = 2 * warpgroup + lax.axis_index("pair")
        if tiles.items:
            number = jnp.where(wide, warpgroup, number)
        return number * tiles.half

    def copy_tile(self, wave, step):
        """Copies in what a tile needs; returns the step after."""
        plan = self.plan
        group, start, count, column, steps, wide = self.place(wave)
        columns, matrix = pl.ds(column, plan.width), group + self.first_matrix[0]

        def load(x, ws, wide, number, step):
            slot = self.ring.to_fill(step)
            full = self.ring.full.at[slot]
            inner = pl.ds(number * LINE, LINE)
            self.copy_rows(x.at[:, inner], start, count, wide, slot)
            for part, w in enumerate(ws):
                here = pl.ds(part * plan.width, plan.width)
                there = (columns, inner) if plan.turned else (inner, columns)
                here = (here,) if plan.turned else (slice(None), here)
                plgpu.copy_gmem_to_smem(
                    w.at[(matrix, *there)],
                    self.w_in.at[(slot, *here)],
                    full,
                    collective_axes="pair" if plan.tiles.pair and not wide else None,
                )
            return step + 1

        # What is shared is part of a copy's code: of items, one loop of two has no steps.
        ways = [(wide, steps)]
        if plan.tiles.items:
            ways = [(way, jnp.where(wide == way, steps, 0)) for way in (False, True)]
        for number, x in enumerate(self.xs):
            ws = self.ws[number * plan.parts : (number + 1) * plan.parts]
            for way, times in ways:
                one = functools.partial(load, x, ws, way)
                step = lax.fori_loop(0, times, one, step)
        return step

    def copy_rows(self, x, start, count, wide: bool, slot) -> None:
        """Copies in a block's rows of a tile; of a pair's, no half without any."""
        full, tiles = self.ring.full.at[slot], self.plan.tiles
        if not tiles.pair:
            rows = pl.ds(start, tiles.rows)
            plgpu.copy_gmem_to_smem(x.at[rows], self.x_landing.at[slot], full)
            return
        for warpgroup in range(2):
            above = self.above(warpgroup, wide)

            @pl.when(count > above)
            def _(warpgroup=warpgroup, above=above):
                rows = pl.ds(start + above, tiles.half)
                half = pl.ds(warpgroup * tiles.half, tiles.half)
                plgpu.copy_gmem_to_smem(
                    x.at[rows],
                    self.x_landing.at[slot, half],
                    full,
                    collective_axes="pair" if wide else None,
                )

            @pl.when(count <= above)
            def _():
                plgpu.barrier_arrive(full)

    def part(self, wave) -> _Part:
        """What of a wave's tile is this warpgroup's."""
        plan, half = self.plan, self.plan.tiles.half
        _, start, count, column, steps, wide = self.place(wave)
        above = self.above(lax.axis_index("warpgroup"), wide)
        count = jnp.clip(count - above, 0, half)
        return _Part(start + above, count, column, steps * plan.lhs)

    def multiply(self, acc, _, slot) -> None:
        """Adds the products of what lies in a buffer."""
        w, half = self.w_in.at[slot], self.plan.tiles.half
        mine = pl.ds(lax.axis_index("warpgroup") * half, half)
        plgpu.wgmma(acc, self.x_in.at[slot, mine], w.T if self.plan.turned else w)


class _Products(_Rows):
    """One block of the kernel of products.

    What is made of a tile, half the size of its sums, stays in registers and is stored
    under the next tile's first products, which would have to wait for it otherwise.
    """

    def begin(self):
        none = _Part(*[jnp.int32(0)] * 4)
        return jnp.int32(0), self.part(0), none, self.nothing()

    def nothing(self) -> Array:
        """What is made of no products."""
        zeros = jnp.zeros((self.plan.tiles.half, self.plan.made), self.plan.dtype)
        return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def multiply_tile(self, wave, state):
        """Makes a tile of what is copied in. Under its first products, stores the one
        before and finds out where the next one lies.
        """
        step, part, *before = state
        meanwhile = [*self.stores(*before), lambda: self.part(wave + 1)]

        def products():
            total, (*_, following) = self.ring.sum_up(
                *(self.multiply, part.steps, step),
                shape=(self.plan.tiles.half, self.plan.tiles.columns),
                meanwhile=meanwhile,
                least=self.plan.steps * self.plan.lhs,
            )
            return following, self.made(total, part.start)

        def zeros():
            *_, following = [work() for work in meanwhile]
            self.ring.skip(part.steps, step)
            return following, self.nothing()

        busy = (part.count > 0) & (part.steps > 0)
        following, made = lax.cond(busy, products, zeros)
        return step + part.steps, following, part, made

    def end(self, state) -> None:
        _, _, *last = state
        for store in self.stores(*last):
            store()

    def made(self, total, start) -> Array:
        """Of a warpgroup's sums: products, rounded, or SwiGLU of what is not."""
        if self.plan.products:
            return total.astype(self.plan.dtype)
        width = self.plan.width
        h = _swiglu(total[:, :width], total[:, width:], self.scales[0], start)
        return h.astype(self.plan.dtype)

    def stores(self, part: _Part, made: Array) -> list[Callable]:
        """What to do to store a part of a tile, a few columns of all outputs at a time."""
        plan = self.plan
        # SwiGLU takes registers, beside those of two tiles.
        width = LINE // 2 if plan.scaled and plan.products else LINE
        places = chunks(plan.tiles.half, plan.width, width)
        store = functools.partial(self.store, part, made)
        return [
            functools.partial(store, number * plan.outputs, *place)
            for number, place in enumerate(places)
        ]

    def store(self, part: _Part, made: Array, number: int, r, c, width) -> None:
        """Writes a chunk of every output, the first of which is a tile's `number`th."""
        plan, rows = self.plan, slice(r, r + CHUNK_ROWS)
        made = [
            made[rows, first + c : first + c + width]
            for first in range(0, plan.made, plan.width)
        ]
        if plan.scaled and plan.products:
            # What is kept is what it is made of, here and when it is made again.
            of = [chunk.astype(jnp.float32) for chunk in made]
            h = _swiglu(*of, self.scales[0], part.start + r)
            made.append(h.astype(plan.dtype))
        for chunk, y in zip(made, self.ys, strict=True):
            tiled, flat = self.out[width]
            slot = to_leave(chunk, tiled, number)
            number += 1
            copy_rows(
                flat.at[slot],
                y.at[:, pl.ds(part.column + c, width)],
                part.start + r,
                jnp.clip(part.count - r, 0, CHUNK_ROWS),
            )
            plgpu.commit_smem_to_gmem_group()


def _swiglu(gated, lifted, scales, start):
    """silu(gated) * lifted * the scales of rows from `start` on."""
    here = scales.at[pl.ds(start, gated.shape[0])]
    scale = load(here, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    # The approximate reciprocal square root is quick and right to float32's last bits;
    # a quotient would take as long as all the rest.
    silu = gated * lax.rsqrt(1 + jnp.exp(-gated)) ** 2
    return silu * lifted * lax.broadcast_in_dim(scale, gated.shape, [0])
