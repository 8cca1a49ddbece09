"""One training step as a pure function: losses, gradients, AdamW, router biases.

Parameters travel as flat dictionaries of dotted path -> array, the names of
`dsjax.nn.weights.flat`; the Transformer is put together from them inside the step.

Letters: B batch, S window (T inputs + 1), L MoE layers, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from dsjax.config import ModelConfig, Moe
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import RouterBias, flat
from dsjax.train import balance, loss

Weights = dict[str, Array]  # dotted path -> array
Rate = float | optax.Schedule


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is optimised beside next-token loss. Numbers, or schedules of the step.

    Defaults are V3's (section 4.2): sequence-wise balance alpha, bias update speed
    gamma, weight lambda of the MTP loss. A model without an MTP module or without
    selection biases does without those terms.
    """

    sequence_balance: Rate = 1e-4
    bias_speed: Rate = 1e-3
    mtp: Rate = 0.3


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes; every leaf rests where its parameter does."""

    step: Int[Array, ""]
    params: Weights
    biases: Weights  # of the routers: moved by `balance.update_bias` alone
    moments: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Terms:
    """The parts of the objective. `loads` counts the batch's choices, [L, E] for each of
    `expert_parts`.
    """

    loss: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    loads: tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One step's figures, from before its update. Losses in nats a token.

    `load` and `max_violation` have an entry for each MoE layer, the MTP module's last.
    """

    loss: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    load_LE: Float[Array, "L E"]
    max_violation_L: Float[Array, " L"]


def init_state(
    model: Transformer, optimizer: optax.GradientTransformation
) -> TrainState:
    """A state at step 0 that starts from copies of the model's weights."""
    weights = flat(model)
    params = {k: v[...] for k, v in weights.items() if isinstance(v, nnx.Param)}
    biases = {k: v[...] for k, v in weights.items() if isinstance(v, RouterBias)}

    @jax.jit
    def init(params: Weights, biases: Weights) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=jax.tree.map(jnp.copy, params),
            biases=jax.tree.map(jnp.copy, biases),
            moments=optimizer.init(params),
        )

    with jax.set_mesh(model.mesh):
        return init(params, biases)


def write_back(model: Transformer, state: TrainState) -> None:
    """Puts a state's weights into the model."""
    for path, variable in flat(model).items():
        variable.set_value({**state.params, **state.biases}[path])


def make_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    recipe: Recipe | None = None,
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """A compiled step (state, batch) -> (state, metrics) for models like `model`.

    A batch holds "tokens" int32 [B, S] and, if documents shall not see each other,
    "segments" int32 [B, S]. The old state's buffers are reused: do not touch it again.
    """
    recipe = Recipe() if recipe is None else recipe
    build, parts = _builder(model), expert_parts(model.config)

    def objective(params: Weights, state: TrainState, batch: Mapping[str, Array]):
        terms = losses(build(params | state.biases), batch)
        total = terms.loss + _at(recipe.mtp, state.step) * terms.mtp_loss
        total += _at(recipe.sequence_balance, state.step) * terms.balance_loss
        return total, terms

    @jax.jit(donate_argnums=0)
    def step(state: TrainState, batch: Mapping[str, Array]):
        gradients, terms = jax.grad(objective, has_aux=True)(state.params, state, batch)
        updates, moments = optimizer.update(gradients, state.moments, state.params)
        speed = _at(recipe.bias_speed, state.step)
        new = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            biases=_balanced(state.biases, dict(zip(parts, terms.loads)), speed),
            moments=moments,
        )
        return new, _metrics(terms, optax.tree.norm(gradients))

    def run(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(model.mesh):
            return step(state, dict(batch))

    return run


def expert_parts(config: ModelConfig) -> list[str]:
    """The parts of a model that route to experts, in layer order, as their paths start."""
    moe = [isinstance(segment.feed_forward, Moe) for segment in config.segments]
    parts = [f"segments.{number}" for number, has in enumerate(moe) if has]
    return parts + ["mtp.block"] * (config.mtp and moe[-1])


def losses(model: Transformer, batch: Mapping[str, Array]) -> Terms:
    """All parts of the objective, and the expert loads, of one batch."""
    tokens_BS = model.place(batch["tokens"])
    inputs_BT, next_BT = tokens_BS[:, :-1], tokens_BS[:, 1:]
    segments_BT = next_mask_BT = mtp_mask_BT = None
    if "segments" in batch:  # a target in another document does not count
        segments_BS = model.place(batch["segments"])
        segments_BT = segments_BS[:, :-1]
        next_mask_BT = segments_BT == segments_BS[:, 1:]
        mtp_mask_BT = segments_BT == loss.mtp_targets(segments_BS)
    output = model.forward(inputs_BT, segments_BT=segments_BT)
    routings = [routing for routing in output.routing if routing is not None]
    mtp = jnp.zeros(())
    if model.config.mtp:
        further_BTD, routing = model.predict_further(
            output.hidden_BTD, next_BT, segments_BT=segments_BT
        )
        if routing is not None:  # one layer: give it the stacked ones' leading axis
            routings.append(jax.tree.map(lambda leaf: leaf[None], routing))
        mtp = loss.mtp_loss(
            model.head(further_BTD), loss.mtp_targets(tokens_BS), mtp_mask_BT
        )
    return Terms(
        loss=loss.next_token_loss(
            model.logits(output.hidden_BTD), next_BT, next_mask_BT
        ),
        mtp_loss=mtp,
        balance_loss=sum(
            balance.sequence_loss(routing.load_BE, routing.probability_BE)
            for routing in routings
        ),
        loads=tuple(routing.load_BE.sum(axis=1) for routing in routings),
    )


def _balanced(biases: Weights, loads: dict[str, Array], speed: Array) -> Weights:
    """Every router's bias after the load of the whole batch: [L, E], or [E] in MTP."""
    new = {}
    for name, load_LE in loads.items():
        path = f"{name}.feed_forward.router.bias_E"
        if path in biases:
            bias = biases[path]
            update = balance.update_bias(bias, load_LE.reshape(bias.shape), speed=speed)
            new[path] = update
    return biases | new


def _metrics(terms: Terms, gradient_norm: Array) -> Metrics:
    load_LE = jnp.concatenate(terms.loads) if terms.loads else jnp.zeros((0, 1))
    return Metrics(
        loss=terms.loss,
        mtp_loss=terms.mtp_loss,
        balance_loss=terms.balance_loss,
        gradient_norm=gradient_norm,
        load_LE=load_LE,
        max_violation_L=balance.max_violation(load_LE),
    )


def _builder(model: Transformer) -> Callable[[Weights], Transformer]:
    """A function from weights by path to a Transformer like `model`."""
    graph, state = nnx.split(model)
    leaves = nnx.to_flat_state(state)

    def build(weights: Weights) -> Transformer:
        filled = [
            (path, variable.replace(weights[".".join(map(str, path))]))
            for path, variable in leaves
        ]
        return nnx.merge(graph, nnx.from_flat_state(filled))

    return build


def _at(rate: Rate, step: Array) -> Array:
    return jnp.asarray(rate(step) if callable(rate) else rate, jnp.float32)
