"""Next-token cross-entropy and V3's multi-token prediction loss, in float32.

Letters: B batch, S window (T inputs + 1), T length, V vocabulary. Losses are in nats.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@jax.custom_vjp
def token_losses(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log p(target) of every position, float32 whatever the logits are.

    The gradient, softmax minus one-hot, is written out: nothing of size [B, T, V] but
    the logits is kept for it, and the pick by index needs no scatter.
    """
    return _forward(logits_BTV, targets_BT)[0]


def _forward(logits_BTV: Array, targets_BT: Array) -> tuple[Array, tuple]:
    logits32_BTV = logits_BTV.astype(jnp.float32)
    lse_BT = jax.nn.logsumexp(logits32_BTV, axis=-1)
    target_BT = _pick(logits32_BTV, targets_BT)
    return lse_BT - target_BT, (logits_BTV, lse_BT, targets_BT)


def _backward(saved: tuple, gradient_BT: Array) -> tuple[Array, None]:
    logits_BTV, lse_BT, targets_BT = saved
    softmax_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - lse_BT[..., None])
    softmax_BTV -= _one_hot(targets_BT, softmax_BTV)
    return (softmax_BTV * gradient_BT[..., None]).astype(logits_BTV.dtype), None


token_losses.defvjp(_forward, _backward)


def _pick(logits_BTV: Array, targets_BT: Array) -> Array:
    """Each position's target logit; by comparison where devices share the vocabulary."""
    if jax.typeof(logits_BTV).sharding.spec[-1] is None:
        return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    one_hot_BTV = _one_hot(targets_BT, logits_BTV)
    return jnp.sum(jnp.where(one_hot_BTV, logits_BTV, 0.0), axis=-1)


def _one_hot(targets_BT: Array, like_BTV: Array) -> Array:
    return targets_BT[..., None] == jnp.arange(like_BTV.shape[-1])


def weighted(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The sum of all positions' cross-entropies, each times its weight."""
    return jnp.sum(token_losses(logits_BTV, targets_BT) * weights_BT)


def mtp_targets(tokens_BS: Int[Array, "B S"]) -> Int[Array, "B T"]:
    """What the first MTP module predicts at each of the T inputs: the token two on (V3,
    section 2.2).

    The last input has no such token in the window; its entry is 0, and its weight has
    to be.
    """
    return jnp.pad(tokens_BS[:, 2:], ((0, 0), (0, 1)))
