"""How the Hopper kernel of products of rows shares its work out among clusters: items, and
the order in which every cluster does its own.

Two blocks of a cluster do an item together. Full items take about the same time; short
ones, of the rows that are left of a group, about half of it. Items follow each other group
by group, so that a matrix is read once, and every cluster gets as many of both kinds.

Letters: G groups, T items.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels.grouped_matmul.tiles_gpu import running_sum


class Counts(NamedTuple):
    """Numbers of items."""

    full: Int[Array, "..."]
    short: Int[Array, "..."]


class Cut(NamedTuple):
    """How rows of a group are cut in each column of tiles: first into items of four units,
    one for each of a cluster's warpgroups; what is left, into one of two and one of one.
    """

    fours: Int[Array, "..."]
    two: Int[Array, "..."]  # 0 or 1
    one: Int[Array, "..."]


def _cut(rows, unit: int) -> Cut:
    units = lax.div(rows + unit - 1, unit)
    return Cut(lax.div(units, 4), lax.rem(lax.div(units, 2), 2), lax.rem(units, 2))


def _count(rows, unit: int, across: int) -> Counts:
    """Of a group of so many rows, if there are `across` columns of tiles. Of two units and
    of one, an item has two columns; the last of an odd number of columns is alone.
    """
    fours, two, one = _cut(rows, unit)
    alone = across % 2
    full = fours * across + two * (across // 2)
    return Counts(full, two * alone + one * (across // 2 + alone))


def most_items(rows: int, groups: int, unit: int, across: int) -> Counts:
    """At least the items of any groups, surplus rows included."""
    units, pairs = pl.cdiv(rows, unit) + groups + 1, pl.cdiv(across, 2)
    return Counts(units // 4 * across + (groups + 1) * pairs, 2 * (groups + 1) * pairs)


class ItemSchedule(NamedTuple):
    """Whose items are which, in the order of rows: full ones, then, from `most_items` on,
    short ones. Those of the surplus rows come last, and belong to group G. `Items` says
    the rest: here, it would be more kernels.
    """

    group: Int[Array, " T"]
    first: Int[Array, " T"]  # the number of the group's first item
    before: Int[Array, " T"]  # full items of all groups before
    begin: Int[Array, " T"]  # the group's first row
    end: Int[Array, " T"]  # and the row after its last
    ends: Int[Array, " G"]
    full_ends: Int[Array, " G"]
    short_ends: Int[Array, " G"]


def schedule_items(
    sizes_G: Int[Array, " G"], rows: int, unit: int, across: int
) -> ItemSchedule:
    """By comparing everything with everything: two kernels, where prefix sums, a search
    and gathers are many.
    """
    most = most_items(rows, sizes_G.shape[0], unit, across)
    counts = _count(sizes_G.astype(jnp.int32), unit, across)
    ends_G, full_ends_G, short_ends_G = map(running_sum, (sizes_G, *counts))
    number_T1 = jnp.arange(sum(most))[:, None]
    short_T1 = number_T1 >= most.full
    number_T1 = jnp.where(short_T1, number_T1 - most.full, number_T1)
    ends_TG = jnp.where(short_T1, short_ends_G, full_ends_G)
    past_TG = ends_TG <= number_T1  # groups whose items all come before
    return ItemSchedule(
        past_TG.sum(1, dtype=jnp.int32),
        jnp.where(past_TG, ends_TG, 0).max(1),
        jnp.where(past_TG, full_ends_G, 0).max(1),
        jnp.where(past_TG, ends_G, 0).max(1),
        jnp.where(past_TG, rows, ends_G).min(1),
        *(ends_G, full_ends_G, short_ends_G),
    )


class Item(NamedTuple):
    """Up to four units of a group's rows and one column of tiles, whose matrix the blocks
    share; or, `wide`, up to two units and two columns, and the rows are what they share.
    """

    row: Int[Array, ""]  # the first unit's first row
    count: Int[Array, ""]  # rows from there on
    column: Int[Array, ""]  # the first column of tiles
    wide: Bool[Array, ""]


class State(NamedTuple):
    """What a cluster is to do next."""

    full: Int[Array, ""]
    short: Int[Array, ""]
    due: Int[Array, ""]  # the full item that the short one should come before


class Items(NamedTuple):
    """What one cluster does, in order. The table may be arrays or references to them."""

    table: ItemSchedule | Any
    rows: int
    groups: int
    unit: int
    across: int
    band: int  # items of four units, one below the other, that are walked together
    clusters: int
    cluster: Int[Array, ""]

    @property
    def most(self) -> Counts:
        """Where short items begin."""
        return most_items(self.rows, self.groups, self.unit, self.across)

    @property
    def counts(self) -> Counts:
        """How many there are."""
        table, last = self.table, self.groups - 1
        surplus = _count(self.rows - table.ends[last], self.unit, self.across)
        counts = table.full_ends[last], table.short_ends[last]
        return Counts(counts[0] + surplus.full, counts[1] + surplus.short)

    def first(self) -> tuple[State, Int[Array, ""]]:
        """How it begins, and how many items there are: every so manieth of either kind.
        Clusters that get a full one less are the first to get a short one.
        """
        (full, short), cluster = self.counts, self.cluster
        begin = cluster - lax.rem(full, self.clusters)
        begin = jnp.where(begin < 0, begin + self.clusters, begin)
        count = self._share(full, cluster) + self._share(short, begin)
        return State(cluster, begin, self._due(begin)), count

    def _share(self, count, begin):
        left = jnp.maximum(count - begin, 0)
        return lax.div(left + self.clusters - 1, self.clusters)

    def following(self, _, state: State) -> tuple[Int[Array, ""], State]:
        """The next item's place in the table, and what comes after it."""
        counts, (full, short, due) = self.counts, state
        takes = (short < counts.short) & ((due <= full) | (full >= counts.full))
        index = jnp.where(takes, self.most.full + short, full)
        full = full + jnp.where(takes, 0, self.clusters)
        short = short + jnp.where(takes, self.clusters, 0)
        due = lax.cond(takes, lambda: self._due(short), lambda: due)
        return index, State(full, short, due)

    def _due(self, short):
        """After those whose matrices it shares, while they are in the L2 cache."""
        table, most = self.table, self.most
        index = most.full + jnp.minimum(short, most.short - 1)
        begin, end = table.begin[index], table.end[index]
        column = self._short(short - table.first[index], begin, end).column
        fours, two, _ = _cut(end - begin, self.unit)
        bands = lax.div(fours, self.band)
        each = 2 * (fours - bands * self.band) + two
        after = bands * self.across * self.band + (lax.div(column, 2) + 1) * each
        return table.before[index] + after

    def item(self, index) -> tuple[Int[Array, ""], Item]:
        """An item and its group, by its place in the table."""
        table, short = self.table, index >= self.most.full
        begin, end = table.begin[index], table.end[index]
        number = index - jnp.where(short, self.most.full, 0) - table.first[index]
        kinds = self._short(number, begin, end), self._full(number, begin, end)
        item = Item(*(jnp.where(short, *either) for either in zip(*kinds)))
        return table.group[index], item

    def _full(self, number, begin, end) -> Item:
        """Two columns of tiles at a time, for all rows of a band: what items side by side
        share stays in the L2 cache.
        """
        unit, across, band = self.unit, self.across, self.band
        fours, two, _ = _cut(end - begin, unit)
        bands = lax.div(fours, band)  # whole ones
        above = jnp.minimum(lax.div(number, across * band), bands)
        number = number - above * across * band
        down = jnp.where(above == bands, fours - bands * band, band)
        each = 2 * down + jnp.where(above == bands, two, 0)  # of two columns
        pair = lax.div(number, jnp.maximum(each, 1))
        number = number - pair * each
        right = lax.div(number, jnp.maximum(down, 1))
        wide = number >= 2 * down  # in no column that is alone: its are short
        row = jnp.where(wide, fours, above * band + number - right * down) * 4 * unit
        count = jnp.minimum(end - begin - row, jnp.where(wide, 2, 4) * unit)
        return Item(begin + row, count, 2 * pair + jnp.where(wide, 0, right), wide)

    def _short(self, number, begin, end) -> Item:
        """Of one unit; after them the one of two units in a column that is alone."""
        fours, two, one = _cut(end - begin, self.unit)
        single = number < pl.cdiv(self.across, 2) * one
        row = (4 * fours + jnp.where(single, 2 * two, 0)) * self.unit
        count = jnp.minimum(end - begin - row, jnp.where(single, 1, 2) * self.unit)
        column = jnp.where(single, 2 * number, self.across - 1)
        return Item(begin + row, count, column, column + 1 < self.across)
