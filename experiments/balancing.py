"""V3's claim in miniature: experts balanced by a bias, by a loss, or not at all.

The three arms differ in nothing else. Measured: the held-out loss, and MaxVio (the
busiest expert's load over the mean, minus 1) of the batches over training (2412.19437,
section 4.5.2; 2408.15664).

    python -m experiments.balancing --corpus DIR --out DIR
"""

from dsjax.config import Moe, Score
from dsjax.train.experiment import Experiment
from dsjax.train.objective import Objective
from experiments.granularity import WIDTH, small_model, small_run


def bias() -> Experiment:
    """V3's selection bias, moved by 0.001 a step; no loss.

    Command: python -m experiments.balancing (all arms and seeds)
    Hardware, cost, result: LOG.md.
    """
    return _arm("bias", Objective(bias_speed=1e-3))


def sequence_loss() -> Experiment:
    """The sequence-wise loss alone, with the 0.001 of 2408.15664.

    Command: python -m experiments.balancing (all arms and seeds)
    Hardware, cost, result: LOG.md.
    """
    return _arm("sequence_loss", Objective(sequence_balance=1e-3))


def none() -> Experiment:
    """Nothing keeps the experts balanced.

    Command: python -m experiments.balancing (all arms and seeds)
    Hardware, cost, result: LOG.md.
    """
    return _arm("none", Objective())


def _arm(name: str, objective: Objective) -> Experiment:
    moe = Moe(
        num_experts=63,
        num_shared=1,
        top_k=7,
        width=WIDTH // 4,
        score=Score.SIGMOID,
        renormalize=True,
        selection_bias=objective.bias_speed != 0.0,
    )
    return small_run(name, small_model(name, moe), objective)
