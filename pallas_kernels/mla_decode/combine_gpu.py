"""Putting together what several parts of a Hopper GPU's grid found for one row.

Letters: B rows, M queries of a row, L latent.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode.schedule_gpu import place_of

LOG2E = math.log2(math.e)
LOWEST = -1e30  # a number below all scores, without the trouble of infinities


def combine(
    lengths_B: Int[Array, " B"],
    out_BML: Float[Array, "B M L"],
    lse: Float[Array, "B tiles 64"],
    sums: Float[Array, "places tiles 64 L"],
    lses: Float[Array, "places tiles 64"],
    *,
    slots: int,
    parts: int,
) -> tuple[Float[Array, "B M L"], Float[Array, "B tiles 64"]]:
    """The outputs, in place, with the rows that were cut: place 2p of `sums` and `lses`
    is where part p goes on with a row, 2p + 1 is where it begins one that others end.

    Rows that were not cut cost next to nothing.
    """
    if parts == 1:
        return out_BML, lse
    B, M, L = out_BML.shape
    rows = M // lse.shape[1]
    # Many rows are cut a few times each, a few may be cut often.
    turns = 4 if parts < B else 1
    queries, depth = (2, 4) if B >= 32 else (1, 16)

    def kernel(lengths, sums, lses, out, lse):
        row = lax.axis_index("row")
        first, pieces = place_of(lengths, row, slots=slots, parts=parts)

        def add(i, found, places):
            """Adds `depth` pieces: their loads do not wait for each other."""
            numbers = [i * depth + k for k in range(depth)]
            spots = [2 * (first + jnp.minimum(k, pieces - 1)) for k in numbers]
            spots = [s + (k == 0).astype(jnp.int32) for s, k in zip(spots, numbers)]
            added = []
            for (highest, weight, acc), place in zip(found, places):
                each = [
                    jnp.where(k < pieces, lses[slot, *place], -jnp.inf)
                    for k, slot in zip(numbers, spots)
                ]
                before, highest = highest, functools.reduce(jnp.maximum, each, highest)
                factor = jnp.exp2((before - highest) * LOG2E)
                weight, acc = weight * factor, acc * factor
                for slot, piece in zip(spots, each):
                    factor = jnp.exp2((piece - highest) * LOG2E)
                    weight, acc = weight + factor, acc + sums[slot, *place] * factor
                added.append((highest, weight, acc))
            return added

        def turn(number):
            query = (lax.axis_index("query") * turns + number) * queries
            places = [
                (lax.div(query + q, rows), lax.rem(query + q, rows))
                for q in range(queries)
            ]
            nothing = plgpu.layout_cast(
                jnp.zeros((L,), jnp.float32), plgpu.Layout.WG_STRIDED((L,), 2)
            )
            found = lax.fori_loop(
                0,
                lax.div(pieces + depth - 1, depth),
                functools.partial(add, places=places),
                [(jnp.float32(LOWEST), jnp.float32(0), nothing)] * queries,
            )
            for (highest, weight, acc), (tile, r) in zip(found, places):
                some = weight > 0
                acc = acc * jnp.where(some, 1 / weight, 0.0)
                out[row, tile * rows + r] = acc.astype(out.dtype)
                lse[row, tile, r] = jnp.where(
                    some, highest + jnp.log2(weight) / LOG2E, -jnp.inf
                )

        pl.when(pieces > 1)(lambda: pl.loop(0, turns)(turn))

    out_ref, lse_ref = jax.new_ref(out_BML), jax.new_ref(lse)
    pl.kernel(
        kernel,
        mesh=plgpu.Mesh(grid=(M // (turns * queries), B), grid_names=("query", "row")),
        name="mla_decode_combine",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(lengths_B, sums, lses, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)
