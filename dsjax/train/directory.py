"""A run's directory: begun once, gone on with by the same experiment.

RUN/experiment.txt    every value, as `describe` writes it
RUN/metrics.jsonl     a row for each step; tensorboard/ has the same
RUN/data/             text that was tokenised for the run
RUN/checkpoints/      the newest ones, by step
RUN/model/            the trained model; model_ema/ its average, where one is kept
RUN/profile/          an XProf trace, where one was asked for
"""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental.multihost_utils import sync_global_devices

from dsjax.errors import UserError
from dsjax.train.experiment import Experiment, describe

# What may change from one start to the next: where a run is computed, how it is watched.
FREE = ("microbatch", "remat", "unroll", "mesh", "evaluation", "checkpoints")


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run."""

    path: Path

    @property
    def experiment(self) -> Path:
        """The experiment's text; its being there makes the directory a run's."""
        return self.path / "experiment.txt"

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def open_run(out: Path, experiment: Experiment, *, resume: bool) -> RunDirectory:
    """Begins a run in `out`, or goes on with the one there.

    Raises UserError when `out` has something and `resume` is not asked for, when it has
    no run to resume, and when that run is of another experiment.
    """
    run = RunDirectory(out)
    there = out.exists() and any(out.iterdir())
    if there and not resume:
        raise UserError(
            f"{out} exists: --resume goes on with it, --out DIR begins anew"
        )
    if resume and not run.experiment.exists():
        raise UserError(f"{out} has no run to resume: no {run.experiment.name}")
    sync_global_devices("dsjax: every process has looked")
    text = describe(experiment)
    if resume:
        _check_same(run.experiment, text)
    elif jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        partial = run.experiment.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, run.experiment)
    sync_global_devices("dsjax: the run's directory is there")
    return run


def _check_same(file: Path, text: str) -> None:
    before, now = _bound(file.read_text()), _bound(text)
    changed = [
        f"{path} was {before.get(path, 'absent')}, is {now.get(path, 'absent')}"
        for path in (before | now)
        if before.get(path) != now.get(path)
    ]
    if changed:
        raise UserError(f"{file.parent} is of another experiment: {'; '.join(changed)}")


def _bound(text: str) -> dict[str, str]:
    """Path -> value of what may not change during a run."""
    lines = (line.partition(" = ") for line in text.splitlines())
    return {
        path: value for path, _, value in lines if path.partition(".")[0] not in FREE
    }
