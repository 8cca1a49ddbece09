"""Keeping the experts evenly used: auxiliary losses, and V3's bias that needs none.

Letters: L MoE layers, B sequences, T length, k chosen experts, E experts, D devices:
equal groups of experts that follow each other. The router counts for each sequence:
`load_LBE`, how many of its tokens chose an expert; `probability_LBE`, the mean over its
tokens of the affinity, normalised over the experts. Both are from before any dropping.

The losses take f and P of every sequence for itself, as V2 and V3 do. Given what
`batch_wise` makes of the router's figures, they are those of DeepSeekMoE, whose f and P
span the batch. All come without their alpha, as a mean over sequences and a sum over
layers; gradient flows through P alone.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from dsjax.config import Moe
from dsjax.errors import UserError


def batch_wise(per_LBX: Float[Array, "L B X"]) -> Float[Array, "L 1 X"]:
    """A figure of each sequence as one of the whole batch; sequences are of one length.

    For `load_LBE` this is the mean of the counts: the losses use its shares alone.
    """
    return jnp.mean(per_LBX, axis=1, keepdims=True)


def sequence_loss(
    load_LBE: Float[Array, "L B E"], probability_LBE: Float[Array, "L B E"]
) -> Float[Array, ""]:
    """V3's sequence-wise balance loss (2412.19437, section 2.1.2).

    sum_i f_i P_i with f_i = E / (k T) * (tokens of the sequence that chose i): 1 when
    all experts are used alike. V2's expert-level loss (2405.04434, section 2.2.3) is the
    same formula on softmax affinities.
    """
    return _over_layers(_frequency(load_LBE) * probability_LBE)


def expert_loss(
    load_LBE: Float[Array, "L B E"], probability_LBE: Float[Array, "L B E"]
) -> Float[Array, ""]:
    """DeepSeekMoE's expert-level balance loss (2401.06066, section 3.3): f and P over
    the whole batch.
    """
    return sequence_loss(batch_wise(load_LBE), batch_wise(probability_LBE))


def device_loss(
    load_LBE: Float[Array, "L B E"],
    probability_LBE: Float[Array, "L B E"],
    *,
    devices: int,
) -> Float[Array, ""]:
    """The device-level loss (2401.06066, section 3.3; 2405.04434, section 2.2.3).

    sum_d f'_d P'_d: f'_d is the mean of its experts' f, P'_d the sum of their P. 1 when
    all devices are used alike. Raises UserError when `devices` does not divide E.
    """
    mean_LBD = _by_device(_frequency(load_LBE), devices).mean(axis=-1)
    return _over_layers(mean_LBD * _by_device(probability_LBE, devices).sum(axis=-1))


def communication_loss(
    sent_LBD: Float[Array, "L B D"],
    probability_LBE: Float[Array, "L B E"],
    *,
    limit: int,
) -> Float[Array, ""]:
    """V2's communication balance loss (section 2.2.3), of what `sent` gives.

    sum_d f''_d P''_d: f''_d = D / (M T) * (tokens sent to d), with M = `limit` devices a
    token at most; P''_d is the sum of its experts' P. Raises UserError when D does not
    divide E.
    """
    devices = sent_LBD.shape[-1]
    frequency_LBD = devices / limit * sent_LBD
    probability_LBD = _by_device(probability_LBE, devices).sum(axis=-1)
    return _over_layers(frequency_LBD * probability_LBD)


def sent(
    indices_LBTk: Int[Array, "L B T k"], *, experts: int, devices: int
) -> Float[Array, "L B D"]:
    """The share of a sequence's tokens that have a chosen expert on each device."""
    _check(experts, devices)
    device_LBTk1 = indices_LBTk[..., None] // (experts // devices)
    there_LBTD = jnp.any(device_LBTk1 == jnp.arange(devices), axis=-2)
    return jnp.mean(there_LBTD.astype(jnp.float32), axis=2)


def device_limit(moe: Moe, *, devices: int) -> int:
    """On how many of `devices` one token's experts are at most: V2's M."""
    if moe.groups is not None and moe.groups.count == devices:
        return min(moe.groups.kept, moe.top_k)
    return min(devices, moe.top_k)


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


def _frequency(load_LBE: Array) -> Array:
    """f_i: an expert's load over the mean load; the loads of a sequence sum to k T."""
    return load_LBE / jnp.mean(load_LBE, axis=-1, keepdims=True)


def _by_device(per_LBE: Array, devices: int) -> Array:
    """[L, B, D, E / D]: the experts of each device."""
    _check(per_LBE.shape[-1], devices)
    return per_LBE.reshape(*per_LBE.shape[:-1], devices, -1)


def _over_layers(product_LBX: Array) -> Array:
    return jnp.sum(jnp.mean(jnp.sum(product_LBX, axis=-1), axis=1))


def _check(experts: int, devices: int) -> None:
    if experts % devices:
        raise UserError(f"devices={devices} must divide num_experts={experts}")
