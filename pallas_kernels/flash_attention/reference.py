"""Softmax attention in plain JAX, on any platform: blocks of queries against all keys.

Letters: B batch, T queries, S keys, K kv heads, G query heads of each, H size of queries
and keys, U size of values.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 512  # longer sequences attend in blocks of this many queries


class Visible(NamedTuple):
    """Who sees whom: a query sees the keys up to index `last` of its own segment."""

    last_BT: Int[Array, "#B T"] | None = None  # None: each query up to its own index
    segments_BT: Int[Array, "B T"] | None = None  # None: all one
    segments_BS: Int[Array, "B S"] | None = None  # None: those of the queries

    def mask(self, keys: int) -> Bool[Array, "#B T S"]:
        """True where a query sees a key; `last_BT` has to be there."""
        mask = jnp.arange(keys) <= self.last_BT[:, :, None]
        if self.segments_BT is not None:
            mask &= self.segments_BT[:, :, None] == self.segments_BS[:, None]
        return mask

    def spelt_out(self, queries: int) -> "Visible":
        """The same with nothing left to a default but the absence of segments."""
        last, ours, theirs = self
        last = jnp.arange(queries)[None] if last is None else last
        return Visible(last, ours, ours if theirs is None else theirs)


def forward(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    visible: Visible,
    *,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T K G U"], Float[Array, "B T K G"]]:
    """softmax(scale * q k) v and its log-sum-exp, the softmax in `dtype`.

    Scores of at most QUERY_BLOCK queries exist at a time.
    """
    last_BT, segments_BT, segments_BS = visible.spelt_out(q_BTKGH.shape[1])

    def block(_, part):
        q, *seen = part
        scores = _scores(q, k_BSKH, Visible(*seen, segments_BS), scale, dtype)
        weights, lse = softmax(scores)
        out = jnp.einsum("BKGTS,BSKU->BTKGU", weights.astype(v_BSKU.dtype), v_BSKU)
        return None, (out, jnp.moveaxis(lse, 3, 1))

    parts = (q_BTKGH, last_BT, segments_BT)
    return _walk(block, None, parts, q_BTKGH.shape[1])[1]


def backward(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    visible: Visible,
    out_BTKGU: Float[Array, "B T K G U"],
    lse_BTKG: Float[Array, "B T K G"],
    dout_BTKGU: Float[Array, "B T K G U"],
    *,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B S K H"], Float[Array, "B S K U"]]:
    """The gradients of q, k and v; the softmax is computed again from `lse`."""
    last_BT, segments_BT, segments_BS = visible.spelt_out(q_BTKGH.shape[1])
    wide = {"preferred_element_type": dtype}
    # What the softmax's normalisation takes off every weight's gradient.
    mean_BTKG = (dout_BTKGU.astype(dtype) * out_BTKGU.astype(dtype)).sum(axis=-1)

    def block(sums, part):
        q, last, segments, lse, dout, mean = part
        lse, mean = (jnp.moveaxis(x, 1, 3)[..., None] for x in (lse, mean))
        seen = Visible(last, segments, segments_BS)
        weights = jnp.exp(_scores(q, k_BSKH, seen, scale, dtype) - lse)
        dweights = jnp.einsum("BTKGU,BSKU->BKGTS", dout, v_BSKU, **wide)
        dscores = (weights * (dweights - mean) * scale).astype(q.dtype)
        dq = jnp.einsum("BKGTS,BSKH->BTKGH", dscores, k_BSKH)
        dk, dv = sums
        dk += jnp.einsum("BKGTS,BTKGH->BSKH", dscores, q, **wide)
        weights = weights.astype(dout.dtype)
        dv += jnp.einsum("BKGTS,BTKGU->BSKU", weights, dout, **wide)
        return (dk, dv), dq

    sums = jnp.zeros_like(k_BSKH, dtype), jnp.zeros_like(v_BSKU, dtype)
    parts = (q_BTKGH, last_BT, segments_BT, lse_BTKG, dout_BTKGU, mean_BTKG)
    (dk, dv), dq = _walk(block, sums, parts, q_BTKGH.shape[1])
    return dq, dk.astype(k_BSKH.dtype), dv.astype(v_BSKU.dtype)


def hide(scores: Array, mask: Array) -> Array:
    """`scores` where `mask` is true; elsewhere so low that no weight is left."""
    # Finite: a padded row, which sees nothing, must not turn to NaN.
    return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def softmax(scores: Array) -> tuple[Array, Array]:
    """Softmax over the last axis, and the log of its denominator without that axis."""
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    powers = jnp.exp(scores - highest)
    total = powers.sum(axis=-1, keepdims=True)
    return powers / total, (highest + jnp.log(total))[..., 0]


def _scores(q_BTKGH, k_BSKH, visible, scale, dtype):
    """Scaled and masked, [B, K, G, T, S]."""
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=dtype
    )
    return hide(scores * scale, visible.mask(k_BSKH.shape[1])[:, None, None])


def _walk(step, carry, parts, length):
    """`step(carry, part)` over blocks of queries, which `parts` have as second axis."""
    if length <= QUERY_BLOCK:
        return step(carry, parts)
    count = math.ceil(length / QUERY_BLOCK)
    padding = count * QUERY_BLOCK - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(
            x.reshape(x.shape[0], count, QUERY_BLOCK, *x.shape[2:]), 1, 0
        )

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    carry, results = jax.lax.scan(step, carry, jax.tree.map(split, parts))
    return carry, jax.tree.map(join, results)
