"""Everything that a pre-training run is, as one frozen record.

`dsjax train PACKAGE.FUNCTION` calls a function that returns an `Experiment`; a function
of `experiments/` that carries a paper's name carries the paper's numbers.
"""

from dataclasses import dataclass

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
    average of the parameters (0: none is kept). `initial` names a checkpoint whose
    weights the run starts from, for an extension to longer sequences.
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
    ema: float = 0.0
    mesh: MeshShape = MeshShape()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    initial: str | None = None
    seed: int = 0
