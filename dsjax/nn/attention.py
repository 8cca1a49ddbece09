"""Softmax attention on given queries, keys and values.

Letters: B batch, T queries, S keys, K kv heads, G queries of one kv head, H query and
key size, U value size.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.api import flash_attention


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sight:
    """Who sees whom: a query sees the keys up to index `last` of its own segment.

    A record instead of a mask: nothing of size T x S exists before a block needs it.
    `causal` says that `last` is each token's own index, in one sequence of tokens.
    """

    last_BT: Int[Array, "#B T"]
    segments_BT: Int[Array, "B T"] | None = None  # None: all one
    segments_BS: Int[Array, "B S"] | None = None
    causal: bool = field(metadata={"static": True}, default=False)


def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    sight: Sight,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T K G U"]:
    """softmax(scale * q k) v, the softmax in `dtype`; `sight` says who sees whom."""
    whom = {"segments_BT": sight.segments_BT}
    if not sight.causal:
        whom |= {"last_BT": sight.last_BT, "segments_BS": sight.segments_BS}
    return flash_attention(
        q_BTKGH, k_BSKH, v_BSKU, scale=scale, softmax_dtype=dtype, **whom
    )
