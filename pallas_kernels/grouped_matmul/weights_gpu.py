"""The Hopper kernel of gradients by weights: outer products, summed over a group's rows.

Letters: M rows, I inner, O outer, G groups.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.outer_gpu import SLICE, add_slices, keep_rows
from pallas_kernels.grouped_matmul.ring_gpu import (
    ALIGN,
    CHUNK_ROWS,
    Block,
    Ring,
    back_and_forth,
    call,
    chunks,
    padded,
    run,
    smem,
    to_be_free,
    to_leave,
)
from pallas_kernels.grouped_matmul.tiles_gpu import (
    LINE,
    Groups,
    Tiles,
    by_size,
    walk,
    weight_tiles,
)


def weight_gradients(
    dys_MO: Sequence[Float[Array, "M O"]],
    x_MI: Float[Array, "M I"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
) -> list[Float[Array, "G O I"]]:
    """dw[g] = sum of dy[m] outer x[m] over the rows of group g, for one dy or two; zeros
    if it has none.
    """
    wanted = dys_MO[0].shape[1], x_MI.shape[1]
    x_MI, *dys_MO = (padded(a, ALIGN, LINE) for a in (x_MI, *dys_MO))
    outer, inner, groups = dys_MO[0].shape[1], x_MI.shape[1], sizes_G.shape[0]
    two = len(dys_MO) == 2
    tiles = tiles or weight_tiles(x_MI.shape[0], groups, outer, inner, two=two)
    stages, leaving = tiles.stages, tiles.leaving
    chunk = 128 // jnp.dtype(dtype).itemsize

    def kernel(*refs):
        def scope(*buffers):
            block = _Weights(tiles, refs, *buffers)
            run(block, tiles.blocks)

        pl.run_scoped(
            scope,
            smem((stages, LINE, tiles.rows), x_MI.dtype),
            smem((stages, LINE, tiles.columns), x_MI.dtype),
            smem((2, leaving, CHUNK_ROWS, chunk), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            to_be_free(stages, pair=tiles.pair),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="warpgroup",
        )

    out = jax.ShapeDtypeStruct((groups, outer, inner), dtype)
    operands = (*by_size(sizes_G), x_MI, *dys_MO)
    made = call(kernel, [out] * len(dys_MO), *operands, blocks=tiles.blocks)
    return [dw_GOI[:, : wanted[0], : wanted[1]] for dw_GOI in made]


class _Place(NamedTuple):
    """Where a tile lies, of a block."""

    group: Int[Array, ""]
    begin: Int[Array, ""]  # the group's first row
    end: Int[Array, ""]  # and the row after its last
    o: Int[Array, ""]  # the first row of the matrix
    i: Int[Array, ""]  # and the first column

    @property
    def start(self) -> Int[Array, ""]:
        """The first row of the first step."""
        return lax.div(self.begin, ALIGN) * ALIGN

    @property
    def steps(self) -> Int[Array, ""]:
        """How many there are, of LINE rows."""
        steps = lax.div(self.end - self.start + LINE - 1, LINE)
        return jnp.where(self.end > self.begin, steps, 0)


class _Weights(Block):
    """One block of the kernel of weights: rows of its tiles are columns of dy, and what
    is summed over are rows of dy and x, LINE at a time, from the last before the group
    that a swizzled tile can start at.

    Two blocks that share x have rows one below the other; of two dy, each has its own.

    What is made of a tile is stored under the next one's first products, if it takes half
    as many registers as its sums do. (In float32 as many: it is stored at once.)
    """

    def __init__(self, tiles: Tiles, refs, dy_in, x_in, out, full, free, masked):
        self.tiles = tiles
        fields = len(Groups._fields)
        self.groups = Groups(*refs[:fields])
        self.x, *refs = refs[fields:]
        self.dys, self.dws = refs[: len(refs) // 2], refs[len(refs) // 2 :]
        self.apart = len(self.dys) == 2
        self.dy_in, self.x_in, self.out, self.masked = dy_in, x_in, out, masked
        self.ring = Ring(tiles.stages, full, free)
        groups, outer, inner = self.dws[0].shape
        self.last = groups - 1
        self.down = pl.cdiv(outer, tiles.rows if self.apart else tiles.all_rows)
        self.across = pl.cdiv(inner, tiles.columns)
        self.tiles_each = self.down * self.across
        self.order = back_and_forth(groups * self.tiles_each, tiles.blocks)
        self.dtype = self.dws[0].dtype
        self.later = self.dtype != jnp.float32

    def place(self, wave) -> _Place:
        """Where a wave's tile lies; after the last one, any."""
        index = self.order.number(wave)
        rank = lax.div(index, self.tiles_each)
        down, across = walk(
            index - rank * self.tiles_each, self.down, self.across, self.tiles.band
        )
        if self.tiles.pair and not self.apart:
            down = self.tiles.blocks * down + lax.axis_index("pair")
        group, begin, end = (a[rank] for a in self.groups[:3])
        here = down * self.tiles.rows, across * self.tiles.columns
        return _Place(group, begin, end, *here)

    def own(self, act: Callable, refs: Sequence) -> None:
        """Calls `act` with the one that is this block's."""
        if not self.apart:
            act(refs[0])
            return
        for number, ref in enumerate(refs):
            pl.when(lax.axis_index("pair") == number)(functools.partial(act, ref))

    def copy_tile(self, wave, step):
        """Copies in what a tile needs; returns the step after."""
        here = self.place(wave)
        start = here.start

        def load(number, step):
            slot = self.ring.to_fill(step)
            full = self.ring.full.at[slot]
            rows = pl.ds(pl.multiple_of(start + number * LINE, ALIGN), LINE)

            def copy_dy(dy):
                part = dy.at[rows, pl.ds(here.o, self.tiles.rows)]
                plgpu.copy_gmem_to_smem(part, self.dy_in.at[slot], full)

            self.own(copy_dy, self.dys)
            x = self.x.at[rows, pl.ds(here.i, self.tiles.columns)]
            axis = "pair" if self.tiles.pair else None
            plgpu.copy_gmem_to_smem(x, self.x_in.at[slot], full, collective_axes=axis)
            return step + 1

        return lax.fori_loop(0, here.steps, load, step)

    def begin(self):
        here, tiles = self.place(0), self.tiles
        state = jnp.int32(0), here
        if not self.later:
            return state
        nothing = jnp.zeros((tiles.half, tiles.columns), self.dtype)
        return *state, here, plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)

    def multiply_tile(self, wave, state):
        """Makes a tile of what is copied in. Under its first products, stores the one
        before and finds out where the next one lies.
        """
        step, place, *before = state
        tiles, warpgroup = self.tiles, lax.axis_index("warpgroup")
        begin, end, start, steps = place.begin, place.end, place.start, place.steps
        all_rows = self.groups.ends[self.last]
        mine = pl.ds(warpgroup * tiles.half, tiles.half)
        half_x = pl.ds(warpgroup * (tiles.columns // 2), tiles.columns // 2)

        def prepare(number, slot):
            """Zeros where rows are others'."""
            here = start + number * LINE
            dy = self.dy_in.at[slot, :, mine]

            @pl.when((begin > here) | (end < here + LINE))
            def _():
                keep_rows(dy, begin - here, end - here, columns=tiles.rows)

            # Surplus rows may hold anything: infinity times 0 would not be 0.
            @pl.when(all_rows < here + LINE)
            def _():
                x, none = self.x_in.at[slot, :, half_x], jnp.int32(0)
                keep_rows(x, none, all_rows - here, columns=tiles.columns)
                plgpu.barrier_arrive(self.masked)
                plgpu.barrier_wait(self.masked)

        def multiply(acc, number, slot):
            prepare(number, slot)
            dy = self.dy_in.at[slot, :, mine]
            plgpu.wgmma(acc, dy.T, self.x_in.at[slot])

        # The last step's rows may fill no more than three slices.
        slices = lax.div(end - start - (steps - 1) * LINE + SLICE - 1, SLICE)
        slices = jnp.where((steps > 0) & (slices < LINE // SLICE), slices, 0)
        whole = steps - (slices > 0)
        stores = self.stores(*before, there=wave > 0) if self.later else []
        meanwhile = [*stores, lambda: self.place(wave + 1)]
        shape = tiles.half, tiles.columns
        total, found = self.ring.sum_up(multiply, whole, step, shape, meanwhile)
        following = found[-1]
        slot = self.ring.slot(step + whole)

        @pl.when(slices > 0)
        def _():
            self.ring.filled(step + whole)
            prepare(whole, slot)

        total = add_slices(
            *(total, self.dy_in.at[slot, :, mine], self.x_in.at[slot], slices),
            dy_columns=tiles.rows,
            x_columns=tiles.columns,
        )
        pl.when(slices > 0)(lambda: self.ring.release(step + whole))
        if self.later:
            return step + steps, following, place, total.astype(self.dtype)
        for store in self.stores(place, total):
            store()
        return step + steps, following

    def end(self, state) -> None:
        if self.later:
            _, _, *last = state
            for store in self.stores(*last, there=self.order.count > 0):
                store()

    def stores(self, place: _Place, made: Array, there=True) -> list[Callable]:
        """What to do to store a warpgroup's part of a tile, if it is `there`."""
        store = functools.partial(self.store, place, made, there)
        places = chunks(*made.shape, self.out.shape[-1])
        return [functools.partial(store, *each) for each in enumerate(places)]

    def store(self, place: _Place, made: Array, there, number: int, chunk) -> None:
        """Writes a chunk, the tile's `number`th."""
        r, c, width = chunk
        piece = made[r : r + CHUNK_ROWS, c : c + width]
        slot = to_leave(piece.astype(self.dtype), self.out, number)
        o = place.o + lax.axis_index("warpgroup") * self.tiles.half + r
        here = place.group, pl.ds(o, CHUNK_ROWS), pl.ds(place.i + c, width)

        def leave(dw):
            plgpu.copy_smem_to_gmem(self.out.at[slot], dw.at[here])

        pl.when(there)(lambda: self.own(leave, self.dws))
