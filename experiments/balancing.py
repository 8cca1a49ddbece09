"""V3's claim in miniature: experts balanced by a bias, by a loss, or not at all.

The three arms differ in nothing else. Measured: the held-out loss, and MaxVio (the
busiest expert's load over the mean, minus 1) of the batches over training (2412.19437,
section 4.5.2; 2408.15664).

    python -m experiments.balancing --corpus DIR --out DIR
"""

from pathlib import Path

import numpy as np

from dsjax.config import Moe, Score
from dsjax.train.experiment import Experiment
from dsjax.train.objective import Objective
from experiments import miniature
from experiments.granularity import WIDTH, small_model, small_run


def bias() -> Experiment:
    """V3's selection bias, moved by 0.001 a step; no loss.

    Command: python -m experiments.balancing (all arms and seeds)
    Hardware: one H200. Cost: 20 M tokens, 45 s a run with three at once.
    Expect: MaxVio 1.0 at 600 steps, still falling; the loss of the others.
    """
    return _arm("bias", Objective(bias_speed=1e-3))


def sequence_loss() -> Experiment:
    """The sequence-wise loss alone, with the 0.001 of 2408.15664.

    Command: python -m experiments.balancing (all arms and seeds)
    Hardware: one H200. Cost: 20 M tokens, 45 s a run with three at once.
    Expect: MaxVio 1.5 at 600 steps; the loss of the others.
    """
    return _arm("sequence_loss", Objective(sequence_balance=1e-3))


def none() -> Experiment:
    """Nothing keeps the experts balanced.

    Command: python -m experiments.balancing (all arms and seeds)
    Hardware: one H200. Cost: 20 M tokens, 45 s a run with three at once.
    Expect: MaxVio 4.8 at 600 steps; the loss of the others.
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


ARMS = (bias, sequence_loss, none)


def report(out: Path) -> str:
    """A table of the arms; writes it and the figure beside the runs."""
    arms = miniature.results(out)
    columns = (
        "arm",
        "held-out loss",
        "by seed",
        "MaxVio of a batch, last tenth",
        "spread",
    )
    names = [arm.__name__ for arm in ARMS if arm.__name__ in arms]
    _figure(arms, out)
    rows = [_row(name, arms[name]) for name in names]
    return miniature.write_table(out, columns, rows)


def _row(name: str, runs: list[dict]) -> list[str]:
    series = [miniature.history(run["folder"], "max_violation")[1] for run in runs]
    late = [values[-len(values) // 10 :].mean() for values in series]
    cells = f"{np.mean(late):.3f}", f"{np.ptp(late):.3f}"
    return [name, *miniature.losses(runs), *cells]


def _figure(arms: dict[str, list[dict]], out: Path) -> None:
    figure, (left, right) = miniature.canvas(2)
    for name, runs in arms.items():
        miniature.plot(left, runs, "held_out_loss", name)
        miniature.plot(right, runs, "max_violation", name)
    left.set(xlabel="step", ylabel="held-out loss (nats a token)")
    right.set(xlabel="step", ylabel="MaxVio of the batch, mean of layers", yscale="log")
    miniature.save(figure, out)


if __name__ == "__main__":
    miniature.main(__doc__, ARMS, report)
