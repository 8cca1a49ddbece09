"""Keeping the experts evenly used: auxiliary losses, and V3's bias that needs none.

Letters: L MoE layers, B sequences, E experts. `load_LBE` counts how many of a
sequence's tokens chose an expert, `probability_LBE` is the mean over the sequence of
its affinity, normalised over the experts: what the router returns.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def sequence_loss(
    load_LBE: Float[Array, "L B E"], probability_LBE: Float[Array, "L B E"]
) -> Float[Array, ""]:
    """V3's sequence-wise balance loss without its alpha (section 2.1.2): mean over
    sequences, sum over layers.

    sum_i f_i P_i with f_i = E / (k T) * (tokens of the sequence that chose i): 1 when
    all experts are used alike. V2's expert-level loss (section 2.2.3) is the same
    formula on softmax affinities. Gradient flows through P alone.
    """
    share_LBE = load_LBE / jnp.sum(load_LBE, axis=-1, keepdims=True)  # k T in all
    experts = load_LBE.shape[-1]
    loss_LB = experts * jnp.sum(share_LBE * probability_LBE, axis=-1)
    return jnp.sum(jnp.mean(loss_LB, axis=1))


def expert_loss(
    load_LBE: Float[Array, "L B E"], probability_LBE: Float[Array, "L B E"]
) -> Float[Array, ""]:
    """DeepSeekMoE's expert-level balance loss without its alpha (section 3.3): f and P
    over the whole batch.
    """
    return sequence_loss(
        jnp.sum(load_LBE, axis=1, keepdims=True),
        jnp.mean(probability_LBE, axis=1, keepdims=True),
    )


def update_bias(
    bias_LE: Float[Array, "*L E"],
    load_LE: Float[Array, "*L E"],
    *,
    speed: float | Array,
) -> Float[Array, "*L E"]:
    """V3's balancing without a loss: `speed` (gamma) up for experts below the mean
    load, down for those above.

    `load_LE` counts the whole global batch of one step. No gradient is involved.
    """
    mean_L1 = jnp.mean(load_LE, axis=-1, keepdims=True)
    return bias_LE + speed * jnp.sign(mean_L1 - load_LE)


def max_violation(load_LE: Float[Array, "L E"]) -> Float[Array, "L"]:
    """MaxVio (arXiv 2408.15664): the busiest expert's load over the mean, minus 1; 0 is
    perfect balance.
    """
    return jnp.max(load_LE, axis=-1) / jnp.mean(load_LE, axis=-1) - 1.0
