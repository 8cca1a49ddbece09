"""Block-scaled FP8 products for Hopper GPUs, in Pallas Mosaic GPU.

One kernel, dense and grouped. A block of the grid stays and takes one tile of the output
after the other: one warpgroup copies to a ring of buffers in shared memory, across the
end of a tile, and two multiply, 64 rows each. Every 128 of the inner axis the tensor
cores start from zero; what they give, 128 columns at a time, is scaled and added to a
float32 sum in registers, by one warpgroup while the other's products run.

Letters: M rows, K inner, N outer, G groups.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

SMS = 132  # of an H100 or H200
BLOCK = 128  # of a scale, either way; also bytes of a swizzled row
BAND = 8  # columns of tiles that are walked together
SWIZZLE = plgpu.SwizzleTransform(128)
TILED = (plgpu.TilingTransform((8, BLOCK)), SWIZZLE)
ROWS = plgpu.Layout.WGMMA.reduce(1)


class Tiles(NamedTuple):
    """Sizes of a tile and how many steps of copies are in flight."""

    columns: int = 256
    stages: int = 4
    cluster: int = 1  # blocks that share what they read of w
    rows: int = 128


class Schedule(NamedTuple):
    """Of every tile of rows: its group, first row, and how many rows are the group's."""

    group: Array
    start: Array
    count: Array
    tiles: Array  # [1]: how many there are


def _schedule(sizes: Array, rows: int, tall: int) -> Schedule:
    """Tiles in the order of rows; those of the surplus, group G, come last."""
    groups = sizes.shape[0]
    index = jnp.arange(groups)
    sizes = sizes.astype(jnp.int32)
    before = index[:, None] >= index
    ends = jnp.where(before, sizes, 0).sum(1)
    tile_ends = jnp.where(before, -(-sizes // tall), 0).sum(1)
    number = jnp.arange(rows // tall + groups + 1)[:, None]
    past = tile_ends <= number
    group = past.sum(1)
    first = jnp.where(past, tile_ends, 0).max(1)
    begin = jnp.where(past, ends, 0).max(1)
    end = jnp.where(past, rows, ends).min(1)
    start = begin + (number[:, 0] - first) * tall
    count = jnp.clip(end - start, 0, tall)
    tiles = tile_ends[-1:] - (-(rows - ends[-1]) // tall)
    return Schedule(*(a.astype(jnp.int32) for a in (group, start, count, tiles)))


def product(x, sx, w, sw, sizes, *, dtype, tiles: Tiles = Tiles()) -> Array:
    """Row m of group g is sum over k of x[m, k] sx[m, k/128] w[g, n, k] sw[g, n/128, k/128]."""
    (M, K), (G, N, _) = x.shape, w.shape
    parts, steps = tiles.columns // BLOCK, pl.cdiv(K, BLOCK)
    across = pl.cdiv(N, tiles.columns)
    stages, blocks = tiles.stages, SMS // tiles.cluster
    schedule = _schedule(sizes, M, tiles.rows * tiles.cluster)
    shared = "cluster" if tiles.cluster > 1 else None
    chunk = 128 // jnp.dtype(dtype).itemsize
    sx = jnp.pad(sx, ((0, tiles.rows * tiles.cluster), (0, 0)))
    bands_n = sw.shape[1]

    def kernel(
        group_ref, start_ref, count_ref, tiles_ref, x_ref, sx_ref, w_ref, sw_ref, y_ref
    ):
        def scope(x_views, w_in, out_views, full, more, free):
            (x_in, x_landing), (out, out_leaving) = x_views, out_views
            warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("sm")
            member = lax.axis_index("cluster") if shared else 0
            rows_of_tiles = tiles_ref[0]
            mine = lax.div(rows_of_tiles * across - block + blocks - 1, blocks)

            def place(i):
                index, column = _walk(block + i * blocks, rows_of_tiles, across)
                group = group_ref[index]
                above = member * tiles.rows
                return (
                    group,
                    start_ref[index] + above,
                    jnp.clip(count_ref[index] - above, 0, tiles.rows),
                    column * tiles.columns,
                    jnp.where(group < G, steps, 0),
                )

            def copy_tile(i, step):
                group, start, _, column, todo = place(i)

                def load(k, step):
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    k = pl.ds(k * BLOCK, BLOCK)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(start, tiles.rows), k],
                        x_landing.at[slot],
                        full.at[slot],
                    )
                    for p in range(parts):
                        plgpu.copy_gmem_to_smem(
                            w_ref.at[group, pl.ds(column + p * BLOCK, BLOCK), k],
                            w_in.at[slot, pl.ds(p * BLOCK, BLOCK)],
                            (more if p else full).at[slot],
                            collective_axes=shared,
                        )
                    return step + 1

                return lax.fori_loop(0, todo, load, step)

            def multiply_tile(i, step):
                group, start, count, column, todo = place(i)
                above = warpgroup * 64
                first = lax.div(column, BLOCK)

                def scales(k):
                    k = jnp.minimum(k, steps - 1)
                    here = pl.ds(start + above, 64)
                    rows = plgpu.load(
                        sx_ref.at[here, k], (), layout=ROWS, optimized=False
                    )
                    at = jnp.minimum(group, G - 1)
                    return rows, [
                        sw_ref[at, jnp.minimum(first + p, bands_n - 1), k]
                        for p in range(parts)
                    ]

                def add(k, carry):
                    step, sums, (x_scale, w_scales) = carry
                    slot = lax.rem(step, stages)
                    after = scales(k + 1)
                    plgpu.barrier_wait(full.at[slot])
                    x_tile, added = x_in.at[slot, pl.ds(above, 64)], []
                    for p in range(parts):
                        if p:
                            plgpu.barrier_wait(more.at[slot])

                        def multiply(
                            acc, w_tile=w_in.at[slot, pl.ds(p * BLOCK, BLOCK)]
                        ):
                            plgpu.wgmma(acc, x_tile, w_tile.T)
                            return acc[...]

                        part = pl.run_scoped(
                            multiply, plgpu.ACC((64, BLOCK), jnp.float32)
                        )
                        if p == parts - 1:
                            plgpu.barrier_arrive(free.at[slot])
                        scale = lax.broadcast_in_dim(
                            x_scale * w_scales[p], part.shape, [0]
                        )
                        added.append(sums[p] + part * scale)
                    return step + 1, added, after

                zeros = plgpu.layout_cast(
                    jnp.zeros((64, BLOCK), jnp.float32), plgpu.Layout.WGMMA
                )
                step, sums, _ = lax.fori_loop(
                    0, todo, add, (step, [zeros] * parts, scales(0))
                )
                store(sums, start + above, jnp.clip(count - above, 0, 64), column)
                return step

            def store(sums, start, count, column):
                for c in range(0, tiles.columns, chunk):
                    slot = c // chunk % 2
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    within = c % BLOCK
                    out[warpgroup, slot] = sums[c // BLOCK][
                        :, within : within + chunk
                    ].astype(dtype)
                    plgpu.commit_smem()
                    _store_rows(
                        out_leaving.at[warpgroup, slot],
                        y_ref.at[:, pl.ds(column + c, chunk)],
                        start,
                        count,
                    )
                    plgpu.commit_smem_to_gmem_group()

            @pl.when(warpgroup == 2)
            def _():
                plgpu.set_max_registers(24, action="decrease")
                last = lax.fori_loop(0, mine, copy_tile, 0)
                if shared:  # the others may still send to this block

                    @pl.loop(jnp.maximum(last - stages, 0), last)
                    def _(step):
                        plgpu.barrier_wait(free.at[lax.rem(step, stages)])

            @pl.when(warpgroup < 2)
            def _():
                plgpu.set_max_registers(240, action="increase")
                lax.fori_loop(0, mine, multiply_tile, 0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        free = (
            functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
            if shared
            else plgpu.Barrier
        )
        pl.run_scoped(
            scope,
            _two_views((stages, tiles.rows, BLOCK), x.dtype),
            plgpu.SMEM((stages, tiles.columns, BLOCK), w.dtype, transforms=TILED),
            _two_views((2, 2, 64, chunk), jnp.dtype(dtype)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            free(num_arrivals=2, num_barriers=stages),
            collective_axes="warpgroup",
        )

    in_cluster = (
        {"cluster": (tiles.cluster,), "cluster_names": ("cluster",)} if shared else {}
    )
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        **in_cluster,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*schedule, x, sx, w, sw)


def _two_views(shape, dtype):
    """One piece of shared memory, seen as matrix units do and as copies do. Both lie
    the same, but copies of the first must start at every eighth row of an array.
    """
    tiled = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(tiled, SWIZZLE)),
        plgpu.SMEM(shape, dtype, transforms=(SWIZZLE,)),
    )


def _store_rows(tile, y_ref, start, count) -> None:
    """Writes the first `count` rows of a tile from row `start` on, without waiting: as
    one copy, or in runs of powers of two, since a copy's size is fixed.
    """
    tall = tile.shape[0]

    @pl.when(count == tall)
    def _():
        plgpu.copy_smem_to_gmem(tile, y_ref.at[pl.ds(start, tall)], commit_group=False)

    @pl.when(count < tall)
    def _():
        run = tall // 2
        while run:
            done = count & ~(2 * run - 1)

            @pl.when((count & run) != 0)
            def _(run=run, done=done):
                plgpu.copy_smem_to_gmem(
                    tile.at[pl.ds(done, run)],
                    y_ref.at[pl.ds(start + done, run)],
                    commit_group=False,
                )

            run //= 2


def _walk(index, rows, across: int):
    """The tile at a place of the walk: BAND columns of tiles at a time, row by row."""
    if across <= BAND:
        return lax.div(index, across), lax.rem(index, across)
    band = lax.div(index, rows * BAND)
    index = index - band * rows * BAND
    width = jnp.minimum(BAND, across - band * BAND)
    return lax.div(index, width), band * BAND + lax.rem(index, width)


def lacks(x: Array, w: Array) -> str:
    """What keeps the kernel from these operands; empty where nothing does."""
    _, K = x.shape
    N = w.shape[-2]
    if N < BLOCK or K < BLOCK or N % 16 or K % 16:
        return "takes K and N of at least 128 that 16 divides"
    if jax.default_backend() == "gpu":
        capability = jax.devices()[0].compute_capability
        if not capability.startswith("9."):
            return "needs a GPU of Hopper's generation"
    return ""


def dense(x_MK, x_scale_Mk, w_NK, w_scale_nk, *, dtype):
    sizes = jnp.asarray([x_MK.shape[0]])
    return grouped(x_MK, x_scale_Mk, w_NK[None], w_scale_nk[None], sizes, dtype=dtype)


def grouped(x_MK, x_scale_Mk, w_GNK, w_scale_Gnk, sizes_G, *, dtype):
    rows = x_MK.shape[0]
    if rows < 128:
        x_MK, x_scale_Mk = (
            jnp.pad(a, ((0, 128 - rows), (0, 0))) for a in (x_MK, x_scale_Mk)
        )
    return product(x_MK, x_scale_Mk, w_GNK, w_scale_Gnk, sizes_G, dtype=dtype)[:rows]
