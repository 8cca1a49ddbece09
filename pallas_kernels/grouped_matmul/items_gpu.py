"""How the Hopper kernel of products of rows cuts its work for pairs of blocks: items.

Both blocks of a cluster do an item together. Where a group has rows for all of their
warpgroups, they share a matrix; of what is left of it, they have a column of tiles each,
and share the rows. So few halves of tiles are empty.

All items of two columns of tiles that belong to a group follow each other, and so are
done at about the same time: what they read comes from memory once. One that came a tile
later would find that the L2 cache has forgotten it. Clusters are dealt their items in
that order, those that take less time by themselves.

Letters: G groups, T items, C clusters, W waves.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels.grouped_matmul.tiles_gpu import running_sum, scheduled


class Item(NamedTuple):
    """Up to four units of a group's rows, one for each warpgroup, and one column of tiles;
    or, `wide`, up to two units and two columns.
    """

    row: Int[Array, ""]  # the first unit's first row
    count: Int[Array, ""]  # rows from there on
    column: Int[Array, ""]  # the first column of tiles
    wide: Bool[Array, ""]
    light: Bool[Array, ""]  # at most half of its units have rows
    lights: Int[Array, ""]  # its group's light items before it


class Deal(NamedTuple):
    """Which cluster does which items, so that all end at about the same time: full ones
    go round, light ones go round the other way.
    """

    full: Int[Array, ""]  # how many
    light: Int[Array, ""]
    clusters: int

    def before(self, cluster, full, light) -> Int[Array, "..."]:
        """How many of the first so many of each kind are a cluster's."""
        last = self.clusters - 1
        count = lax.div(full + last - cluster, self.clusters)
        return count + lax.div(light + cluster, self.clusters)

    def count(self, cluster) -> Int[Array, "..."]:
        """How many are a cluster's."""
        return self.before(cluster, self.full, self.light)

    def place(self, full, light, is_light) -> Int[Array, "..."]:
        """Where to find an item before which there are so many of each kind: every
        cluster's first item, every cluster's second, and so on.
        """
        number = lax.rem(jnp.where(is_light, light, full), self.clusters)
        cluster = jnp.where(is_light, self.clusters - 1 - number, number)
        return self.before(cluster, full, light) * self.clusters + cluster


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
    clusters: int

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

    def light(self, rows) -> Int[Array, "..."]:
        """How many of those are light: what is left, if it is one unit of two columns, or
        one or two of the last column alone.
        """
        _, two, one = self.cut(rows)
        pairs, alone = divmod(self.across, 2)
        return one * pairs + lax.rem(two + one, 2) * alone

    @property
    def most(self) -> int:
        """At least the items of any groups, surplus rows included."""
        units, groups = pl.cdiv(self.rows, self.unit), self.groups + 1
        left = 2 * groups * pl.cdiv(self.across, 2)
        return (units + groups) // 4 * self.across + left

    @property
    def waves(self) -> int:
        """More than any cluster has items."""
        return self.most // self.clusters + 4

    def deal(self, end, items, light) -> tuple[Int[Array, ""], Deal]:
        """How many items there are, and who does which: of groups that end at a row and
        have so many, of which some are light, and of surplus rows.
        """
        items += self.count(self.rows - end)
        light += self.light(self.rows - end)
        return items, Deal(items - light, light, self.clusters)

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
        wide = ~tall & (columns == 2)
        row = jnp.where(
            tall,
            4 * (above * self.band + number - right * down),
            4 * fours + jnp.where(further == 0, 0, 2),
        )
        start = begin + row * self.unit
        count = jnp.minimum(end - start, units * self.unit)
        column = 2 * pair + jnp.where(tall, right, 0)
        light = ~tall & (count <= jnp.where(wide, 1, 2) * self.unit)
        return Item(start, count, column, wide, light, jnp.where(last, one * pair, 0))


class Table(NamedTuple):
    """Whose rows are which, of items in order: what `tiles_gpu.Schedule` says of tiles, in
    its order; and who does them.
    """

    group: Int[Array, " T"]
    first: Int[Array, " T"]  # the number of the group's first item
    begin: Int[Array, " T"]  # the group's first row
    end: Int[Array, " T"]  # and the row after its last
    ends: Int[Array, " G"]
    item_ends: Int[Array, " G"]
    light_ends: Int[Array, " G"]
    order: Int[Array, " C*W"]  # the items of a first wave, of a second, ...


def schedule_items(sizes_G: Int[Array, " G"], grid: Grid) -> Table:
    """Of groups of such sizes. Three kernels, and one that writes zeros."""
    sizes_G = sizes_G.astype(jnp.int32)
    tiles = scheduled(sizes_G, grid.count(sizes_G), grid.rows, grid.most)
    light_ends_G = running_sum(grid.light(sizes_G))
    number = jnp.arange(grid.most)
    past_TG = tiles.tile_ends <= number[:, None]
    lights = jnp.where(past_TG, light_ends_G, 0).max(1)
    item = grid.item(number - tiles.first, tiles.begin, tiles.end)
    items, deal = grid.deal(tiles.ends[-1], tiles.tile_ends[-1], light_ends_G[-1])
    lights += item.lights
    place = deal.place(number - lights, lights, item.light)
    nowhere = grid.waves * grid.clusters
    place = jnp.where(number < items, place, nowhere)
    order = jnp.zeros(nowhere, jnp.int32)
    order = order.at[place].set(number, mode="drop", unique_indices=True)
    return Table(*tiles, light_ends_G, order)


class Items(NamedTuple):
    """All items, as one cluster sees them. The table may be arrays or references to them."""

    table: Table
    grid: Grid
    cluster: Int[Array, ""]

    @property
    def count(self) -> Int[Array, ""]:
        """How many are this cluster's."""
        table, last = self.table, self.grid.groups - 1
        ends = table.ends[last], table.item_ends[last], table.light_ends[last]
        _, deal = self.grid.deal(*ends)
        return deal.count(self.cluster)

    def number(self, wave) -> Int[Array, ""]:
        """The place in the order of the one that it does in a wave; after its last, of
        any.
        """
        return self.table.order[wave * self.grid.clusters + self.cluster]

    def item(self, number) -> tuple[Int[Array, ""], Item]:
        """An item and its group, by its place in the order."""
        table = self.table
        rows = table.begin[number], table.end[number]
        return table.group[number], self.grid.item(number - table.first[number], *rows)
