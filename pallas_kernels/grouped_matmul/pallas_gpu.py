"""Grouped matmuls for Hopper GPUs, in Pallas Mosaic GPU.

Two kernels. `_rows_kernel` multiplies rows with their group's matrix, or its transpose:
the forward product and the gradient by rows. `_weights_kernel` sums outer products over
a group's rows: the gradient by weights. In both, one warpgroup copies tiles to shared
memory and two multiply them; blocks of the grid walk over the output's tiles in an order
that keeps what they share in the L2 cache.

A swizzled tile can start at every eighth row only: the first tile of a group starts at
the last such row before the group, and rows of other groups in it are left out. Tiles
past the end of an array read zeros and write nothing. A tile that is not all its group's
writes its rows in runs of powers of two, since the size of a copy is fixed when the
kernel is compiled.

Letters: M rows, K inner, N outer, G groups.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.layers import Matrices

SMS = 132  # of an H100 or H200
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ALIGN = 8  # rows of a swizzled tile
INNER = 64  # columns of a swizzled tile: 128 bytes


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles, and how many are in flight."""

    rows: int
    columns: int
    stages: int


def supports(x_MK: Array, w_GNK: Matrices) -> bool:
    """Whether the kernels take these operands: bfloat16, sizes that 128 divides."""
    _, N, K = w_GNK.shape
    fits = (
        x_MK.dtype == jnp.bfloat16 and N % 128 == K % 128 == 0 and x_MK.shape[0] >= 128
    )
    return fits and _is_hopper()


def _is_hopper() -> bool:
    """Whether the GPU at hand is of Hopper's generation; without one, what is compiled
    ahead of time for a GPU is taken to be.
    """
    if jax.default_backend() != "gpu":
        return True
    return jax.devices()[0].compute_capability.startswith("9.")


@jax.custom_vjp
def hopper(
    x_MK: Float[Array, "M K"], w_GNK: Float[Array, "G N K"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """x[m] @ w[group of m].T; see `pallas_kernels.grouped_matmul.api`."""
    return _zero_surplus(_rows_kernel(x_MK, w_GNK, sizes_G, turned=True), sizes_G)


def _forward(x_MK, w_GNK, sizes_G):
    return hopper(x_MK, w_GNK, sizes_G), (x_MK, w_GNK, sizes_G)


def _backward(saved, dy_MN):
    x_MK, w_GNK, sizes_G = saved
    dx_MK = _zero_surplus(_rows_kernel(dy_MN, w_GNK, sizes_G, turned=False), sizes_G)
    return dx_MK, _weights_kernel(dy_MN, x_MK, sizes_G), None


hopper.defvjp(_forward, _backward)


def _zero_surplus(y: Array, sizes: Array) -> Array:
    """Rows of no group were never written."""
    real = jnp.arange(y.shape[0]) < sizes.sum()
    return jnp.where(real[:, None], y, 0)


def _row_tiles(rows: int, groups: int, columns: int) -> Tiles:
    tall = 128 if rows >= 96 * groups else 64
    if -(-columns // 256) * 256 <= -(-columns // 128) * 128:
        return Tiles(tall, 256, 3)
    return Tiles(tall, 128, 4)


def _schedule(sizes: Array, rows: int, tile: int) -> tuple[Array, Array, Array, Array]:
    """(group, first row, and which of its rows are the group's: from, to) of every tile;
    tiles past the last have none.
    """
    groups, sizes = sizes.shape[0], sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    begins = ends - sizes
    aligned = begins // ALIGN * ALIGN
    tile_counts = jnp.where(sizes > 0, -((aligned - ends) // tile), 0)
    tile_ends = jnp.cumsum(tile_counts)
    most = -(-(rows + (ALIGN - 1) * groups) // tile) + groups
    tiles = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, tiles, side="right").astype(jnp.int32)
    group = jnp.minimum(group, groups - 1)
    number = tiles - (tile_ends - tile_counts)[group]
    start = aligned[group] + number * tile
    first = jnp.clip(begins[group] - start, 0, tile)
    last = jnp.clip(ends[group] - start, 0, tile)
    last = jnp.where(tiles < tile_ends[-1], last, first)
    return group, start // ALIGN, first, last


def _rows_kernel(x: Array, w: Array, sizes: Array, *, turned: bool) -> Array:
    """x [M, I] times w[g], [O, I] if `turned` else [I, O] -> [M, O]."""
    (M, inner), G = x.shape, w.shape[0]
    outer = w.shape[1 if turned else 2]
    tiles = _row_tiles(M, G, outer)
    half = tiles.columns // 2  # columns of one warpgroup
    schedule = _schedule(sizes, M, tiles.rows)
    grid = (schedule[0].shape[0], -(-outer // tiles.columns))

    def kernel(group_ref, start_ref, first_ref, last_ref, x_ref, w_ref, y_ref):
        pipeline = functools.partial(
            _pipeline,
            steps=-(-inner // INNER),
            shapes=((tiles.rows, INNER), _weight_tile(tiles, turned)),
            index_maps=(
                lambda i: (0, i),
                (lambda i: (0, i)) if turned else (lambda i: (i, 0)),
            ),
            stages=tiles.stages,
        )

        def scope(allocations, out):
            warpgroup = lax.axis_index("warpgroup")
            mine = pl.ds(warpgroup * half, half)

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
            def _(loop):
                tile, column = _snake(loop.index[0], grid)
                start = pl.multiple_of(start_ref[tile] * ALIGN, ALIGN)
                first, last = first_ref[tile], last_ref[tile]
                columns = pl.ds(column * tiles.columns, tiles.columns)
                matrix = w_ref.at[group_ref[tile]]

                def multiply(_, x_tile, w_tile, acc):
                    w_tile = w_tile.at[mine].T if turned else w_tile.at[:, mine]
                    plgpu.wgmma(acc, x_tile, w_tile)
                    plgpu.wgmma_wait(0)
                    return acc

                def compute(run):
                    def with_sum(acc):
                        run(acc)
                        here = pl.ds(column * tiles.columns + warpgroup * half, half)
                        y = acc[...].astype(x.dtype)
                        _store(y, out, y_ref.at[:, here], start, first, last)

                    pl.run_scoped(with_sum, plgpu.ACC((tiles.rows, half), jnp.float32))

                @pl.when(last > first)
                def _():
                    pipeline(multiply, compute)(
                        x_ref.at[pl.ds(start, tiles.rows)],
                        matrix.at[columns] if turned else matrix.at[:, columns],
                        allocations=allocations,
                    )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        _run(
            scope, pipeline, (x_ref, w_ref.at[0]), _out_tiles(tiles.rows, half, x.dtype)
        )

    return _call(kernel, (M, outer), x.dtype)(*schedule, x, w)


def _weight_tile(tiles: Tiles, turned: bool) -> tuple[int, int]:
    return (tiles.columns, INNER) if turned else (INNER, tiles.columns)


def _out_tiles(rows: int, columns: int, dtype):
    """The output tiles of both warpgroups, swizzled for whole tiles or plain for parts:
    the same memory.
    """
    shape = (2, rows, columns)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=TILED), plgpu.SMEM(shape, dtype)
    )


def _store(y, out, y_ref, start, first, last) -> None:
    """Writes rows `first` to `last` of a tile that starts at row `start`; waits until
    the tile before has left.
    """
    whole, parts = out
    tall, warpgroup = y.shape[0], lax.axis_index("warpgroup")
    count = last - first
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(count == tall)
    def _():
        whole[warpgroup] = y
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(whole.at[warpgroup], y_ref.at[pl.ds(start, tall)])

    @pl.when(count < tall)
    def _():
        parts[warpgroup] = y
        plgpu.commit_smem()
        run = tall // 2
        while run:
            done = first + lax.div(count, 2 * run) * (2 * run)

            @pl.when((count & run) != 0)
            def _(run=run, done=done):
                part = parts.at[warpgroup, pl.ds(done, run)]
                plgpu.copy_smem_to_gmem(part, y_ref.at[pl.ds(start + done, run)])

            run //= 2


def _weights_kernel(dy: Array, x: Array, sizes: Array) -> Array:
    """dw[g] = sum over the group's rows of dy outer x: [G, N, K]; 0 for empty groups."""
    (M, N), K, G = dy.shape, x.shape[1], sizes.shape[0]
    tiles = Tiles(64, 256 if -(-K // 256) * 256 <= -(-K // 128) * 128 else 128, 3)
    half = 64  # rows of the output, so columns of dy, of one warpgroup
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    begins = ends - sizes.astype(jnp.int32)
    grid = (-(-N // (2 * half)), -(-K // tiles.columns))

    def kernel(begin_ref, end_ref, dy_ref, x_ref, dw_ref):
        pipeline = functools.partial(
            _pipeline,
            shapes=((tiles.rows, 2 * half), (tiles.rows, tiles.columns)),
            index_maps=(lambda i: (i, 0), lambda i: (i, 0)),
            stages=tiles.stages,
        )

        def scope(allocations, out):
            warpgroup = lax.axis_index("warpgroup")
            mine = pl.ds(warpgroup * half, half)

            @plgpu.nd_loop((G, grid[0] * grid[1]), collective_axes="sm")
            def _(loop):
                group = loop.index[0]
                n, k = _snake(loop.index[1], grid)
                begin, end = begin_ref[group], end_ref[group]
                start = pl.multiple_of(lax.div(begin, ALIGN) * ALIGN, ALIGN)
                columns = pl.ds(k * tiles.columns, tiles.columns)

                def multiply(index, dy_tile, x_tile, acc):
                    here = start + index[0] * tiles.rows
                    _keep_rows(dy_tile.at[:, mine], begin - here, end - here)
                    plgpu.wgmma(acc, dy_tile.at[:, mine].T, x_tile)
                    plgpu.wgmma_wait(0)
                    return acc

                def compute(run):
                    def with_sum(acc):
                        run(acc)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out[warpgroup] = acc[...].astype(x.dtype)
                        plgpu.commit_smem()
                        here = pl.ds(n * 2 * half + warpgroup * half, half)
                        plgpu.copy_smem_to_gmem(
                            out.at[warpgroup], dw_ref.at[group, here, columns]
                        )

                    pl.run_scoped(
                        with_sum, plgpu.ACC((half, tiles.columns), jnp.float32)
                    )

                steps = lax.div(end - start + tiles.rows - 1, tiles.rows)
                pipeline(multiply, compute, steps=steps)(
                    dy_ref.at[pl.ds(start, M), pl.ds(n * 2 * half, 2 * half)],
                    x_ref.at[pl.ds(start, M), columns],
                    allocations=allocations,
                )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        out = plgpu.SMEM((2, half, tiles.columns), x.dtype, transforms=TILED)
        # Buffers for all stages: a pipeline of fewer steps would allocate fewer.
        pipeline = functools.partial(pipeline, steps=tiles.stages)
        _run(scope, pipeline, (dy_ref, x_ref), out)

    return _call(kernel, (G, N, K), x.dtype)(begins, ends, dy, x)


def _keep_rows(tile, first, last) -> None:
    """Zeros in all rows but `first` to `last`: they are other groups'."""
    tall = tile.shape[0]

    @pl.when((first > 0) | (last < tall))
    def _():
        index = lax.broadcasted_iota(jnp.int32, tile.shape, 0)
        index = plgpu.layout_cast(index, plgpu.Layout.WGMMA)
        values = tile[...]
        mine = (index >= first) & (index < last)
        tile[...] = jnp.where(mine, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _snake(index, grid: tuple[int, int]):
    """The tile at a place of the walk, 8 columns of tiles at a time."""
    return (index, 0) if grid[1] == 1 else plgpu.planar_snake(index, grid, 1, 8)


def _pipeline(body, compute, *, steps, shapes, index_maps, stages):
    specs = [
        plgpu.BlockSpec(shape, index_map, transforms=TILED)
        for shape, index_map in zip(shapes, index_maps)
    ]
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=specs,
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=2,
        max_concurrent_steps=stages,
        compute_context=compute,
    )


def _run(scope, pipeline, operands, out) -> None:
    """Allocates the pipeline's buffers and the output's once for the whole walk."""

    def nothing(*_, **__):
        return None

    allocations = pipeline(nothing, nothing).get_allocations(*operands)
    pl.run_scoped(scope, allocations, out, collective_axes="warpgroup")


def _call(kernel, shape: tuple[int, ...], dtype):
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(SMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
