"""How the Hopper kernels of the grouped matmul cut their work: tiles, and their order.

Letters: M rows, N outer, K inner, G groups, T tiles of rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Int

SMS = 132  # of an H100 or H200: blocks of the grid
LINE = 64  # elements of bfloat16 in 128 bytes, the row of a swizzled tile
BAND = 8  # columns of tiles that are walked together


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles."""

    rows: int  # half of them each of two warpgroups'
    columns: int
    stages: int = 4  # buffers of operands
    leaving: int = 2  # buffers of results, a warpgroup
    pair: str = ""  # what a cluster of two blocks splits: "rows", "columns" or nothing
    ahead: int = 0  # steps of matrices that are fetched to the L2 cache at once
    sort: bool = False  # short tiles last
    lag: int = 0  # steps that the second warpgroup begins after the first

    @property
    def blocks(self) -> int:
        """In a cluster."""
        return 2 if self.pair else 1

    @property
    def all_rows(self) -> int:
        """Of a cluster's tile."""
        return self.rows * (2 if self.pair == "rows" else 1)

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
    return "" if _is_hopper() else "needs a GPU of Hopper's generation"


def _is_hopper() -> bool:
    """Whether the GPU at hand is of Hopper's generation; without one, what is compiled
    ahead of time for a GPU is taken to be.
    """
    if jax.default_backend() != "gpu":
        return True
    return jax.devices()[0].compute_capability.startswith("9.")


def row_tiles(outer: int, *, turned: bool, apart: int = 1) -> Tiles:
    """For products of rows: those that multiply the fewest columns in vain. Matrices
    whose columns are contiguous (not `turned`) come in whole lines.
    """
    unit = 32 if turned else LINE
    candidates = [Tiles(128, 256), Tiles(256, 128)]
    if turned:
        candidates.insert(1, Tiles(128, 224))
    wide = [t for t in candidates if t.columns // apart % unit == 0]

    def multiplied(tiles: Tiles) -> int:
        width = tiles.columns // apart
        return pl.cdiv(outer, width) * width

    return min(wide, key=multiplied)


def weight_tiles(outer: int, inner: int) -> Tiles:
    """For gradients by weights: the same, of either axis."""

    def multiplied(tiles: Tiles) -> int:
        down, across = pl.cdiv(outer, tiles.rows), pl.cdiv(inner, tiles.columns)
        return down * tiles.rows * across * tiles.columns

    return min([Tiles(128, 256), Tiles(256, 128)], key=multiplied)


class Schedule(NamedTuple):
    """Tiles of rows, in the order of rows but for short ones, which come later, so that
    what blocks have to do ends at about the same time; those of the surplus rows come
    last, and belong to group G. `place` says the rest: here, it would be more kernels.
    """

    group: Int[Array, " T"]
    first: Int[Array, " T"]  # the number of the first tile of the group, of its kind
    begin: Int[Array, " T"]  # and that one's first row
    end: Int[Array, " T"]  # the row after the group's last
    ends: Int[Array, " G"]
    tall_ends: Int[Array, " G"]  # tiles that are not short, of groups so far
    short_ends: Int[Array, " G"]


def schedule(
    sizes_G: Int[Array, " G"], rows: int, tile: int, short: int = 0
) -> Schedule:
    """The last tile of a group is short if it has no more than `short` rows.

    By comparing everything with everything: two kernels, where prefix sums, a search and
    gathers are many.
    """
    groups = sizes_G.shape[0]
    tall_G = (sizes_G + tile - 1 - short) // tile
    short_G = (sizes_G > tall_G * tile).astype(jnp.int32)
    ends_G, tall_ends_G, short_ends_G = map(running_sum, (sizes_G, tall_G, short_G))

    numbers_T1 = jnp.arange(rows // tile + groups + 1)[:, None]
    tall, both = tall_ends_G[-1], tall_ends_G[-1] + short_ends_G[-1]
    is_tall_TG = (numbers_T1 >= tall_ends_G - tall_G) & (numbers_T1 < tall_ends_G)
    rest_T1 = numbers_T1 - tall
    is_short_TG = (rest_T1 >= short_ends_G - short_G) & (rest_T1 < short_ends_G)
    group_G = jnp.arange(groups)
    is_surplus_TG = (numbers_T1 >= both) & (group_G == groups - 1)

    def of_own(tall_G, short_G, surplus):
        values_TG = jnp.where(is_tall_TG, tall_G, 0) + jnp.where(
            is_short_TG, short_G, 0
        )
        return (values_TG + jnp.where(is_surplus_TG, surplus, 0)).sum(1)

    begin_G = ends_G - sizes_G
    return Schedule(
        of_own(group_G, group_G, groups),
        of_own(tall_ends_G - tall_G, tall + short_ends_G - short_G, both),
        of_own(begin_G, begin_G + tall_G * tile, ends_G[-1]),
        of_own(ends_G, ends_G, rows),
        *(ends_G, tall_ends_G, short_ends_G),
    )


def tile_counts(tiles: Schedule, rows: int, tile: int):
    """How many tiles of rows are tall, and how many are not; of arrays or of references
    to them.
    """
    last = tiles.ends.shape[0] - 1
    surplus = pl.cdiv(rows - tiles.ends[last], tile)
    return tiles.tall_ends[last], tiles.short_ends[last] + surplus


def place(tiles: Schedule, number, tile: int):
    """Group, first row, and how many rows from there on are the group's."""
    start = tiles.begin[number] + (number - tiles.first[number]) * tile
    count = jnp.clip(tiles.end[number] - start, 0, tile)
    return tiles.group[number], start, count


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


def walk(index, down, across: int):
    """The tile at a place of the walk, as (row, column): BAND columns of tiles at a
    time, row by row, so that what they share stays in the L2 cache.
    """
    if across <= BAND:
        return lax.div(index, across), lax.rem(index, across)
    band = lax.div(index, down * BAND)
    index = index - band * down * BAND
    width = jnp.minimum(BAND, across - band * BAND)
    return lax.div(index, width), band * BAND + lax.rem(index, width)
