"""How the Hopper kernels of the grouped matmul cut their work: tiles, and their order.

Letters: M rows, N outer, K inner, G groups, T tiles of rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from pallas_kernels.mosaic import is_hopper

SMALL, LARGE = 256, 1024  # rows a group: see `row_tiles`
LONG = 4096  # elements of a row: see there, too
LINE = 64  # elements of bfloat16 in 128 bytes, the row of a swizzled tile


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles."""

    rows: int  # half of them each of two warpgroups'
    columns: int
    stages: int = 4  # buffers of operands
    leaving: int = 2  # buffers of results, a warpgroup
    band: int = 8  # columns of tiles that are walked together; by group, rows of tiles
    pair: bool = False  # two blocks of a cluster share a matrix, each has its own rows
    by_group: bool = False  # all of a group's tiles follow each other
    items: bool = False  # a pair shares rows where few are left: see `items_gpu`

    @property
    def blocks(self) -> int:
        """In a cluster."""
        return 2 if self.pair else 1

    @property
    def all_rows(self) -> int:
        """Of a cluster's tile."""
        return self.rows * self.blocks

    @property
    def half(self) -> int:
        """Rows of one warpgroup."""
        return self.rows // 2


def lacks(rows: int, shape: tuple[int, ...], dtype: DTypeLike) -> str:
    """Why the kernels do not take x [rows, K] and w of `shape` [G, N, K]; nothing where
    they do.
    """
    if not rows or 0 in shape:
        return f"takes no empty operands ({rows} rows, {shape})"
    if dtype != jnp.bfloat16:
        return f"takes bfloat16 ({dtype})"
    return "" if is_hopper() else "needs a GPU of Hopper's generation"


def dense_lacks(rows: int, shape: tuple[int, ...], dtype: DTypeLike) -> str:
    """The same of a single group that has all rows: where there is little to save, or
    copies would be made, there are no kernels.
    """
    if rows < LARGE:
        return f"is for {LARGE} rows and more ({rows})"
    if rows % LINE:
        return f"takes multiples of {LINE} rows ({rows})"
    if any(size % LINE for size in shape[1:]):
        return f"takes sizes that {LINE} divides ({shape[1:]})"
    return lacks(rows, shape, dtype)


def row_tiles(
    rows: int, groups: int, outer: int, inner: int, *, turned: bool, parts: int = 1
) -> Tiles:
    """For products of rows: those that multiply the fewest columns in vain. Matrices
    whose columns are contiguous (not `turned`) come in whole lines.

    Two blocks read a matrix together where groups are so small that reading is all, or
    so large that few tiles are not full. In between, and where a tile of LONG rows takes so
    much time that the few count, they do items. Groups that are not large are walked one
    after the other: their matrices are read from memory, each once.
    """
    candidates = [Tiles(128, 256), Tiles(128, 224), Tiles(256, 128)]
    unit = LINE // 2 if turned else LINE
    whole = [t for t in candidates if t.columns // parts % unit == 0]

    def multiplied(tiles: Tiles) -> int:
        width = tiles.columns // parts
        return pl.cdiv(outer, width) * width

    best = min(whole, key=multiplied)
    small, large = rows < SMALL * groups, rows >= LARGE * groups
    best = best._replace(pair=best.rows == 128)
    if best.pair and not small and (inner >= LONG or not large):
        return best._replace(items=True)
    if large:
        return best
    return best._replace(by_group=True, band=32 if small else 16)


def weight_tiles(
    rows: int, groups: int, outer: int, inner: int, *, two: bool = False
) -> Tiles:
    """For gradients by weights: the same, of either axis. Of `two`, each is one block's of
    a pair that reads x together. Of one, two blocks do where groups are not large, if no
    tile is left over.
    """

    def multiplied(tiles: Tiles) -> int:
        down, across = pl.cdiv(outer, tiles.rows), pl.cdiv(inner, tiles.columns)
        return down * tiles.rows * across * tiles.columns

    best = min([Tiles(128, 256), Tiles(256, 128)], key=multiplied)
    if two:
        return best._replace(pair=True)
    even = pl.cdiv(outer, best.rows) % 2 == 0
    return best._replace(pair=best.rows == 128 and even and rows < LARGE * groups)


class Schedule(NamedTuple):
    """Which rows are whose, of tiles in the order of rows. Those of the surplus rows
    come last, and belong to group G. `place` says the rest: here, it would be more
    kernels.
    """

    group: Int[Array, " T"]
    first: Int[Array, " T"]  # the number of the group's first tile
    begin: Int[Array, " T"]  # the group's first row
    end: Int[Array, " T"]  # and the row after its last
    ends: Int[Array, " G"]
    tile_ends: Int[Array, " G"]


def schedule(sizes_G: Int[Array, " G"], rows: int, tile: int) -> Schedule:
    """Of tiles of that many rows."""
    most = rows // tile + sizes_G.shape[0] + 1
    return scheduled(sizes_G, -(-sizes_G // tile), rows, most)


def scheduled(
    sizes_G: Int[Array, " G"], counts_G: Int[Array, " G"], rows: int, most: int
) -> Schedule:
    """Of groups that have so many tiles, at most `most` in all with those of surplus rows.
    By comparing everything with everything: two kernels, where prefix sums, a search
    and gathers are many.
    """
    ends_G, tile_ends_G = running_sum(sizes_G), running_sum(counts_G)
    numbers_T1 = jnp.arange(most)[:, None]
    past_TG = tile_ends_G <= numbers_T1  # groups whose tiles all come before
    return Schedule(
        past_TG.sum(1, dtype=jnp.int32),
        jnp.where(past_TG, tile_ends_G, 0).max(1),
        jnp.where(past_TG, ends_G, 0).max(1),
        jnp.where(past_TG, rows, ends_G).min(1),
        ends_G,
        tile_ends_G,
    )


def tile_count(tiles: Schedule, rows: int, tile: int):
    """How many tiles of rows there are; of arrays or of references to them."""
    last = tiles.ends.shape[0] - 1
    return tiles.tile_ends[last] + pl.cdiv(rows - tiles.ends[last], tile)


def place(tiles: Schedule, number, tile: int):
    """Group, first row, and how many rows from there on are the group's."""
    start = tiles.begin[number] + (number - tiles.first[number]) * tile
    count = jnp.clip(tiles.end[number] - start, 0, tile)
    return tiles.group[number], start, count


def place_by_group(tiles: Schedule, index, across: int, tile: int, band: int):
    """The same of the tile at a place of the walk, if all of a group's tiles follow each
    other, and its column: `band` rows of tiles at a time, column by column, so that those
    that share a part of a matrix are side by side.
    """
    number = lax.div(index, across)  # any of the group's
    first, begin, end = tiles.first[number], tiles.begin[number], tiles.end[number]
    down = lax.div(end - begin + tile - 1, tile)
    column, row = walk(index - first * across, across, down, band)
    start = begin + row * tile
    return tiles.group[number], start, jnp.clip(end - start, 0, tile), column


def running_sum(sizes_G: Int[Array, " G"]) -> Int[Array, " G"]:
    """Where each group ends."""
    index_G = jnp.arange(sizes_G.shape[0])
    return jnp.where(index_G[:, None] >= index_G, sizes_G.astype(jnp.int32), 0).sum(1)


class Groups(NamedTuple):
    """Groups, the largest first, so that blocks end at about the same time."""

    group: Int[Array, " G"]
    begin: Int[Array, " G"]
    end: Int[Array, " G"]
    ends: Int[Array, " G"]  # in the order of rows


def by_size(sizes_G: Int[Array, " G"]) -> Groups:
    """Two kernels, as above."""
    index_G = jnp.arange(sizes_G.shape[0])
    larger_GG = sizes_G > sizes_G[:, None]
    before_GG = (sizes_G == sizes_G[:, None]) & (index_G < index_G[:, None])
    rank_G = (larger_GG | before_GG).sum(1)
    ends_G = running_sum(sizes_G)
    own_RG = rank_G == index_G[:, None]
    by_rank = (index_G, ends_G - sizes_G, ends_G)
    return Groups(*(jnp.where(own_RG, a, 0).sum(1) for a in by_rank), ends_G)


def walk(index, down, across, band: int):
    """The tile at a place of the walk, as (row, column): `band` columns of tiles at a
    time, row by row, so that what they share stays in the L2 cache.
    """
    if isinstance(across, int) and across <= band:
        return lax.div(index, across), lax.rem(index, across)
    number = lax.div(index, down * band)
    index = index - number * down * band
    width = jnp.minimum(band, across - number * band)
    return lax.div(index, width), number * band + lax.rem(index, width)
