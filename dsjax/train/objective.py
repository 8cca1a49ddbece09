"""What is minimised: next-token loss, MTP loss, balance losses.

Letters: A microbatches of a step, B sequences of one, S window (T inputs + 1), T length,
L MoE layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from dsjax.config import ModelConfig, Moe
from dsjax.errors import UserError
from dsjax.nn.dropping import Dropping
from dsjax.nn.router import Routing
from dsjax.nn.transformer import Transformer
from dsjax.train import balance, loss
from dsjax.train.schedule import Schedule, is_zero


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The weights of everything beside next-token loss; 0 leaves a term out.

    `sequence_balance`: V3's alpha, and V2's alpha1 (the same formula on softmax
    affinities). `expert_balance`: DeepSeekMoE's alpha1, over the whole microbatch.
    `device_balance`, `communication_balance`: alpha2, alpha3, over `devices` groups of
    experts, per sequence where `sequence_balance` is used (V2), else over the
    microbatch. `bias_speed`: V3's gamma. `mtp`: V3's lambda.

    `chunk` is no weight: it bounds the tokens whose logits exist at once on a device
    (None: 512 MiB of logits). More are quicker and take more memory.
    """

    sequence_balance: float = 0.0
    expert_balance: float = 0.0
    device_balance: float = 0.0
    communication_balance: float = 0.0
    devices: int = 1
    bias_speed: Schedule = 0.0
    mtp: Schedule = 0.0
    dropping: Dropping | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            number = getattr(self, field.name)
            if isinstance(number, int | float) and number < 0:
                raise UserError(f"{field.name}={number} must not be negative")
        if self.chunk == 0:
            raise UserError("chunk=0 tokens have no logits")

    def check(self, config: ModelConfig) -> None:
        """Raises UserError for a term that the model has nothing for."""
        moe = _mixtures(config)
        for name, possible, missing in (
            ("mtp", config.mtp, "multi-token prediction module"),
            ("bias_speed", any(m.selection_bias for m in moe), "selection bias"),
            ("sequence_balance", moe, "routed experts"),
            ("expert_balance", moe, "routed experts"),
            ("device_balance", moe, "routed experts"),
            ("communication_balance", moe, "routed experts"),
            ("dropping", moe, "routed experts"),
        ):
            if not possible and getattr(self, name):
                raise UserError(
                    f"objective.{name}={getattr(self, name)}: "
                    f"{config.name} has no {missing}"
                )
        dropping = self.devices if self.dropping is None else self.dropping.devices
        for part in moe:
            for name, count in (("devices", self.devices), ("dropping", dropping)):
                if part.num_experts % count:
                    raise UserError(
                        f"objective.{name}: {count} devices must divide "
                        f"num_experts={part.num_experts}"
                    )

    def predicts_further(self, config: ModelConfig) -> bool:
        """Whether the MTP module runs."""
        return config.mtp and not is_zero(self.mtp)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Terms:
    """The parts of the objective of some microbatches; those of a step are their sum.

    `balance_loss` has its weights in it, `mtp_loss` has not. `loads` counts choices,
    [L, E] for each of `expert_parts`; `entropies` are the routers', in nats, [L] each.
    """

    loss: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    loads: tuple[Float[Array, "L E"], ...]
    entropies: tuple[Float[Array, " L"], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Shares:
    """What makes means over a step of the sums over one of its microbatches: one over
    the step's targets, one over its microbatches.
    """

    target: Float[Array, ""]
    microbatch: Float[Array, ""]


def shares(batch: Mapping[str, Any]) -> Shares:
    """Of a step whose arrays are [A, B, S].

    A target is a next token of the same document. Where a batch has segments the
    microbatches differ in their number: each target weighs the same.
    """
    count, rows, window = batch["tokens"].shape
    targets = jnp.asarray(count * rows * (window - 1), jnp.int32)
    if "segments" in batch:
        segments = batch["segments"]
        targets = jnp.sum(segments[..., :-1] == segments[..., 1:], dtype=jnp.int32)
    return Shares(
        target=1.0 / jnp.maximum(targets, 1).astype(jnp.float32),
        microbatch=jnp.asarray(1.0 / count, jnp.float32),
    )


def _mixtures(config: ModelConfig) -> list[Moe]:
    """The segments' mixtures of experts, in layer order."""
    parts = (segment.feed_forward for segment in config.segments)
    return [part for part in parts if isinstance(part, Moe)]


def expert_parts(config: ModelConfig, objective: Objective) -> list[str]:
    """The parts of a model that route to experts in training, in layer order, as their
    paths start.
    """
    moe = [isinstance(segment.feed_forward, Moe) for segment in config.segments]
    parts = [f"segments.{number}" for number, has in enumerate(moe) if has]
    return parts + ["mtp.block"] * (objective.predicts_further(config) and moe[-1])


def losses(
    model: Transformer,
    batch: Mapping[str, Any],
    *,
    objective: Objective,
    shares: Shares,
    key: PRNGKeyArray | None = None,
) -> Terms:
    """One microbatch's part of a step's objective. Arrays of the batch are [B, S].

    `key` chooses the sequences that `objective.dropping` protects. V3's equation 24
    takes the mean of MTP's T - 1 targets over T: they are weighted as the T next
    tokens are.
    """
    tokens_BS = model.place(batch["tokens"])
    inputs_BT, next_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    further_BT = loss.mtp_targets(tokens_BS)
    segments_BT = None
    next_weights_BT = jnp.full_like(next_BT, shares.target, dtype=jnp.float32)
    further_weights_BT = next_weights_BT.at[:, -1].set(0.0)
    if "segments" in batch:  # a target in another document does not count
        segments_BS = model.place(batch["segments"])
        segments_BT = segments_BS[:, :-1]
        next_weights_BT *= segments_BT == segments_BS[:, 1:]
        further_weights_BT *= segments_BT == loss.mtp_targets(segments_BS)
    options = {
        "segments_BT": segments_BT,
        "dropping": objective.dropping,
        "rng": None if objective.dropping is None else key,
    }
    output = model.forward(inputs_BT, **options)
    routings = [routing for routing in output.routing if routing is not None]
    entropy = partial(head_loss, model, chunk=objective.chunk)
    mtp = jnp.zeros(())
    if objective.predicts_further(model.config):
        state_BTD, routing = model.predict_further(
            output.hidden_BTD, next_BT, **options
        )
        if routing is not None:  # one layer: give it the stacked ones' leading axis
            routings.append(jax.tree.map(lambda leaf: leaf[None], routing))
        mtp = entropy(state_BTD, further_BT, further_weights_BT)
    mixtures = _mixtures(model.config)
    mixtures += mixtures[-1:]  # MTP's is like the last one
    return Terms(
        loss=entropy(model.final_norm(output.hidden_BTD), next_BT, next_weights_BT),
        mtp_loss=mtp,
        balance_loss=shares.microbatch
        * sum(
            (_balance(objective, *pair) for pair in zip(mixtures, routings)),
            jnp.zeros(()),
        ),
        loads=tuple(routing.load_BE.sum(axis=1) for routing in routings),
        entropies=tuple(
            shares.microbatch * routing.entropy_B.mean(axis=1) for routing in routings
        ),
    )


def head_loss(
    model: Transformer,
    normed_BTD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """The sum of all positions' cross-entropies, each times its weight, of a state that
    has its norm behind it. `chunk`: see `Objective`.
    """
    tied = model.config.tied_embeddings
    head = model.embedding_VD if tied else model.head_VD
    precision = model.precision
    options = {"statistics": precision.statistics, "logits": precision.logits}
    arrays = normed_BTD, head[...], targets_BT, weights_BT
    return loss.cross_entropy(*arrays, chunk=chunk, **options)


def _balance(objective: Objective, moe: Moe, routing: Routing) -> Float[Array, ""]:
    """The weighted balance losses of one part's layers, of those that have a weight."""
    load_LBE, probability_LBE = routing.load_BE, routing.probability_BE
    devices, total = objective.devices, jnp.zeros(())
    if objective.sequence_balance:
        term = balance.sequence_loss(load_LBE, probability_LBE)
        total += objective.sequence_balance * term
    if objective.expert_balance:
        term = balance.expert_loss(load_LBE, probability_LBE)
        total += objective.expert_balance * term
    wise = (lambda x: x) if objective.sequence_balance else balance.batch_wise
    if objective.device_balance:
        term = balance.device_loss(
            wise(load_LBE), wise(probability_LBE), devices=devices
        )
        total += objective.device_balance * term
    if objective.communication_balance:
        sent_LBD = balance.sent(
            routing.indices_BTk, experts=moe.num_experts, devices=devices
        )
        limit = balance.device_limit(moe, devices=devices)
        term = balance.communication_loss(
            wise(sent_LBD), wise(probability_LBE), limit=limit
        )
        total += objective.communication_balance * term
    return total
