"""Softmax attention on given queries, keys and values.

Letters: B batch, T queries, S keys, K kv heads, G queries of one kv head, H query and
key size, U value size.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dsjax.nn.options import keep
from pallas_kernels.flash_attention.api import flash_attention, supported

QUERY_BLOCK = 512  # longer sequences attend in blocks of this many queries


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sight:
    """Who sees whom: a query sees the keys up to index `last` of its own segment.

    A record instead of a mask: nothing of size T x S exists before a block needs it.
    `causal` says that nothing else is in it than every token's past and itself.
    """

    last_BT: Int[Array, "#B T"]
    segments_BT: Int[Array, "B T"] | None = None  # None: all one
    segments_BS: Int[Array, "B S"] | None = None
    causal: bool = field(metadata={"static": True}, default=False)

    def mask(self, keys: int) -> Bool[Array, "#B T S"]:
        """True where a query sees a key."""
        mask = jnp.arange(keys) <= self.last_BT[:, :, None]
        if self.segments_BT is not None:
            mask &= self.segments_BT[:, :, None] == self.segments_BS[:, None]
        return mask


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    sight: Sight,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T K G U"]:
    """softmax(scale * q k) v, the softmax in `dtype`; `sight` says who sees whom.

    Scores of at most QUERY_BLOCK queries exist at a time. For the gradient only the
    operands, the result and a log-sum-exp for each query and head are kept; the
    softmax is computed again from them. A fused kernel takes over what it can.
    """
    if sight.causal and dtype == jnp.float32 and supported(q_BTKGH, k_BSKH, v_BSKU):
        return flash_attention(q_BTKGH, k_BSKH, v_BSKU, scale=scale)
    queries = (sight.last_BT, sight.segments_BT)
    options = _Options(scale, jnp.dtype(dtype))
    return _attend(options, q_BTKGH, k_BSKH, v_BSKU, queries, sight.segments_BS)


class _Options(NamedTuple):
    scale: float
    dtype: np.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, queries, segments_BS):
    return _forward(options, q, k, v, queries, segments_BS)[0]


def _forward(options, q_BTKGH, k_BSKH, v_BSKU, queries, segments_BS):
    def block(_, part):
        q, queries = part
        scores = _scores(options, q, k_BSKH, queries, segments_BS)
        weights, lse = softmax(scores)
        out = jnp.einsum("BKGTS,BSKU->BTKGU", weights.astype(v_BSKU.dtype), v_BSKU)
        return None, (out, jnp.moveaxis(lse, 3, 1))

    parts = (q_BTKGH, queries)
    _, results = _walk(block, None, parts, q_BTKGH.shape[1])
    out_BTKGU, lse_BTKG = map(keep, results)
    saved = (q_BTKGH, k_BSKH, v_BSKU, queries, segments_BS, out_BTKGU, lse_BTKG)
    return out_BTKGU, saved


def _backward(options, saved, dout_BTKGU):
    q_BTKGH, k_BSKH, v_BSKU, queries, segments_BS, out_BTKGU, lse_BTKG = saved
    scale, dtype = options
    wide = {"preferred_element_type": dtype}
    # What the softmax's normalisation takes off every weight's gradient.
    mean_BTKG = (dout_BTKGU.astype(dtype) * out_BTKGU.astype(dtype)).sum(axis=-1)

    def block(sums, part):
        q, queries, lse, dout, mean = part
        lse, mean = (jnp.moveaxis(x, 1, 3)[..., None] for x in (lse, mean))
        weights = jnp.exp(_scores(options, q, k_BSKH, queries, segments_BS) - lse)
        dweights = jnp.einsum("BTKGU,BSKU->BKGTS", dout, v_BSKU, **wide)
        dscores = (weights * (dweights - mean) * scale).astype(q.dtype)
        dq = jnp.einsum("BKGTS,BSKH->BTKGH", dscores, k_BSKH)
        dk, dv = sums
        dk += jnp.einsum("BKGTS,BTKGH->BSKH", dscores, q, **wide)
        weights = weights.astype(dout.dtype)
        dv += jnp.einsum("BKGTS,BTKGU->BSKU", weights, dout, **wide)
        return (dk, dv), dq

    sums = jnp.zeros_like(k_BSKH, dtype), jnp.zeros_like(v_BSKU, dtype)
    parts = (q_BTKGH, queries, lse_BTKG, dout_BTKGU, mean_BTKG)
    (dk, dv), dq = _walk(block, sums, parts, q_BTKGH.shape[1])
    return dq, dk.astype(k_BSKH.dtype), dv.astype(v_BSKU.dtype), None, None


_attend.defvjp(_forward, _backward)


def _scores(options, q_BTKGH, k_BSKH, queries, segments_BS):
    """Scaled and masked, [B, K, G, T, S]."""
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=options.dtype
    )
    last_BT, segments_BT = queries
    sight = Sight(last_BT=last_BT, segments_BT=segments_BT, segments_BS=segments_BS)
    return hide(scores * options.scale, sight.mask(k_BSKH.shape[1])[:, None, None])


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
