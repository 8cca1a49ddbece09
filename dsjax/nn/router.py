"""Which experts a token goes to, and with what weight: all three generations.

MoE: softmax, the top k, weights as they are (2401.06066, section 3). V2: the same within
the best groups, rated by their best expert, weights scaled (2405.04434, section 2.2.2).
V3: sigmoid affinities; a bias and groups rated by their two best experts decide the
choice, the weights are the unbiased affinities over their sum (2412.19437, 2.1.2).

Letters: B batch, T length, D model, E experts, k chosen experts. Affinities are computed in `Precision.router`; all that
follows from them, counts included, is float32.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import Groups, GroupScore, Moe, Score
from dsjax.nn import cache as kv
from dsjax.nn.dropping import kept_rows
from dsjax.nn.exact import exact_product
from dsjax.nn.options import Build, keep
from dsjax.nn.weights import RouterBias, use


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Routing:
    """The router's decision, and what balance losses and the bias update need of it.

    load: how often each expert was chosen, a row. probability: each expert's affinity
    as a share of the token's sum, averaged over the row (P_i of V3's equation 19).
    entropy: of those shares of a token, in nats, averaged over the row; a figure to
    watch, without gradient. ln E is a router without preference. kept: false for
    choices that are dropped; None drops none. Load and probability are from before.
    """

    indices_BTk: Int[Array, "*L B T k"]
    weights_BTk: Float[Array, "*L B T k"]
    load_BE: Float[Array, "*L B E"]
    probability_BE: Float[Array, "*L B E"]
    entropy_B: Float[Array, "*L B"]
    kept_BTk: Bool[Array, "*L B T k"] | None = None


class Router(nnx.Module):
    """Scores every expert for every token and chooses top_k of them."""

    def __init__(self, config: Moe, d_model: int, *, build: Build):
        self.config, self.dtype = config, build.precision.router
        shape, sharding = (config.num_experts, d_model), build.sharding
        self.weight_ED = build.weight(shape, sharding.router_ED)
        if config.selection_bias:
            zeros = jnp.zeros((config.num_experts,), jnp.float32)
            metadata = build.metadata(sharding.router_bias_E)
            self.bias_E = RouterBias(zeros, **metadata)

    def __call__(self, x_BTD: Float[Array, "B T D"], context: kv.Context) -> Routing:
        """The routing of every token."""
        logits_BTE = keep(_logits(x_BTD, use(self.weight_ED, self.dtype)))
        match self.config.score:
            case Score.SOFTMAX:
                scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
            case Score.SIGMOID:
                scores_BTE = jax.nn.sigmoid(logits_BTE)
        bias_E = use(self.bias_E, jnp.float32) if self.config.selection_bias else None
        routing = route(scores_BTE, bias_E, self.config)
        if context.dropping is None:
            return routing
        kept_BTk = kept_rows(
            context.dropping,
            routing.indices_BTk,
            jax.lax.stop_gradient(_pick(scores_BTE, routing.indices_BTk)),
            context.protected_B,
            experts=self.config.num_experts,
        )
        return replace(routing, kept_BTk=kept_BTk)


def _logits(
    x_BTD: Float[Array, "B T D"], weight_ED: Float[Array, "E D"]
) -> Float[Array, "B T E"]:
    """The product in the dtype of the weight, without rounding in between."""
    if (x_BTD.dtype, weight_ED.dtype) == (jnp.bfloat16, jnp.float32):
        return exact_product(x_BTD, weight_ED)
    x_BTD = x_BTD.astype(weight_ED.dtype)
    return jnp.einsum("BTD,ED->BTE", x_BTD, weight_ED, precision="highest")


def route(
    scores_BTE: Float[Array, "B T E"], bias_E: Float[Array, " E"] | None, config: Moe
) -> Routing:
    """Chooses experts by biased, group-limited scores; weighs them by the raw ones."""
    scores_BTE = scores_BTE.astype(jnp.float32)
    choice = jax.lax.stop_gradient(
        scores_BTE if bias_E is None else scores_BTE + bias_E
    )
    if config.groups is not None:
        choice = _limit_to_groups(choice, config.groups)
    best = jax.lax.top_k(choice, config.mask_best + config.top_k)[1]
    indices_BTk = keep(best[..., config.mask_best :])  # a sort is slow to do again
    weights_BTk = _pick(scores_BTE, indices_BTk)
    if config.renormalize:
        weights_BTk /= weights_BTk.sum(axis=-1, keepdims=True) + 1e-20
    share_BTE = scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)
    entropy_BT = jax.scipy.special.entr(jax.lax.stop_gradient(share_BTE)).sum(axis=-1)
    return Routing(
        indices_BTk=indices_BTk,
        weights_BTk=weights_BTk * config.scale,
        load_BE=_one_hot(indices_BTk, scores_BTE).sum(axis=(1, 2)),
        probability_BE=share_BTE.mean(axis=1),
        entropy_B=entropy_BT.mean(axis=1),
    )


def _pick(scores_BTE: Array, indices_BTk: Array) -> Array:
    """Each token's scores of its chosen experts."""
    return (scores_BTE[:, :, None] * _one_hot(indices_BTk, scores_BTE)).sum(axis=-1)


def _one_hot(indices_BTk: Array, like_BTE: Array) -> Array:
    return jax.nn.one_hot(indices_BTk, like_BTE.shape[-1], dtype=jnp.float32)


def _limit_to_groups(choice_BTE: Array, groups: Groups) -> Array:
    """-inf outside the kept groups: with a bias, zero could win over a kept expert."""
    grouped = choice_BTE.reshape(*choice_BTE.shape[:2], groups.count, -1)
    match groups.score:
        case GroupScore.MAX:
            rating = grouped.max(axis=-1)
        case GroupScore.TOP2_SUM:
            rating = _two_largest(grouped)
    kept = jax.lax.top_k(rating, groups.kept)[1]
    keep = jax.nn.one_hot(kept, groups.count, dtype=bool).any(axis=-2)
    limited = jnp.where(keep[..., None], grouped, -jnp.inf)
    return limited.reshape(choice_BTE.shape)


def _two_largest(x: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """The sum of the two largest: `top_k` would sort each row, on a TPU one at a time."""
    largest = x.max(axis=-1)
    below = x < largest[..., None]
    next_largest = jnp.where(below, x, -jnp.inf).max(axis=-1)
    alone = (~below).sum(axis=-1) == 1
    return largest + jnp.where(alone, next_largest, largest)
