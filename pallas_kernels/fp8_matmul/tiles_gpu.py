"""How the Hopper kernel cuts rows of groups into tiles, and the order it takes them in.

Letters: M rows, G groups, T tiles of rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

SMS = 132  # of an H100 or H200: blocks of the grid


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
    """By comparing everything with everything: two kernels, where prefix sums, a search
    and gathers are many.
    """
    groups = sizes_G.shape[0]
    ends_G = _running_sum(sizes_G)
    tile_ends_G = _running_sum(-(-sizes_G // tile))
    numbers_T1 = jnp.arange(rows // tile + groups + 1)[:, None]
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


def walk(index, down, across: int, band: int):
    """The tile at a place of the walk, as (row, column): `band` columns of tiles at a
    time, row by row, so that what they share stays in the L2 cache.
    """
    if across <= band:
        return lax.div(index, across), lax.rem(index, across)
    number = lax.div(index, down * band)
    index = index - number * down * band
    width = jnp.minimum(band, across - number * band)
    return lax.div(index, width), number * band + lax.rem(index, width)


def _running_sum(sizes_G: Int[Array, " G"]) -> Int[Array, " G"]:
    index_G = jnp.arange(sizes_G.shape[0])
    return jnp.where(index_G[:, None] >= index_G, sizes_G.astype(jnp.int32), 0).sum(1)
