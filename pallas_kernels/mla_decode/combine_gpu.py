"""Putting together what several parts of a Hopper GPU's grid found for one row.

Letters: B rows, M queries of a row, L latent.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode.schedule_gpu import place_of
from pallas_kernels.mosaic import load

LOG2E = math.log2(math.e)
LOWEST = -1e30  # a number below all scores, without the trouble of infinities


def combine(
    lengths_B: Int[Array, " B"],
    out_BML: Float[Array, "B M L"],
    lse: Float[Array, "B tiles 64"],
    sums: Float[Array, "places tiles 64 L"],
    units: Float[Array, "places tiles 2 64"],
    lses: Float[Array, "places tiles 64"],
    *,
    slots: int,
    parts: int,
) -> tuple[Float[Array, "B M L"], Float[Array, "B tiles 64"]]:
    """The outputs, in place, with the rows that were cut: place 2p of `sums` and `lses`
    is where part p goes on with a row, 2p + 1 is where it begins one that others end.
    `sums` are float16, in bfloat16's clothes; either half of a query's has a unit.

    Rows that were not cut cost next to nothing.
    """
    if parts == 1:
        return out_BML, lse
    B, M, _ = out_BML.shape
    rows = M // lse.shape[1]
    # Many rows are cut a few times each, a few may be cut often. Where there are more rows
    # than parts, most are whole: few blocks are to find that out.
    queries, depth = (4, 2) if B >= 32 else (1, 16)
    turns = math.gcd(M // queries, 4) if parts < B else 1

    def kernel(lengths, *refs):
        row = lax.axis_index("row")
        first, pieces = place_of(lengths, row, slots=slots, parts=parts)
        one = _Row(row, first, pieces, rows, queries, depth, turns, *refs)
        pl.when(pieces > 1)(lambda: pl.loop(0, turns)(one.turn))

    out_ref, lse_ref = jax.new_ref(out_BML), jax.new_ref(lse)
    pl.kernel(
        kernel,
        mesh=plgpu.Mesh(grid=(M // (turns * queries), B), grid_names=("query", "row")),
        name="mla_decode_combine",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(
        lengths_B,
        lax.bitcast_convert_type(sums, jnp.float16),
        *(units, lses, out_ref, lse_ref),
    )
    return jax.freeze(out_ref), jax.freeze(lse_ref)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row in one block of threads, which puts together some of its queries."""

    row: Any
    first: Any  # the part where it begins
    pieces: Any
    rows: int  # queries of a tile
    queries: int  # at once
    depth: int  # pieces at once
    turns: int
    sums: Any
    units: Any
    lses: Any
    out: Any
    lse: Any

    @property
    def latent(self) -> tuple[int]:
        return self.sums.shape[-1:]

    @property
    def layout(self):
        return plgpu.Layout.WG_STRIDED(self.latent, 4)

    def turn(self, number) -> None:
        """Puts the next queries together."""
        block = lax.axis_index("query")
        query = (block * self.turns + number) * self.queries
        places = [
            (lax.div(query + q, self.rows), lax.rem(query + q, self.rows))
            for q in range(self.queries)
        ]
        nothing = plgpu.layout_cast(jnp.zeros(self.latent, jnp.float32), self.layout)
        found = lax.fori_loop(
            0,
            lax.div(self.pieces + self.depth - 1, self.depth),
            functools.partial(self.add, places=places),
            [(jnp.float32(LOWEST), jnp.float32(0), nothing)] * self.queries,
        )
        for (highest, weight, acc), (tile, r) in zip(found, places):
            some = weight > 0
            acc = acc * jnp.where(some, 1 / weight, 0.0)
            self.out[self.row, tile * self.rows + r] = acc.astype(self.out.dtype)
            self.lse[self.row, tile, r] = jnp.where(
                some, highest + jnp.log2(weight) / LOG2E, -jnp.inf
            )

    def add(self, i, found, places) -> list:
        """Adds `depth` pieces: their loads do not wait for each other."""
        numbers = [i * self.depth + k for k in range(self.depth)]
        spots = [2 * (self.first + jnp.minimum(k, self.pieces - 1)) for k in numbers]
        spots = [s + (k == 0).astype(jnp.int32) for s, k in zip(spots, numbers)]
        added = []
        for (highest, weight, acc), place in zip(found, places):
            each = [
                jnp.where(k < self.pieces, self.lses[slot, *place], -jnp.inf)
                for k, slot in zip(numbers, spots)
            ]
            before, highest = highest, functools.reduce(jnp.maximum, each, highest)
            factor = jnp.exp2((before - highest) * LOG2E)
            weight, acc = weight * factor, acc * factor
            for slot, piece in zip(spots, each):
                factor = jnp.exp2((piece - highest) * LOG2E)
                weight, acc = weight + factor, acc + self.piece(slot, *place) * factor
            added.append((highest, weight, acc))
        return added

    def piece(self, slot, tile, r) -> Array:
        """A query's part of the sum, as a part of the grid left it."""
        left, right = (self.units[slot, tile, half, r] for half in range(2))
        column = plgpu.broadcasted_iota(jnp.int32, self.latent, 0, layout=self.layout)
        scale = jnp.where(column < self.latent[0] // 2, left, right)
        sums = load(self.sums.at[slot, tile, r], layout=self.layout)
        return sums.astype(jnp.float32) * scale
