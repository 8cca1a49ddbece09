"""Softmax attention on given queries, keys and values.

Letters: B batch, T queries, S keys, K kv heads, G queries of one kv head, H query and
key size, U value size.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

QUERY_BLOCK = 512  # longer sequences attend in blocks of this many queries


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    mask_BTS: Bool[Array, "#B T S"],
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T K G U"]:
    """softmax(scale * q k) v, the softmax in `dtype`; `mask` says who sees whom.

    Scores of at most QUERY_BLOCK queries exist at a time, in the gradient too.
    """
    length = q_BTKGH.shape[1]
    if length <= QUERY_BLOCK:
        return _attend(q_BTKGH, k_BSKH, v_BSKU, mask_BTS, scale, dtype)
    blocks = math.ceil(length / QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(
            x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0
        )

    @jax.checkpoint
    def block(pair):
        q, mask = pair
        return _attend(q, k_BSKH, v_BSKU, mask, scale, dtype)

    out = jax.lax.map(block, (split(q_BTKGH), split(mask_BTS)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def _attend(q_BTKGH, k_BSKH, v_BSKU, mask_BTS, scale, dtype):
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=dtype
    )
    weights = masked_softmax(scores * scale, mask_BTS[:, None, None])
    return jnp.einsum("BKGTS,BSKU->BTKGU", weights.astype(v_BSKU.dtype), v_BSKU)


def masked_softmax(scores: Array, mask: Array) -> Array:
    """Softmax over the last axis where `mask` is true, in the dtype of `scores`."""
    lowest = jnp.finfo(scores.dtype).min  # finite: a padded row must not turn to NaN
    return jax.nn.softmax(jnp.where(mask, scores, lowest), axis=-1)
