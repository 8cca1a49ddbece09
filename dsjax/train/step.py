"""One training step as a pure function: losses, gradients, AdamW, router biases.

Parameters travel as flat dictionaries of dotted path -> array, the names of
`dsjax.nn.weights.flat`; the Transformer is put together from them inside the step.

Letters: A microbatches, B sequences of one, S window (T inputs + 1), L MoE layers, E
experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.train import balance
from dsjax.train.objective import Objective, Terms, expert_parts, losses, shares
from dsjax.train.optimizer import AdamW, adamw, apply, global_norm
from dsjax.train.schedule import Progress, Schedule, value
from dsjax.train.state import TrainState, init_state, write_back
from dsjax.train.zero import Weights, at_rest, gathered

__all__ = [
    "Metrics",
    "Rates",
    "Step",
    "TrainState",
    "init_state",
    "make_step",
    "rates",
    "write_back",
]

LARGE = 2**26  # elements of a stack whose layers' norms are worth a kernel each
Batch = Mapping[str, Any]  # "tokens" int32 [A, B, S], "segments" the same if asked


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rates:
    """What schedules say for one step. Numbers for the compiled step to read: a new
    value compiles nothing.
    """

    learning_rate: Float[Array, ""]
    mtp: Float[Array, ""]
    bias_speed: Float[Array, ""]


def rates(learning_rate: Schedule, objective: Objective, progress: Progress) -> Rates:
    """The rates of the step that follows `progress`, worked out in float64 Python."""
    return Rates(
        learning_rate=np.float32(value(learning_rate, progress)),
        mtp=np.float32(value(objective.mtp, progress)),
        bias_speed=np.float32(value(objective.bias_speed, progress)),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One step's figures, from before its update. Losses in nats a token.

    `balance_loss` is the weighted sum of the balance terms; `gradient_norm` is that
    before clipping. `load`, `max_violation` and `entropy` (of the router, in nats) have
    an entry for each MoE layer, the MTP module's last. `skipped`: loss or gradient were
    not finite, and nothing was updated.
    """

    loss: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    load_LE: Float[Array, "L E"]
    max_violation_L: Float[Array, " L"]
    entropy_L: Float[Array, " L"]
    skipped: Bool[Array, ""]


@dataclass(frozen=True)
class Step:
    """A compiled step: (state, batch, rates) -> (state, metrics).

    The old state's buffers are reused: do not touch it again. Each number of
    microbatches compiles once. `lower` takes the same arguments, or their
    ShapeDtypeStructs.
    """

    compiled: Callable
    mesh: jax.sharding.Mesh

    def __call__(
        self, state: TrainState, batch: Batch, rates: Rates
    ) -> tuple[TrainState, Metrics]:
        """The next state, and figures of this step."""
        with jax.set_mesh(self.mesh):
            return self.compiled(state, dict(batch), rates)

    def lower(
        self, state: TrainState, batch: Batch, rates: Rates
    ) -> jax.stages.Lowered:
        """For a look at its memory, or to compile it for devices that are not here."""
        with jax.set_mesh(self.mesh):
            return self.compiled.lower(state, dict(batch), rates)


def make_step(
    model: Transformer,
    *,
    optimizer: AdamW,
    objective: Objective,
    ema: float = 0.0,
) -> Step:
    """The step for models like `model`.

    A batch holds "tokens" int32 [A, B, S] and, if documents shall not see each other,
    "segments" int32 [A, B, S]; the gradients of A microbatches are added up before the
    one update, in the dtype that the model's precision has for them. `ema` is the decay
    of the average that the state keeps (0: none). Raises UserError when the objective
    has a term that the model has nothing for.
    """
    objective.check(model.config)
    build, transform = _builder(model), adamw(optimizer)
    dtype = model.precision.gradients
    parts = expert_parts(model.config, objective)

    @jax.jit(donate_argnums=0, compiler_options=_compiler_options(model))
    def step(state: TrainState, batch: Batch, rates: Rates):
        def total(params: Weights, microbatch: Batch, key: Array):
            terms = losses(
                build(params | state.biases),
                microbatch,
                objective=objective,
                shares=whole,
                key=key,
            )
            return terms.loss + rates.mtp * terms.mtp_loss + terms.balance_loss, terms

        def gradient(params: Weights, microbatch: Batch, key: Array):
            found, terms = jax.grad(total, has_aux=True)(params, microbatch, key)
            found = {path: leaf.astype(dtype) for path, leaf in found.items()}
            return at_rest(found, model), terms

        whole, key = shares(batch), state.key()
        gradients, terms = _add_up(gradient, gathered(state.params, model), batch, key)
        norm = global_norm(gradients, apart=_unrolled(model))
        updates, moments = transform.update(
            gradients, state.moments, state.params, norm=norm
        )
        params = apply(state.params, updates, rates.learning_rate)
        loads = dict(zip(parts, terms.loads))
        new = replace(
            state,
            params=params,
            biases=_balanced(state.biases, loads, rates.bias_speed),
            moments=moments,
            ema=_averaged(state.ema, params, ema),
        )
        finite = jnp.isfinite(norm) & jnp.isfinite(terms.loss + terms.mtp_loss)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return replace(new, step=state.step + 1), _metrics(terms, norm, finite)

    return Step(step, model.mesh)


def _add_up(
    gradient: Callable, params: Weights, batch: Batch, key: Array
) -> tuple[Weights, Terms]:
    """The sums of `gradient(params, microbatch, key)` over a step's microbatches.

    The sums rest where the state's parameters do, in the dtype of the gradients. A
    single microbatch has neither loop nor sums.
    """

    @partial(jax.jit, inline=True)  # for its shapes and in the loop it is traced once
    def one(microbatch: Batch, index: Array) -> tuple[Weights, Terms]:
        return gradient(params, microbatch, jax.random.fold_in(key, index))

    count = len(batch["tokens"])
    if count == 1:
        return one({name: rows[0] for name, rows in batch.items()}, 0)

    def body(sums, inputs):
        return jax.tree.map(jnp.add, sums, one(*inputs)), None

    inputs = dict(batch), jnp.arange(count)
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding),
        jax.eval_shape(one, *first),
    )
    return jax.lax.scan(body, zeros, inputs)[0]


def _compiler_options(model: Transformer) -> dict[str, str]:
    """On NVIDIA GPUs, loops belong to the CUDA graphs that launch a step, and products
    of the same operand stay apart: together, their results are copied apart again. Worth
    2% of a step (benchmarks/train_speed.md).
    """
    if model.mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return {}
    return {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,"
        "DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL",
        "xla_gpu_dot_merger_threshold_mb": "0",
    }


def _unrolled(model: Transformer) -> set[str]:
    """The paths of large weights whose layers are no loop."""
    return {
        path
        for path, weight in flat(model).items()
        if path.startswith("segments.")
        and not weight.get_metadata("looped")
        and weight.size >= LARGE
    }


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


def _averaged(ema: Weights, params: Weights, decay: float) -> Weights:
    """The moving average after a step, float32; stays empty if none is kept."""
    return {
        path: decay * mean + (1.0 - decay) * params[path].astype(mean.dtype)
        for path, mean in ema.items()
    }


def _metrics(terms: Terms, norm: Array, finite: Array) -> Metrics:
    moe = bool(terms.loads)
    load_LE = jnp.concatenate(terms.loads) if moe else jnp.zeros((0, 1))
    return Metrics(
        loss=terms.loss,
        mtp_loss=terms.mtp_loss,
        balance_loss=terms.balance_loss,
        gradient_norm=norm,
        load_LE=load_LE,
        max_violation_L=balance.max_violation(load_LE),
        entropy_L=jnp.concatenate(terms.entropies) if moe else jnp.zeros(0),
        skipped=~finite,
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
