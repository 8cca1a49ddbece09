"""What the TPU kernels of the grouped matmul move and multiply, against what they must.

From the kernels' own grids, block specs and visits. Letters: M rows, K inner, N outer, G groups; C the contracted axis, O the other one.
"""

import itertools

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.grouped_matmul.pallas_tpu import outer_specs, rows_specs
from pallas_kernels.grouped_matmul.tiles_tpu import (
    CHUNK,
    LANES,
    ONE,
    Operands,
    chunk_span,
    outer_tiles,
    row_tiles,
    schedule,
)
from pallas_kernels.work import Work


def rows_work(
    sizes: list[int],
    *,
    rows: int,
    contracted: int,
    out: int,
    bytes_each: int = 2,
    turned: bool = True,
    has: Operands = ONE,
) -> Work:
    """Of products of rows."""
    tiles = row_tiles(rows, contracted, out, bytes_each, has)
    visits, count = schedule(
        jnp.asarray(sizes), rows=rows, tile=tiles.rows, empty=False
    )
    shape = (out, contracted) if turned else (contracted, out)
    shapes = ((rows, contracted), (1, len(sizes), *shape), (rows, 1), (rows, out))
    grid = (pl.cdiv(out, tiles.columns), int(count))
    specs, layer = rows_specs(tiles, contracted, turned=turned), jnp.zeros(1, int)
    moved = _moved(grid, specs, (*visits, layer), shapes)
    held, real = np.count_nonzero(sizes), sum(sizes)
    needed = (real * contracted, held * contracted * out, real, rows * out)
    flops = 2 * has.matrices * contracted * out
    names = ("x", "w", "scale", "y")
    widths = [n * bytes_each for n in has]
    widths[2] = has.scales * 4
    padded = [*widths[:2], widths[2] * LANES, widths[3]]
    return Work(
        _bytes(names, moved, padded),
        _bytes(names, needed, widths),
        flops * _rows_multiplied(visits, int(count)),
        flops * real,
    )


def outer_work(
    sizes: list[int],
    *,
    rows: int,
    N: int,
    K: int,
    bytes_each: int = 2,
    out_bytes: int = 4,
) -> Work:
    """Of the gradient by weights."""
    tiles = outer_tiles(rows, N, K, bytes_each, out_bytes)
    visits, count = schedule(jnp.asarray(sizes), rows=rows, tile=tiles.rows, empty=True)
    grid = (N // tiles.columns, K // tiles.across, int(count))
    shapes = ((rows, N), (rows, K), (len(sizes), N, K))
    moved = _moved(grid, outer_specs(tiles), visits, shapes)
    real = sum(sizes)
    needed = (real * N, real * K, len(sizes) * N * K)
    names, widths = ("dy", "x", "dw"), (bytes_each, bytes_each, out_bytes)
    return Work(
        _bytes(names, moved, widths),
        _bytes(names, needed, widths),
        2 * N * K * _rows_multiplied(visits, int(count)),
        2 * N * K * real,
    )


def _bytes(names, elements, widths) -> dict[str, int]:
    return {name: int(n) * width for name, n, width in zip(names, elements, widths)}


def _rows_multiplied(visits, count: int) -> int:
    """Whole chunks."""
    _, chunks = chunk_span(visits.first_V[:count], visits.last_V[:count])
    return int(chunks.sum()) * CHUNK


def _moved(grid, specs, prefetched, shapes) -> list[int]:
    """Elements of every operand that the steps of the grid copy: a block is copied when
    it is another than the step's before. What lies past the end of an array is not.
    """
    prefetched = [np.asarray(array) for array in prefetched]
    steps = list(itertools.product(*map(range, grid)))
    totals = []
    for spec, shape in zip(specs, shapes):
        total, before = 0, None
        for step in steps:
            index = tuple(int(i) for i in spec.index_map(*step, *prefetched))
            if index != before:
                total += _block(index, spec.block_shape, shape)
            before = index
        totals.append(total)
    return totals


def _block(index: tuple[int, ...], block, shape: tuple[int, ...]) -> int:
    """Elements of a block within its array."""
    sizes = [1 if size is None else size for size in block]
    return int(np.prod([min(s, n - i * s) for i, s, n in zip(index, sizes, shape)]))
