"""What the Hopper kernels of the grouped matmul are made of: blocks that stay, a ring of
buffers, tiles in shared memory.

A block of the grid stays for the whole run and makes one tile of the output after the
other. One warpgroup copies operands to a ring of buffers in shared memory and runs ahead,
over the ends of tiles; two multiply, each its half of a tile's rows, one step in flight
while the next is issued. Neither waits for the other, and what there is to do beside
products may be done under the next tile's.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul.tiles_gpu import LINE
from pallas_kernels.mosaic import SMS

ALIGN = 8  # rows of a swizzled tile
CHUNK_ROWS = 64  # rows that are stored at once
LEAST_ROWS = 256  # the tallest tile

Ref = Any


class Ring(NamedTuple):
    """Buffers that one warpgroup fills and two empty in turn. Steps count on from tile
    to tile.
    """

    stages: int
    full: Ref
    free: Ref

    def slot(self, step):
        """Where a step's operands lie."""
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
        """One warpgroup is done with a step's operands."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def sum_up(
        self,
        multiply: Callable,
        steps,
        step,
        shape: tuple[int, int],
        meanwhile: Sequence[Callable] = (),
        least: int = 0,
    ):
        """Runs `multiply(acc, number, slot)` for some steps, at `least` so many; returns
        what they added up to. A buffer is released when the products after its own are
        issued.

        `meanwhile` is called under the first products, one under each, or as many as
        `least` steps need; after the last, what then is left. What it returns is returned,
        too.
        """
        each = pl.cdiv(len(meanwhile), least) if least else 1

        def one(acc, number, step):
            multiply(acc, number, self.filled(step))
            plgpu.wgmma_wait(1)

            @pl.when(number > 0)
            def _():
                self.release(step - 1)

            return step + 1

        def run(acc):
            multiply_one = functools.partial(one, acc)
            number, end, found = 0, step, []
            for first in range(0, len(meanwhile), each):
                if number < least:
                    end = multiply_one(number, end)
                else:  # one or none
                    upto = jnp.minimum(steps, number + 1)
                    end = lax.fori_loop(number, upto, multiply_one, end)
                found += [work() for work in meanwhile[first : first + each]]
                number += 1
            end = lax.fori_loop(number, steps, multiply_one, end)
            total = acc[...]

            @pl.when(steps > 0)
            def _():
                self.release(end - 1)

            return total, found

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def drain(self, steps) -> None:
        """Waits until all buffers that were filled are empty."""

        def one(step, _):
            plgpu.barrier_wait(self.free.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.stages, 0), steps, one, None)

    def skip(self, steps, step) -> None:
        """Releases what is filled, unused."""

        def one(_, step):
            self.filled(step)
            self.release(step)
            return step + 1

        lax.fori_loop(0, steps, one, step)


class BackAndForth(NamedTuple):
    """The order of tiles: every cluster does one of each wave, the last of one wave the
    first of the next, since tiles get smaller.
    """

    tiles: Int[Array, ""] | int  # of all clusters
    clusters: int
    cluster: Int[Array, ""]

    @property
    def count(self) -> Int[Array, ""]:
        """Tiles of this cluster."""
        waves = lax.div(self.tiles, self.clusters)  # whole ones
        return waves + (self.unbounded(waves) < self.tiles).astype(jnp.int32)

    def number(self, wave) -> Int[Array, ""]:
        """Its tile of a wave, or the last one, if there are not as many."""
        return jnp.minimum(self.unbounded(wave), self.tiles - 1)

    def unbounded(self, wave) -> Int[Array, ""]:
        """Its tile of a wave, if there are as many."""
        turned = self.clusters - 1 - self.cluster
        here = jnp.where(lax.rem(wave, 2) == 0, self.cluster, turned)
        return wave * self.clusters + here


def clusters(blocks: int) -> int:
    """How many there are, of so many blocks each."""
    return SMS // blocks


def back_and_forth(tiles: Int[Array, ""] | int, blocks: int) -> BackAndForth:
    """Of so many tiles, of clusters of so many blocks."""
    return BackAndForth(tiles, clusters(blocks), lax.axis_index("cluster"))


class Order(Protocol):
    """Which tiles a block's cluster does."""

    @property
    def count(self) -> Int[Array, ""]:
        """How many waves it has one of."""

    def number(self, wave) -> Int[Array, ""]:
        """Which one of a wave; after the last one, any."""


class Block:
    """What one block of a kernel does, tile by tile: one of each wave of `order`."""

    ring: Ring
    order: Order

    def copy_tile(self, wave, step):
        """Copies in what a tile needs, from a step of the ring on; the step after."""
        raise NotImplementedError

    def begin(self):
        """What a warpgroup that multiplies knows before its first tile: the step."""
        return 0

    def multiply_tile(self, wave, state):
        """Makes a tile of what is copied in; what is known after it."""
        raise NotImplementedError

    def end(self, state) -> None:
        """What is left to do after the last tile."""


def run(block: Block, blocks: int = 1) -> None:
    """What the three warpgroups of a block do, if tiles are done by `blocks` at once."""
    warpgroup = lax.axis_index("warpgroup")

    def each(one_tile, state):
        return lax.fori_loop(0, block.order.count, one_tile, state)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        steps = each(block.copy_tile, 0)
        if blocks > 1:  # none may end while the other's signals are on their way
            block.ring.drain(steps)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        block.end(each(block.multiply_tile, block.begin()))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def call(kernel: Callable, outputs: list, *operands: Array, blocks: int = 1):
    """The outputs, of a kernel whose clusters have that many blocks."""
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(clusters(blocks),),
        grid_names=("cluster",),
        cluster=(blocks,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
            reduction_scratch_bytes=1024,  # what is not needed buffers could have
        ),
    )(*operands)


def to_be_free(buffers: int, *, pair: bool):
    """Barriers that say when buffers may be filled anew: both warpgroups are done with
    them; of two blocks that fill each other's, both blocks'.
    """
    if pair:
        return plgpu.ClusterBarrier(
            collective_axes=("pair",), num_arrivals=2, num_barriers=buffers
        )
    return plgpu.Barrier(num_arrivals=2, num_barriers=buffers)


def padded(a: Array, *multiples: int) -> Array:
    """With zeros up to multiples of these in its last axes; 2-dimensional ones with a
    tile's rows at least, and at least two lines wide: Mosaic drops the index of an axis
    that has one, so that what lies past the end is stored over what lies before it. No
    copy is made where it is so already.
    """
    least = (LEAST_ROWS if a.ndim == 2 else 2 * LINE, 2 * LINE)
    sizes = [
        max(pl.cdiv(size, multiple) * multiple, floor)
        for size, multiple, floor in zip(a.shape[-2:], multiples, least)
    ]
    more = [(0, new - old) for new, old in zip(sizes, a.shape[-2:])]
    if not any(after for _, after in more):
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + more)


def swizzled(dtype: DTypeLike, columns: int):
    """The transforms of a tile for matrix units; and those for copies to or from any
    row of an array. Either way the same bytes lie at the same places.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.SwizzleTransform(min(columns * itemsize, 128))
    tiling = plgpu.TilingTransform((ALIGN, swizzle.swizzle // itemsize))
    return (tiling, swizzle), (swizzle,)


def smem(shape: tuple[int, ...], dtype: DTypeLike):
    """Tiles that matrix units can read; rows are the last axis but one."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, shape[-1])[0])


def smem_of_any_row(shape: tuple[int, ...], dtype: DTypeLike, *widths: int):
    """Two views of the same memory for each width: tiled, whose copies must start at
    every eighth row of an array, and flat, which is a line wide and whose copies need
    not. Narrower views are higher: all are of the same bytes.
    """
    *batch, rows = shape
    views = [
        plgpu.SMEM((*batch, rows * LINE // width, width), dtype, transforms=transforms)
        for width in widths
        for transforms in swizzled(dtype, width)
    ]
    return plgpu.RefUnion(*views)


def chunks(rows: int, columns: int, width: int) -> list[tuple[int, int, int]]:
    """Where the pieces of a tile begin that are stored one after the other, and how wide
    they are.
    """
    return [
        (r, c, min(width, columns - c))
        for r in range(0, rows, CHUNK_ROWS)
        for c in range(0, columns, width)
    ]


def to_leave(chunk, out, number: int):
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
