"""The parts of a run from its experiment: mesh, model, state, step, data."""

from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from dsjax import hosts
from dsjax.checkpoint import config_json
from dsjax.checkpoint.hf import array_shapes
from dsjax.checkpoint.load import assemble, open_source
from dsjax.data.held_out import HeldOut, held_out_batches
from dsjax.data.loader import Batches, loader
from dsjax.data.prepare import prepare
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import Sharding, make_mesh, with_whole_dense
from dsjax.train.experiment import Experiment
from dsjax.train.step import Step, TrainState, init_state, make_step


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works with. `model` is abstract until weights are put into it;
    `held_out` is None where the data have none.
    """

    mesh: Mesh
    model: Transformer
    step: Step
    data: Batches
    held_out: HeldOut | None

    def abstract_state(self, experiment: Experiment) -> TrainState:
        """Shapes, dtypes and layout of the run's state, without memory."""
        return init_state(
            self.model, experiment.optimizer, ema=experiment.ema, seed=experiment.seed
        )


def build(experiment: Experiment, *, workdir: Path) -> Parts:
    """All parts; text that is not tokenised yet is, below `workdir`.

    Raises UserError for an experiment whose parts do not fit together.
    """
    check(experiment)
    mesh = mesh_of(experiment)
    model = Transformer.abstract(experiment.model, **_options(experiment, mesh))
    step = make_step(
        model,
        optimizer=experiment.optimizer,
        objective=experiment.objective,
        ema=experiment.ema,
    )
    prepared = prepare(experiment.data, workdir)
    if prepared.vocab_size > experiment.model.vocab_size:
        raise UserError(
            f"the data's tokenizer has {prepared.vocab_size} ids, more than "
            f"model.vocab_size={experiment.model.vocab_size}"
        )
    model.tokenizer = Tokenizer.load(prepared.tokenizer)
    share = hosts.part(experiment.microbatch, mesh)
    data = loader(
        experiment.data,
        length=experiment.length,
        microbatch=experiment.microbatch,
        seed=experiment.seed,
        workdir=workdir,
        hosts=share,
    )
    held_out = None
    if prepared.held_out is not None:
        held_out = held_out_batches(
            experiment.data,
            length=experiment.length,
            batch=experiment.microbatch,
            workdir=workdir,
            sequences=experiment.evaluation.sequences,
            hosts=share,
        )
    return Parts(mesh=mesh, model=model, step=step, data=data, held_out=held_out)


def check(experiment: Experiment) -> None:
    """Raises UserError for sizes that do not fit together."""
    if experiment.length > experiment.model.max_length:
        raise UserError(
            f"length={experiment.length} is more than "
            f"model.max_length={experiment.model.max_length}"
        )
    batch, microbatch = experiment.batch, experiment.microbatch
    sizes = [batch.sequences]
    if batch.start is not None:
        sizes += [batch.start, batch.increment]
    for sequences in sizes:
        if microbatch < 1 or sequences % microbatch:
            raise UserError(f"microbatch={microbatch} must divide batch {batch}")


def mesh_of(experiment: Experiment) -> Mesh:
    """The experiment's mesh. Raises UserError when devices are missing."""
    return make_mesh(**asdict(experiment.mesh))


def sharding_of(experiment: Experiment) -> Sharding:
    """Where the experiment's weights and state lie."""
    sharding = Sharding(state=("data",) if experiment.zero1 else ())
    return with_whole_dense(sharding) if experiment.whole_dense else sharding


def _options(experiment: Experiment, mesh: Mesh) -> dict:
    return {
        "mesh": mesh,
        "sharding": sharding_of(experiment),
        "precision": experiment.precision,
        "remat": experiment.remat,
        "unroll": experiment.unroll,
    }


def first_state(experiment: Experiment, parts: Parts) -> TrainState:
    """The state at step 0: random weights, or those of `experiment.initial`.

    Placed like a restored one to the letter (P() and P(None) are the same place and yet
    another compilation), so that all steps of a run are one program.
    """
    if experiment.initial is None:
        options = _options(experiment, parts.mesh)
        model = Transformer.create(experiment.model, seed=experiment.seed, **options)
    else:
        model = load_initial(experiment, parts)
    state = init_state(
        model, experiment.optimizer, ema=experiment.ema, seed=experiment.seed
    )
    like = parts.abstract_state(experiment)
    return jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), state, like)


def load_initial(experiment: Experiment, parts: Parts) -> Transformer:
    """The experiment's model with the weights of the checkpoint `initial`, of either
    form. Rotary scaling and length may differ from the checkpoint's; shapes may not.
    """
    source = open_source(epath.Path(experiment.initial))
    theirs, ours = array_shapes(source.config), array_shapes(experiment.model)
    for path in [*ours, *theirs]:
        if theirs.get(path) != ours.get(path):
            raise UserError(
                f"initial={experiment.initial}: {path} is {theirs.get(path, 'absent')} "
                f"there, {ours.get(path, 'absent')} in the model"
            )
    options = _options(experiment, parts.mesh)
    model = Transformer.abstract(experiment.model, **options)
    variables = flat(model)
    places = {path: variable.get_value() for path, variable in variables.items()}
    for path, array in assemble(source, places, progress=jax.process_index() == 0):
        variables[path].set_value(array)
    return model


def companions(parts: Parts, directory: epath.Path) -> None:
    """What makes a directory with params/ a checkpoint that dsjax loads: config.json
    and the tokenizer.
    """
    model = parts.model
    dtype = jnp.dtype(model.precision.params).name
    config_json.write(
        directory, config_json.Description(config=model.config, dtype=dtype)
    )
    if model.tokenizer is not None:
        model.tokenizer.save(directory)
