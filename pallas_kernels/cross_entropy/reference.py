"""The cross-entropy and its gradient in plain JAX.

Letters: R rows, V vocabulary.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits_RV: Float[Array, "R V"],
    targets_R: Int[Array, " R"],
    weights_R: Float[Array, " R"],
    *,
    dtype: DTypeLike,
    statistics: DTypeLike = jnp.float32,
) -> tuple[Float[Array, " R"], Float[Array, "R V"]]:
    """-log softmax(logits)[target], and weight * (softmax - one-hot)."""
    logits_RV = logits_RV.astype(statistics)
    is_target_RV = targets_R[:, None] == jnp.arange(logits_RV.shape[1])
    shifted_RV = logits_RV - logits_RV.max(axis=1, keepdims=True)
    target_R = jnp.sum(jnp.where(is_target_RV, shifted_RV, 0), axis=1)
    total_R = jnp.sum(jnp.exp(shifted_RV), axis=1)
    softmax_RV = jnp.exp(shifted_RV) / total_R[:, None]
    gradient_RV = (softmax_RV - is_target_RV) * weights_R[:, None]
    return jnp.log(total_R) - target_R, gradient_RV.astype(dtype)
