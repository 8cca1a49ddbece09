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

Letters: M rows, K inner, N outer, G groups; C the contracted axis, K or N, and O the
other one; D the model, F an expert.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.layers import Matrices, stacked
from pallas_kernels.grouped_matmul.tiles_tpu import (
    CHUNK,
    DEPTH,
    LANES,
    STRIP,
    Operands,
    Tiles,
    chunk_span,
    outer_tiles,
    row_tiles,
    schedule,
)

# What the api calls.


def product(
    x_MK: Float[Array, "M K"],
    w_GNK: Matrices,
    sizes_G: Int[Array, " G"],
    *,
    expected_rows: int,
) -> Float[Array, "M N"]:
    """x[m] @ w[group of m].T"""
    (y_MN,) = _rows((x_MK,), (w_GNK,), sizes_G, expected_rows, _alone, 1, turned=True)
    return y_MN


def row_gradient(
    dy_MN: Float[Array, "M N"],
    w_GNK: Matrices,
    sizes_G: Int[Array, " G"],
    *,
    expected_rows: int,
) -> Float[Array, "M K"]:
    """dy[m] @ w[group of m]"""
    (dx_MK,) = _rows(
        (dy_MN,), (w_GNK,), sizes_G, expected_rows, _alone, 1, turned=False
    )
    return dx_MK


def weight_gradient(
    dy_MN: Float[Array, "M N"],
    x_MK: Float[Array, "M K"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: DTypeLike,
    expected_rows: int,
) -> Float[Array, "G N K"]:
    """dy_g.T @ x_g of every group, in `dtype`; zeros where a group is empty."""
    return _outer(dy_MN, x_MK, sizes_G, expected_rows, dtype)


def swiglu(
    x_MD: Float[Array, "M D"],
    gate_GFD: Matrices,
    up_GFD: Matrices,
    scale_M: Float[Array, " M"],
    sizes_G: Int[Array, " G"],
    *,
    expected_rows: int,
) -> Float[Array, "M F"]:
    """silu(x @ gate.T) * (x @ up.T) * scale, x read once for both products."""

    def combine(gate, up, scale):
        return (jax.nn.silu(gate) * up * scale,)

    w = (gate_GFD, up_GFD)
    (h_MF,) = _rows(
        (x_MD,), w, sizes_G, expected_rows, combine, 1, scale_M, turned=True
    )
    return h_MF


def both(
    x_MD: Float[Array, "M D"],
    gate_GFD: Matrices,
    up_GFD: Matrices,
    sizes_G: Int[Array, " G"],
    *,
    expected_rows: int,
) -> tuple[Float[Array, "M F"], Float[Array, "M F"]]:
    """x @ gate.T and x @ up.T, x read once."""

    def combine(gate, up):
        return gate, up

    w = (gate_GFD, up_GFD)
    gated, lifted = _rows((x_MD,), w, sizes_G, expected_rows, combine, 2, turned=True)
    return gated, lifted


def swiglu_row_gradient(
    dgate_MF: Float[Array, "M F"],
    dup_MF: Float[Array, "M F"],
    gate_GFD: Matrices,
    up_GFD: Matrices,
    sizes_G: Int[Array, " G"],
    *,
    expected_rows: int,
) -> Float[Array, "M D"]:
    """dgate @ gate + dup @ up, of each row's group, added up in float32."""

    def combine(a, b):
        return (a + b,)

    dy, w = (dgate_MF, dup_MF), (gate_GFD, up_GFD)
    (dx_MD,) = _rows(dy, w, sizes_G, expected_rows, combine, 1, turned=False)
    return dx_MD


def _alone(y):
    return (y,)


# Rows times matrices.


def _rows(
    lhs: tuple[Array, ...],  # each [M, C]
    matrices: tuple[Matrices, ...],  # each [G, O, C] if turned, else [G, C, O]
    sizes_G: Array,
    expected_rows: int,
    combine: Callable[..., tuple[Array, ...]],
    outputs: int,
    scale_M: Array | None = None,
    *,
    turned: bool,
) -> tuple[Array, ...]:
    """What `combine` makes of every row's products, and of its scale if it has one, in
    float32: each [M, O]. One left-hand side for all matrices, or one for each. Matrices
    are of one layer.
    """
    (rows, contracted), dtype = lhs[0].shape, lhs[0].dtype
    groups, out = matrices[0].shape[0], matrices[0].shape[1 if turned else 2]
    each = dtype.itemsize
    scales = () if scale_M is None else (scale_M[:, None].astype(jnp.float32),)
    has = Operands(len(lhs), len(matrices), len(scales), outputs)
    tiles = row_tiles(rows, contracted, out, each, has)
    visits, count = schedule(sizes_G, rows=rows, tile=tiles.rows, empty=False)
    columns = pl.cdiv(out, tiles.columns)
    kernel = functools.partial(
        _rows_kernel,
        has=has,
        combine=combine,
        turned=turned,
        out_columns=out,
    )
    specs = rows_specs(tiles, contracted, turned=turned)
    stacks, layers = zip(*map(stacked, matrices))
    return pl.pallas_call(
        kernel,
        name="grouped_matmul_rows",
        out_shape=[jax.ShapeDtypeStruct((rows, out), dtype)] * outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits) + 1,
            grid=(columns, count),
            in_specs=[
                *[specs.lhs] * len(lhs),
                *[specs.matrix] * len(matrices),
                *[specs.scale] * len(scales),
            ],
            out_specs=[specs.out] * outputs,
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
            transcendentals=len(scales) * expected_rows * out,
        ),
    )(*visits, layers[0].reshape(1), *lhs, *stacks, *scales)


class RowsSpecs(NamedTuple):
    """Which block of each operand of `_rows` a step of the grid uses."""

    lhs: pl.BlockSpec
    matrix: pl.BlockSpec
    scale: pl.BlockSpec
    out: pl.BlockSpec


def rows_specs(tiles: Tiles, contracted: int, *, turned: bool) -> RowsSpecs:
    """Visits of tiles that hold no rows name the blocks of the visit before: none is
    read.
    """

    def lhs(column, visit, group, tile, first, last, end, layer):
        return jnp.minimum(tile[visit], end[1]), 0

    def matrix(column, visit, group, tile, first, last, end, layer):
        held = jnp.minimum(group[visit], end[0])
        return (layer[0], held, *((column, 0) if turned else (0, column)))

    def out(column, visit, group, tile, first, last, end, layer):
        return tile[visit], column

    block = (tiles.columns, contracted) if turned else (contracted, tiles.columns)
    return RowsSpecs(
        pl.BlockSpec((tiles.rows, contracted), lhs),
        pl.BlockSpec((None, None, *block), matrix),
        pl.BlockSpec((tiles.rows, 1), lhs),
        pl.BlockSpec((tiles.rows, tiles.columns), out),
    )


def _rows_kernel(
    group, tile, first, last, end, layer, *refs, has, combine, turned, out_columns
):  # fmt: skip
    """One visit: a tile of rows with one group's matrix, or matrices."""
    left = iter(refs)
    lhs, matrices, scales, outs = (list(itertools.islice(left, n)) for n in has)
    lhs *= has.matrices // has.lhs
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
            values = combine(*products, *[scale[rows] for scale in scales])
            for out, y in zip(outs, values):
                others = out[rows, columns].astype(jnp.float32)
                out[rows, columns] = jnp.where(mine, y, others).astype(out.dtype)


def _begins(what, visit: Array) -> Array:
    """Whether the visit before was not to the same tile, or group; `what` is a ref."""
    return (visit == 0) | (what[jnp.maximum(visit - 1, 0)] != what[visit])


def _strip(width: int, whole: int) -> int:
    """Columns multiplied at once: they divide every tile, the last one, too."""
    return STRIP if width % STRIP == whole % STRIP == 0 else LANES


def _with_rows(begin: Array, stop: Array, tall: int) -> Callable:
    """Runs a function on the fewest chunks that hold a tile's rows `begin` to `stop`.

    At once, whatever their number: the systolic array's weights change as often for one
    chunk as for a whole tile, or, where rows are contracted, it is as deep as a few.
    """
    start, chunks = chunk_span(begin, stop)

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
