"""How the Hopper kernel of products of rows cuts its work for pairs of blocks: items.

Both blocks of a cluster do an item together. Where a group has rows for all of their
warpgroups, they share a matrix; of what is left of it, they have a column of tiles each,
and share the rows. So few halves of tiles are empty.

All items of two columns of tiles that belong to a group follow each other, and so are
done at the same time: what they read comes from memory once. One that came a tile later
would find that the L2 cache has forgotten it.

Letters: G groups.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels.grouped_matmul.tiles_gpu import Schedule, scheduled


class Item(NamedTuple):
    """Up to four units of a group's rows, one for each warpgroup, and one column of tiles;
    or, `wide`, up to two units and two columns.
    """

    row: Int[Array, ""]  # the first unit's first row
    count: Int[Array, ""]  # rows from there on
    column: Int[Array, ""]  # the first column of tiles
    wide: Bool[Array, ""]


class Cut(NamedTuple):
    """How rows of a group are cut in two columns of tiles: first into items of four units;
    what is left, into one of two and one of one.
    """

    fours: Int[Array, "..."]
    two: Int[Array, "..."]  # 0 or 1
    one: Int[Array, "..."]


class Grid(NamedTuple):
    """What is to be cut."""

    rows: int
    groups: int
    unit: int  # rows of a warpgroup
    across: int  # columns of tiles
    band: int  # items of four units, one below the other, that are walked together

    def cut(self, rows) -> Cut:
        """Of a group of so many rows."""
        units = lax.div(rows + self.unit - 1, self.unit)
        return Cut(lax.div(units, 4), lax.rem(lax.div(units, 2), 2), lax.rem(units, 2))

    def count(self, rows) -> Int[Array, "..."]:
        """How many items those of a group are. The last of an odd number of columns is
        alone, and what is left there is one.
        """
        fours, two, one = self.cut(rows)
        pairs, alone = divmod(self.across, 2)
        return fours * self.across + (two + one) * pairs + jnp.maximum(two, one) * alone

    @property
    def most(self) -> int:
        """At least the items of any groups, surplus rows included."""
        units, groups = pl.cdiv(self.rows, self.unit), self.groups + 1
        left = 2 * groups * pl.cdiv(self.across, 2)
        return (units + groups) // 4 * self.across + left

    def item(self, number, begin, end) -> Item:
        """One of a group with these rows: two columns of tiles at a time, for all rows of
        a band; after the last band, what is left.
        """
        fours, two, one = self.cut(end - begin)
        bands = lax.div(fours, self.band)  # whole ones
        above = jnp.minimum(lax.div(number, self.across * self.band), bands)
        number = number - above * self.across * self.band
        last = above == bands
        down = jnp.where(last, fours - bands * self.band, self.band)
        each = 2 * down + jnp.where(last, two + one, 0)
        pair = lax.div(number, jnp.maximum(each, 1))
        number = number - pair * each
        columns = jnp.minimum(self.across - 2 * pair, 2)
        right = lax.div(number, jnp.maximum(down, 1))
        tall, further = number < columns * down, number - columns * down
        left = jnp.where((further == 0) & (two == 1), 2, 1)
        units = jnp.where(tall | (columns == 1), 4, left)
        row = jnp.where(
            tall,
            4 * (above * self.band + number - right * down),
            4 * fours + jnp.where(further == 0, 0, 2),
        )
        start = begin + row * self.unit
        count = jnp.minimum(end - start, units * self.unit)
        column = 2 * pair + jnp.where(tall, right, 0)
        return Item(start, count, column, ~tall & (columns == 2))


def schedule_items(sizes_G: Int[Array, " G"], grid: Grid) -> Schedule:
    """Whose items are which, in order: items for tiles."""
    counts_G = grid.count(sizes_G.astype(jnp.int32))
    return scheduled(sizes_G, counts_G, grid.rows, grid.most)


class Items(NamedTuple):
    """All items. The table may be arrays or references to them."""

    table: Schedule
    grid: Grid

    @property
    def count(self) -> Int[Array, ""]:
        """How many there are."""
        last = self.grid.groups - 1
        surplus = self.grid.count(self.grid.rows - self.table.ends[last])
        return self.table.tile_ends[last] + surplus

    def item(self, index) -> tuple[Int[Array, ""], Item]:
        """An item and its group, by its place in the order."""
        table = self.table
        rows = table.begin[index], table.end[index]
        return table.group[index], self.grid.item(index - table.first[index], *rows)
