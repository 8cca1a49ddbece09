"""Grouped matmuls for TPUs, in Pallas.

Two kernels. `_rows` multiplies rows with their group's matrix: the forward product and
the gradient by rows, and, with two matrices a group, both products of a SwiGLU at once.
`_outer` sums outer products over a group's rows: the gradient by weights.

Rows are cut into tiles, wherever groups begin. The innermost axis of the grid runs over
visits: a tile is visited once for every group that has rows in it, so the length of the
axis is known at run time only. The contracted axis is never cut. A block of a matrix
therefore stays in VMEM for all visits of its group and is read from HBM once, and an
output block is whole when its tile's last visit ends. A tile that is not all its group's
is multiplied in chunks of rows, those that hold none of the group's left out.

Letters: M rows, K inner, N outer, G groups; C the contracted axis (K or N), O the other
one; V visits, T tiles, m rows of a tile, o columns of a tile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

ROWS = 256  # rows of a tile: enough for each matrix tile that enters the systolic array
CHUNK = 64  # rows multiplied at once in a tile that is not all its group's
STRIP = 256  # columns of the output multiplied at once,
DEPTH = 1024  # and of the contracted axis: loops bound the program's length
LANES = 128
# Bytes that the compiler lets a kernel have unless asked for more, by JAX's device kind.
SCOPED_VMEM = {
    "TPU v5 lite": 16 * 2**20,
    "TPU v5": 16 * 2**20,
    "TPU v6 lite": 32 * 2**20,
    "TPU7x": 32 * 2**20,
}
RESERVED = 2**20  # of those, for what the compiler itself needs


class Visits(NamedTuple):
    """Which rows each visit multiplies with which matrix; prefetched to SMEM."""

    group_V: Int[Array, " V"]
    tile_V: Int[Array, " V"]
    first_V: Int[Array, " V"]  # of the tile's rows, the group's: from
    last_V: Int[Array, " V"]  # ... to; equal where there are none
    end_2: Int[Array, " 2"]  # the last group and the last tile that hold rows


def schedule(
    sizes_G: Int[Array, " G"], *, rows: int, tile: int, empty: bool
) -> tuple[Visits, Int[Array, ""]]:
    """The visits in order of rows, and their number.

    A group visits every tile it has rows in. Tiles of no group, past the sum of the
    sizes, are visited once each in the name of group G, unless `empty`: then every
    empty group has a visit instead. Sizes that claim more rows than there are end
    with the rows.
    """
    groups = sizes_G.shape[0]
    ends_G = jnp.minimum(jnp.cumsum(sizes_G.astype(jnp.int32)), rows)
    begins_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])
    held_G = ends_G > begins_G
    tiles_G = jnp.where(held_G, (ends_G - 1) // tile - begins_G // tile + 1, int(empty))
    last_group = jnp.where(held_G, jnp.arange(groups), 0).max()
    used = pl.cdiv(ends_G[-1], tile)  # tiles that hold rows
    surplus = 0 if empty else pl.cdiv(rows, tile) - used

    # One more group, for the surplus.
    begins = jnp.append(begins_G, rows)
    ends = jnp.append(ends_G, rows)
    first_tiles = jnp.append(begins_G // tile, used)
    counts = jnp.append(tiles_G, surplus)
    visit_ends = jnp.cumsum(counts)

    visit_V = jnp.arange(pl.cdiv(rows, tile) + groups, dtype=jnp.int32)
    group_V = (visit_V[:, None] >= visit_ends).sum(axis=1, dtype=jnp.int32)
    group_V = jnp.minimum(group_V, groups)  # past the last visit
    number_V = visit_V - (visit_ends - counts)[group_V]
    tile_V = first_tiles[group_V] + number_V
    first_V = jnp.clip(begins[group_V] - tile_V * tile, 0, tile)
    last_V = jnp.clip(ends[group_V] - tile_V * tile, 0, tile)
    end_2 = jnp.stack([last_group, jnp.maximum(used - 1, 0)]).astype(jnp.int32)
    return Visits(group_V, tile_V, first_V, last_V, end_2), visit_ends[-1]


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles."""

    rows: int
    columns: int  # of the output
    across: int = 0  # `_outer` alone: the output's other axis


def scoped_vmem() -> int:
    """Bytes a kernel may use on the chip that a mesh around names, else on any chip."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    smallest = min(SCOPED_VMEM.values())
    return SCOPED_VMEM.get(device.device_kind, smallest) if device else smallest


# Both operands of a step have the whole contracted axis in VMEM, each twice: a block is
# multiplied while the next one arrives. Rows and columns are left to choose. A matrix is
# read once whatever they are, x once for every tile of columns, so that each element of
# x read is worth `columns` products: the widest tile that fits is the best. In 16 MiB:
#
#   bfloat16        contracted  out    rows x columns
#   V3 gate, up     7168        2048   256 x 256
#   V3 down         2048        7168   256 x 1024
#   V2 gate, up     5120        1536   256 x 384
#   V2-Lite gate    2048        1408   256 x 768, the last 640 wide


def row_tiles(
    rows: int, contracted: int, out: int, bytes_each: int, *, matrices: int = 1
) -> Tiles | None:
    """Tiles of `_rows`; None where the smallest does not fit."""
    for tall, least in [(ROWS, 256), (128, 256), (ROWS, 128), (128, 128), (64, 128)]:
        tall = min(tall, pl.cdiv(rows, CHUNK) * CHUNK)
        fixed, column = _row_tile_bytes(tall, contracted, bytes_each, matrices)
        most = (scoped_vmem() - RESERVED - fixed) // column // LANES
        if most * LANES >= min(least, out):
            return Tiles(tall, LANES * _cut(out // LANES, most))
    return None


def _row_tile_bytes(
    tall: int, contracted: int, bytes_each: int, matrices: int
) -> tuple[int, int]:
    """VMEM of `_rows`: bytes whatever the columns, and bytes a column."""
    sums = 2 * tall * STRIP * 4  # float32, before and after an addition
    lhs = 2 * tall * contracted * bytes_each
    matrix = 2 * contracted * bytes_each
    out = 2 * tall * bytes_each
    return lhs + matrices * sums, matrices * (matrix + out)


def _cut(whole: int, most: int) -> int:
    """Parts of at most `most`, at least two where possible: a chip may have two cores.

    Equal ones, unless those would be less than half of what fits.
    """
    most = max(min(most, pl.cdiv(whole, 2)), 1)
    equal = max(part for part in range(1, most + 1) if whole % part == 0)
    return equal if 2 * equal >= most else pl.cdiv(whole, pl.cdiv(whole, most))


def outer_tiles(
    rows: int, N: int, K: int, bytes_each: int, out_bytes: int
) -> Tiles | None:
    """Tiles of `_outer`: an output block of n x k reads every row of dy and x for n k
    products, so the squarest that fit.
    """
    tall = min(ROWS, pl.cdiv(rows, CHUNK) * CHUNK)
    fits = [
        Tiles(tall, n, k)
        for n in _divisors(N)
        for k in _divisors(K)
        if _outer_tile_bytes(tall, n, k, bytes_each, out_bytes)
        <= scoped_vmem() - RESERVED
    ]
    return min(fits, key=lambda t: 1 / t.columns + 1 / t.across, default=None)


def _outer_tile_bytes(
    tall: int, n: int, k: int, bytes_each: int, out_bytes: int
) -> int:
    operands = 2 * tall * (n + k) * bytes_each
    total = 2 * 4 * n * k  # float32: what is summed up, and the sum before
    return operands + 2 * n * k * out_bytes + (total if out_bytes < 4 else total // 2)


def _divisors(size: int) -> list[int]:
    """The multiples of a lane's width that divide `size`."""
    return [part for part in range(LANES, size + 1, LANES) if size % part == 0]


def supports(
    rows: int, shape: tuple[int, int, int], dtype, *, matrices: int = 1
) -> bool:
    """Whether the kernels take x [rows, K] and `matrices` w of `shape` [G, N, K]."""
    G, N, K = shape
    if not rows or not G or N % LANES or K % LANES:
        return False
    if dtype not in (jnp.bfloat16, jnp.float32):
        return False
    each = jnp.dtype(dtype).itemsize
    return None not in (
        row_tiles(rows, K, N, each, matrices=matrices),
        row_tiles(rows, N, K, each, matrices=matrices),
        outer_tiles(rows, N, K, each, 4),
    )


# What the api calls.


def product(
    x_MK: Float[Array, "M K"],
    w_GNK: Float[Array, "G N K"],
    sizes_G: Int[Array, " G"],
    *,
    expected_rows: int,
) -> Float[Array, "M N"]:
    """x[m] @ w[group of m].T"""
    (y_MN,) = _rows((x_MK,), (w_GNK,), sizes_G, expected_rows, _alone, turned=True)
    return y_MN


def row_gradient(
    dy_MN: Float[Array, "M N"],
    w_GNK: Float[Array, "G N K"],
    sizes_G: Int[Array, " G"],
    *,
    expected_rows: int,
) -> Float[Array, "M K"]:
    """dy[m] @ w[group of m]"""
    (dx_MK,) = _rows((dy_MN,), (w_GNK,), sizes_G, expected_rows, _alone, turned=False)
    return dx_MK


def weight_gradient(
    dy_MN: Float[Array, "M N"],
    x_MK: Float[Array, "M K"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: jnp.dtype,
    expected_rows: int,
) -> Float[Array, "G N K"]:
    """dy_g.T @ x_g of every group, in `dtype`; zeros where a group is empty."""
    return _outer(dy_MN, x_MK, sizes_G, expected_rows, dtype)


def _alone(y):
    return (y,)


# Rows times matrices.


def _rows(
    lhs: tuple[Array, ...],  # each [M, C]
    matrices: tuple[Array, ...],  # each [G, O, C] if turned, else [G, C, O]
    sizes_G: Array,
    expected_rows: int,
    combine: Callable[..., tuple[Array, ...]],
    *,
    turned: bool,
) -> tuple[Array, ...]:
    """What `combine` makes of every row's products in float32, each [M, O].

    One left-hand side for all matrices, or one for each.
    """
    (rows, contracted), dtype = lhs[0].shape, lhs[0].dtype
    groups, out = matrices[0].shape[0], matrices[0].shape[1 if turned else 2]
    each = dtype.itemsize
    tiles = row_tiles(rows, contracted, out, each, matrices=len(matrices))
    outputs = len(combine(*[0.0] * len(matrices)))
    visits, count = schedule(sizes_G, rows=rows, tile=tiles.rows, empty=False)
    columns = pl.cdiv(out, tiles.columns)
    kernel = functools.partial(
        _rows_kernel,
        lhs_count=len(lhs),
        matrix_count=len(matrices),
        combine=combine,
        turned=turned,
        out_columns=out,
    )
    lhs_spec, matrix_spec, out_spec = rows_specs(tiles, contracted, turned=turned)
    return pl.pallas_call(
        kernel,
        name="grouped_matmul_rows",
        out_shape=[jax.ShapeDtypeStruct((rows, out), dtype)] * outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(columns, count),
            in_specs=[lhs_spec] * len(lhs) + [matrix_spec] * len(matrices),
            out_specs=[out_spec] * outputs,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected_rows * contracted * out * len(matrices),
            bytes_accessed=each
            * (
                len(lhs) * expected_rows * contracted * columns
                + len(matrices) * min(groups, expected_rows) * contracted * out
                + outputs * expected_rows * out
            ),
            transcendentals=0,
        ),
    )(*visits, *lhs, *matrices)


def rows_specs(
    tiles: Tiles, contracted: int, *, turned: bool
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Which block of rows, of a matrix and of the output a step of the grid uses.

    Visits of tiles that hold no rows name the blocks of the visit before: none is read.
    """

    def lhs(column, visit, group, tile, first, last, end):
        return jnp.minimum(tile[visit], end[1]), 0

    def matrix(column, visit, group, tile, first, last, end):
        held = jnp.minimum(group[visit], end[0])
        return (held, column, 0) if turned else (held, 0, column)

    def out(column, visit, group, tile, first, last, end):
        return tile[visit], column

    block = (tiles.columns, contracted) if turned else (contracted, tiles.columns)
    return (
        pl.BlockSpec((tiles.rows, contracted), lhs),
        pl.BlockSpec((None, *block), matrix),
        pl.BlockSpec((tiles.rows, tiles.columns), out),
    )


def _rows_kernel(
    group, tile, first, last, end, *refs, lhs_count, matrix_count, combine, turned, out_columns
):  # fmt: skip
    """One visit: a tile of rows with one group's matrix, or matrices."""
    lhs = refs[:lhs_count] * (matrix_count // lhs_count)
    matrices = refs[lhs_count : lhs_count + matrix_count]
    outs = refs[lhs_count + matrix_count :]
    tall, width = outs[0].shape
    strip = _strip(width, out_columns)
    strips = jnp.minimum(width, out_columns - pl.program_id(0) * width) // strip
    visit = pl.program_id(1)
    begin, stop = first[visit], last[visit]

    @pl.when(_begins(tile, visit) & (stop - begin < tall))
    def _():
        for out in outs:
            out[...] = jnp.zeros_like(out)

    @_with_rows(begin, stop, tall)
    def _(rows):
        mine = _between(begin, stop, rows, strip)

        @pl.loop(0, strips)
        def _(i):
            columns = pl.ds(pl.multiple_of(i * strip, strip), strip)
            block = (columns, slice(None)) if turned else (slice(None), columns)
            products = [
                _matmul(x.at[rows], w.at[block], turned) for x, w in zip(lhs, matrices)
            ]
            for out, y in zip(outs, combine(*products)):
                others = out[rows, columns].astype(jnp.float32)
                out[rows, columns] = jnp.where(mine, y, others).astype(out.dtype)


def _begins(what: Array, visit: Array) -> Array:
    """Whether the visit before was not to the same tile, or group."""
    return (visit == 0) | (what[jnp.maximum(visit - 1, 0)] != what[visit])


def _strip(width: int, whole: int) -> int:
    """Columns multiplied at once: they divide every tile, the last one, too."""
    return STRIP if width % STRIP == whole % STRIP == 0 else LANES


def _with_rows(begin: Array, stop: Array, tall: int) -> Callable:
    """Runs a function on the fewest chunks that hold a tile's rows `begin` to `stop`.

    At once, whatever their number: the systolic array's weights change as often for one
    chunk as for a whole tile, or, where rows are contracted, it is as deep as a few.
    """
    start = begin // CHUNK
    chunks = jnp.where(stop > begin, pl.cdiv(stop, CHUNK) - start, 0)

    def run(body: Callable[[pl.Slice], None]) -> None:
        for count in range(1, tall // CHUNK + 1):
            first = 0 if count * CHUNK == tall else start * CHUNK
            rows = pl.ds(pl.multiple_of(first, CHUNK), count * CHUNK)
            pl.when(chunks == count)(functools.partial(body, rows))

    return run


def _between(begin: Array, stop: Array, rows: pl.Slice, width: int) -> Array:
    """Which of the rows are the group's: [rows, width]."""
    row = lax.broadcasted_iota(jnp.int32, (rows.size, width), 0) + rows.start
    return (row >= begin) & (row < stop)


def _matmul(x_ref, w_ref, turned: bool) -> Array:
    """[m, C] times [o, C] if `turned`, else [C, o], in float32."""

    def part(start, depth: int) -> Array:
        here = pl.ds(start, depth)
        w = w_ref[:, here] if turned else w_ref[here]
        return _dot(x_ref[:, here], w, (1, 1 if turned else 0))

    width = w_ref.shape[0 if turned else 1]
    depth = DEPTH * STRIP // width
    whole, rest = divmod(x_ref.shape[1], depth)
    total = jnp.zeros((x_ref.shape[0], width), jnp.float32)
    total = part(whole * depth, rest) if rest else total

    def add(i: Array, total: Array) -> Array:
        return total + part(pl.multiple_of(i * depth, depth), depth)

    return lax.fori_loop(0, whole, add, total)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contracts one axis of each; float32 operands keep their precision."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


# Outer products of rows.


def _outer(
    dy_MN: Array, x_MK: Array, sizes_G: Array, expected_rows: int, dtype
) -> Array:
    """The sum over each group's rows of dy outer x: [G, N, K]."""
    (rows, N), K, groups = dy_MN.shape, x_MK.shape[1], sizes_G.shape[0]
    each, out_bytes = x_MK.dtype.itemsize, jnp.dtype(dtype).itemsize
    tiles = outer_tiles(rows, N, K, each, out_bytes)
    visits, count = schedule(sizes_G, rows=rows, tile=tiles.rows, empty=True)
    down, across = N // tiles.columns, K // tiles.across
    block = (tiles.columns, tiles.across)
    dy_spec, x_spec, out_spec = outer_specs(tiles)
    return pl.pallas_call(
        _outer_kernel,
        name="grouped_matmul_outer",
        out_shape=jax.ShapeDtypeStruct((groups, N, K), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(down, across, count),
            in_specs=[dy_spec, x_spec],
            out_specs=out_spec,
            # A float32 output is summed up where it is.
            scratch_shapes=[] if out_bytes == 4 else [pltpu.VMEM(block, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected_rows * N * K,
            bytes_accessed=each * expected_rows * (N * across + K * down)
            + groups * N * K * out_bytes,
            transcendentals=0,
        ),
    )(*visits, dy_MN, x_MK)


def outer_specs(tiles: Tiles) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Which block of dy, of x and of the output a step of the grid uses."""

    def dy(n, k, visit, group, tile, first, last, end):
        return jnp.minimum(tile[visit], end[1]), n

    def x(n, k, visit, group, tile, first, last, end):
        return jnp.minimum(tile[visit], end[1]), k

    def out(n, k, visit, group, tile, first, last, end):
        return group[visit], n, k

    return (
        pl.BlockSpec((tiles.rows, tiles.columns), dy),
        pl.BlockSpec((tiles.rows, tiles.across), x),
        pl.BlockSpec((None, tiles.columns, tiles.across), out),
    )


def _outer_kernel(group, tile, first, last, end, dy, x, out, *scratch):
    """One visit: adds a tile's rows to its group's sum."""
    total = scratch[0] if scratch else out
    tall, visit = dy.shape[0], pl.program_id(2)
    begin, stop = first[visit], last[visit]

    @pl.when(_begins(group, visit))
    def _():
        total[...] = jnp.zeros_like(total)

    @_with_rows(begin, stop, tall)
    def _(rows):
        def mine(ref, columns):  # past the rows' end it holds anything, NaN included
            keep = _between(begin, stop, rows, columns.size)
            wide = ref[rows, columns].astype(jnp.float32)
            return jnp.where(keep, wide, 0).astype(ref.dtype)

        x_mine = mine(x, pl.ds(0, x.shape[1]))

        def add(start, strip: int) -> None:
            here = pl.ds(start, strip)
            total[here] += _dot(mine(dy, here), x_mine, (0, 0))

        strip = 2 * STRIP
        whole, rest = divmod(dy.shape[1], strip)
        pl.loop(0, whole)(lambda i: add(pl.multiple_of(i * strip, strip), strip))
        if rest:
            add(whole * strip, rest)

    if scratch:

        @pl.when(group[visit + 1] != group[visit])
        def _():
            out[...] = total[...].astype(out.dtype)
