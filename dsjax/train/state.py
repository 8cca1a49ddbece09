"""Everything that a training step changes, and so all that a checkpoint of a run holds
beside its place in the data.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jaxtyping import Int, PRNGKeyArray, UInt32

from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import RouterBias, flat, shardings
from dsjax.train.optimizer import AdamW, adamw
from dsjax.train.zero import Weights, at_rest, is_cut


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes; every leaf rests where its parameter does, which
    is where the model's weight does or, with `Sharding.state`, a part of it.

    `step` counts all steps, also those whose update was skipped. `ema` is a float32
    moving average of the parameters, empty if none is kept. `rng` is the data of the
    run's key and stays: each step's key follows from it and from the step.
    """

    step: Int[Array, ""]
    params: Weights
    biases: Weights  # of the routers: moved by `balance.update_bias` alone
    moments: optax.OptState
    ema: Weights
    rng: UInt32[Array, " 2"]

    def key(self) -> PRNGKeyArray:
        """The random key of the step that follows."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step)


def init_state(
    model: Transformer, optimizer: AdamW, *, ema: float = 0.0, seed: int = 0
) -> TrainState:
    """A state at step 0 that starts from copies of the model's weights.

    `ema`: the decay of the average that is kept of them (0: none). Of an abstract model
    (`Transformer.abstract`) the state is abstract too: shapes, dtypes and layout.
    """
    if not 0 <= ema < 1:
        raise UserError(f"ema={ema} must be from 0 to below 1")
    weights = flat(model)
    params = {k: v.get_value() for k, v in weights.items() if isinstance(v, nnx.Param)}
    biases = {k: v.get_value() for k, v in weights.items() if isinstance(v, RouterBias)}

    @jax.jit
    def init(params: Weights, biases: Weights) -> TrainState:
        params = at_rest(params, model)
        average = params if ema else {}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=jax.tree.map(jnp.copy, params),
            biases=jax.tree.map(jnp.copy, biases),
            moments=adamw(optimizer).init(params),
            ema={k: v.astype(jnp.float32) for k, v in average.items()},
            rng=jax.random.key_data(jax.random.key(seed)),
        )

    with jax.set_mesh(model.mesh):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params.values()):
            return _abstract(init.trace(params, biases), model.mesh)
        return init(params, biases)


def _abstract(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> TrainState:
    """What a traced function would return, as ShapeDtypeStructs with their layout."""
    leaves = [
        jax.ShapeDtypeStruct(
            aval.shape, aval.dtype, sharding=NamedSharding(mesh, aval.sharding.spec)
        )
        for aval in traced.jaxpr.out_avals
    ]
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), leaves)


def write_back(model: Transformer, state: TrainState, *, average: bool = False) -> None:
    """Puts a state's weights into the model, as its layout has them; with `average`
    those of its moving average.
    """
    params = state.params
    if average:
        params = {k: v.astype(params[k].dtype) for k, v in state.ema.items()}
    if is_cut(model):
        places = shardings(model, model.mesh)
        params = {k: jax.device_put(v, places[k]) for k, v in params.items()}
    for path, variable in flat(model).items():
        variable.set_value({**params, **state.biases}[path])
