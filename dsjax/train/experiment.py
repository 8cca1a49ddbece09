"""Everything that a pre-training run is, as one frozen record.

`dsjax train PACKAGE.FUNCTION` calls a function that returns an `Experiment`; a function
of `experiments/` that carries a paper's name carries the paper's numbers.
"""

import enum
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.config import ModelConfig
from dsjax.data.mixture import Data
from dsjax.nn.options import Precision, Remat
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.schedule import BatchSize, Schedule


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis of the mesh; the product is how many are used."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return self.data * self.fsdp * self.expert * self.tensor


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss: how often, and on how many sequences (0: all there are)."""

    every_steps: int = 1000
    sequences: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When a run is saved: every so many minutes or steps, whichever comes first (0:
    not by this measure). The newest `keep` stay.
    """

    every_minutes: float = 5.0
    every_steps: int = 0
    keep: int = 3


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One pre-training run.

    `tokens` is how many the run trains on, `length` the tokens of a sequence.
    `microbatch` sequences, counted over all devices, go through the model at once;
    a step adds up the gradients of batch / microbatch of them. `ema` is the decay of an
    average of the parameters (0: none is kept). `unroll` layers are one body of the
    compiled loop over layers: on few devices more are quicker. With `zero1` the mesh's `data` axis
    cuts parameters, moments and average, too, and not the batch alone. With `whole_dense`
    weights outside the experts are whole on every device along `expert`. `initial` names a
    checkpoint whose weights the run starts from, for an extension to longer sequences.
    """

    name: str
    model: ModelConfig
    data: Data
    length: int
    tokens: int
    batch: BatchSize
    microbatch: int
    learning_rate: Schedule
    optimizer: AdamW = AdamW()
    objective: Objective = Objective()
    precision: Precision = Precision()
    remat: Remat = Remat.NONE
    unroll: int = 1
    ema: float = 0.0
    mesh: MeshShape = MeshShape()
    zero1: bool = False
    whole_dense: bool = False
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    initial: str | None = None
    seed: int = 0


def describe(experiment: Experiment) -> str:
    """Every value of an experiment, one "path = value" a line, in the order of fields.

    The text is the same for equal experiments, whatever a dtype was written as. A
    record has a line with the name of its class before those of its fields; a tuple of
    records has one such part for each index.
    """
    return "".join(f"{path} = {text}\n" for path, text in values(experiment).items())


def values(record: Any, prefix: str = "") -> dict[str, str]:
    """Path -> text, as `describe` writes them."""
    hints = get_type_hints(type(record))
    lines: dict[str, str] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        lines |= _lines(prefix + field.name, value, hints[field.name])
    return lines


def _lines(path: str, value: Any, hint: Any) -> dict[str, str]:
    if hint == DTypeLike:
        return {path: jnp.dtype(value).name}
    match value:
        case enum.Enum():
            return {path: value.name}
        case tuple() if any(map(is_dataclass, value)):
            numbered = enumerate(value)
            parts = [_lines(f"{path}.{i}", item, None) for i, item in numbered]
            return {key: text for part in parts for key, text in part.items()}
    if is_dataclass(value):
        return {path: type(value).__name__} | values(value, f"{path}.")
    return {path: repr(_plain(value, hint))}


def _plain(value: Any, hint: Any) -> Any:
    """A whole number where a float is meant as the float that it equals."""
    kinds = get_args(hint) or (hint,)
    if isinstance(value, tuple):
        return tuple(_plain(item, kinds[0]) for item in value)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and float in kinds and int not in kinds else value
