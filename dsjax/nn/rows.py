"""Moving rows by an index that is known in both directions.

The gradient of a gather is a scatter: on a GPU it adds up atomically, on a TPU row after
row. Where the index and its inverse are both at hand, these two gather both ways; each
is the other's gradient.

Letters: N rows, M places they go to, R places that one row goes to at most, G keys, I
blocks of b elements. An index past the end stands for no row: it gives zeros and takes
nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.spread_rows.api import spread_rows

BLOCK = 128  # elements that are compared with each other


@jax.custom_vjp
def gather_rows(
    x: Float[Array, "N ..."], row_M: Int[Array, " M"], places_NR: Int[Array, "N R"]
) -> Float[Array, "M ..."]:
    """x[row]; `places` are where each row went."""
    if x.ndim == 2:
        return spread_rows(x, places_NR, row_M)
    return _elements(x, row_M)


@jax.custom_vjp
def sum_rows(
    y: Float[Array, "M ..."], places_NR: Int[Array, "N R"], row_M: Int[Array, " M"]
) -> Float[Array, "N ..."]:
    """The sum of each row's places, in float32."""
    columns = (_elements(y, places_N).astype(jnp.float32) for places_N in places_NR.T)
    return sum(columns)


def _elements(x: Array, index: Array) -> Array:
    """x[index], zeros for an index past the end."""
    return x.at[index].get(mode="fill", fill_value=0)


# The empty arrays carry dtypes from one direction to the other.


def _gather_forward(x, row_M, places_NR):
    return gather_rows(x, row_M, places_NR), (row_M, places_NR, jnp.zeros(0, x.dtype))


def _gather_backward(saved, dy):
    row_M, places_NR, like = saved
    return sum_rows(dy, places_NR, row_M).astype(like.dtype), None, None


def _sum_forward(y, places_NR, row_M):
    return sum_rows(y, places_NR, row_M), (places_NR, row_M, jnp.zeros(0, y.dtype))


def _sum_backward(saved, dx):
    places_NR, row_M, like = saved
    return gather_rows(dx.astype(like.dtype), row_M, places_NR), None, None


gather_rows.defvjp(_gather_forward, _gather_backward)
sum_rows.defvjp(_sum_forward, _sum_backward)


def count(values: Int[Array, "..."], size: int) -> Int[Array, " size"]:
    """How often each of 0..size-1 occurs; by comparison, since a scatter is slow."""
    return (values.reshape(-1, 1) == jnp.arange(size)).sum(axis=0, dtype=jnp.int32)


def sorted_places(
    keys_N: Int[Array, " N"], size: int, *, nowhere: int
) -> Int[Array, " N"]:
    """Where each element goes when all are sorted by key, equal ones in their order.

    Keys are from 0 to `size`; elements of key `size` go nowhere: past `nowhere`, each
    to a place of its own. Counted in blocks, by comparison: the TPU compiler takes
    seconds for each sort of this length.
    """
    (N,) = keys_N.shape
    padded = jnp.pad(keys_N, (0, -N % BLOCK), constant_values=size)
    keys_Ib = padded.reshape(-1, BLOCK)
    is_IbG = keys_Ib[..., None] == jnp.arange(size)
    blocks_IG = is_IbG.sum(axis=1, dtype=jnp.int32)
    sizes_G = blocks_IG.sum(axis=0)
    first_IG = jnp.cumsum(blocks_IG, axis=0) - blocks_IG + jnp.cumsum(sizes_G) - sizes_G
    first_Ib = jnp.where(is_IbG, first_IG[:, None], 0).sum(axis=2)
    earlier_bb = jnp.tri(BLOCK, k=-1, dtype=bool)
    equal_Ibb = keys_Ib[:, :, None] == keys_Ib[:, None]
    rank_Ib = (equal_Ibb & earlier_bb).sum(axis=2, dtype=jnp.int32)
    place_N = (first_Ib + rank_Ib).reshape(-1)[:N]
    return jnp.where(keys_N < size, place_N, nowhere + jnp.arange(N))


def inverse(
    place_N: Int[Array, " N"], most: int, *, nowhere: int
) -> Int[Array, " most"]:
    """Which element is at each of the first `most` places; `nowhere` for none."""
    elements = jnp.arange(place_N.shape[0])
    empty = jnp.full(most, nowhere, jnp.int32)
    return empty.at[place_N].set(elements, mode="drop", unique_indices=True)


def first_places(
    places_NR: Int[Array, "N R"], most: int, *, nowhere: int
) -> Int[Array, "N most"]:
    """The same places in `most` columns, for rows that have no more of them; `nowhere`
    is larger than any and marks the columns that are left.
    """
    if most >= places_NR.shape[1]:
        return places_NR
    return jnp.sort(jnp.minimum(places_NR, nowhere), axis=1)[:, :most]
