"""The input embedding, its vocabulary cut over the mesh.

Letters: B batch, T length, D model, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.nn.groups import equal_parts
from dsjax.sharding import axes_of

CHUNK = 8192  # tokens that a device looks up at once, others' among them


def look_up(
    table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Each token's row of the table, in `dtype`; `table` is as it rests on the mesh.

    The table is never whole on a device. Along the axes that cut the vocabulary, devices
    look up each other's tokens, each in its own part, and the parts are added: all but
    one are zero; in chunks, since all of their rows together are many. Rows are cast
    after the look-up: a frequent token's gradient is a sum over thousands of positions,
    which bfloat16 would round away.
    """
    table, tokens = (jax.typeof(x).sharding.spec for x in (table_VD, tokens_BT))
    vocabulary, stored = axes_of(table[0]), axes_of(table[1])
    batch = axes_of(tokens[0])

    shared = [axis for axis in vocabulary if axis in batch]

    def parts(table_VD, tokens_N):
        """Rows of a chunk of this device's tokens."""
        for axis in reversed(shared):
            tokens_N = jax.lax.all_gather(tokens_N, axis, tiled=True)
        size = table_VD.shape[0]
        row_N = tokens_N - (jax.lax.axis_index(vocabulary) * size if vocabulary else 0)
        row_N = jnp.where(row_N < 0, size, row_N)  # a negative index would wrap
        x_ND = table_VD.at[row_N].get(mode="fill", fill_value=0).astype(dtype)
        for axis in shared:
            x_ND = jax.lax.psum_scatter(x_ND, axis, tiled=True)
        return jax.lax.psum(x_ND, tuple(a for a in vocabulary if a not in batch))

    def local(table_VD, tokens_BT):
        for axis in reversed(stored):  # one at a time: two compile to an all-reduce
            table_VD = jax.lax.all_gather(table_VD, axis, axis=1, tiled=True)
        rows, together = tokens_BT.size, math.prod(map(jax.lax.axis_size, shared))
        chunks = equal_parts(rows, -(-rows * together // CHUNK))
        if chunks == 1 or together == 1:  # or no more rows than the result has
            return parts(table_VD, tokens_BT.reshape(-1)).reshape(*tokens_BT.shape, -1)
        x = jax.lax.map(
            lambda tokens_N: parts(table_VD, tokens_N), tokens_BT.reshape(chunks, -1)
        )
        return x.reshape(*tokens_BT.shape, -1)

    return jax.shard_map(
        local,
        in_specs=(table, tokens),
        out_specs=P(tokens[0], None, None),
        check_vma=False,
    )(table_VD, tokens_BT)
