"""A pre-training run, from an experiment to a trained model (`dsjax train`).

The loop hands one step to the devices and, while they compute it, notes the figures of
the step before. Rows of metrics up to a step are on disk before that step's checkpoint
is: a run that is killed at any moment and resumed writes what it would have written.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsjax import hosts
from dsjax.checkpoint.load import save
from dsjax.errors import UserError
from dsjax.train import schedule
from dsjax.train.build import Parts, build, companions, first_state
from dsjax.train.checkpoints import Manager
from dsjax.train.console import Console, Meter
from dsjax.train.directory import RunDirectory, open_run
from dsjax.train.evaluate import Score, score
from dsjax.train.experiment import Experiment
from dsjax.train.metrics import Log
from dsjax.train.schedule import Progress
from dsjax.train.step import Metrics, Rates, TrainState, rates, write_back
from dsjax.train.stop import Stop, stopping

PATIENCE = 3  # non-finite steps in a row that end a run
PROFILED = range(3, 6)  # steps after the start that --profile traces


@dataclass
class Counters:
    """How far a run is; a checkpoint has them."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0  # steps whose update was not finite
    skipped_in_a_row: int = 0


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A step that the devices have, whose figures are not noted yet."""

    step: int
    tokens: int  # of the run, this step included
    size: int  # tokens of this step
    rates: Rates
    metrics: Metrics


def train(
    experiment: Experiment,
    *,
    out: str | Path,
    resume: bool = False,
    fallback: bool = False,
    steps: int | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Runs an experiment in the directory `out`; what came of it, for JSON.

    `resume` goes on with the run in `out`, `fallback` with the checkpoint before one
    that cannot be read. `steps` stops early, after so many of the whole run. Raises
    UserError for what the user can mend, a run that has diverged among it.
    """
    with stopping() as stop:
        directory = open_run(Path(out), experiment, resume=resume)
        parts = build(experiment, workdir=directory / "data")
        manager = Manager(
            directory / "checkpoints",
            experiment.checkpoints,
            write=lambda place: companions(parts, place),
        )
        try:
            run = _start(experiment, directory, parts, manager, stop, fallback=fallback)
            return run.go(steps=steps, profile=profile)
        finally:
            manager.close()
            parts.data.close()


def _start(
    experiment: Experiment,
    directory: RunDirectory,
    parts: Parts,
    manager: Manager,
    stop: Stop,
    *,
    fallback: bool,
) -> "Run":
    """The run at step 0, or where its checkpoint left it."""
    restored = manager.restore(parts.abstract_state(experiment), fallback=fallback)
    counters = Counters()
    if restored is None:
        state = first_state(experiment, parts)
    else:
        state, record = restored
        parts.data.set_state(record["data"])
        counters = Counters(**record["counters"])
    log = Log(directory.path, step=counters.step, writes=jax.process_index() == 0)
    return Run(
        experiment=experiment,
        directory=directory,
        parts=parts,
        manager=manager,
        stop=stop,
        state=state,
        counters=counters,
        log=log,
        total=schedule.steps(experiment.batch, experiment.tokens, experiment.length),
        meter=Meter(experiment, list(parts.mesh.devices.flat)),
    )


@dataclass(kw_only=True)
class Run:
    """A run between two of its steps."""

    experiment: Experiment
    directory: RunDirectory
    parts: Parts
    manager: Manager
    stop: Stop
    state: TrainState
    counters: Counters
    log: Log
    total: int
    meter: Meter
    console: Console = field(init=False)
    pending: Pending | None = None
    saved: int = -1  # the last step with a checkpoint of this process
    loss: float | None = None
    held_out: Score | None = None

    def go(self, *, steps: int | None, profile: bool) -> dict[str, Any]:
        """Trains to the end, to `steps`, or until asked to stop."""
        begun = self.counters.step
        last = self.total if steps is None else min(steps, self.total)
        self.saved = begun if self.manager.newest == begun else -1
        self.console = Console(step=begun, steps=last)
        try:
            if begun and self._evaluation_is_due():
                self._evaluate()
            while self.counters.step < last and not self.stop.at(self.counters.step):
                if profile:
                    self._profile(self.counters.step - begun)
                self._step()
                self.manager.check()
                if self._evaluation_is_due():
                    self._evaluate()
                if self.manager.due(self.counters.step):
                    self._save()
            return self._end()
        finally:
            self.console.close()
            self.log.close()

    def _step(self) -> None:
        """Hands the next step to the devices, then notes the one before."""
        experiment, counters = self.experiment, self.counters
        sequences = experiment.batch.at(counters.tokens)
        progress = Progress(
            step=counters.step,
            tokens=counters.tokens,
            total_tokens=experiment.tokens,
        )
        now = rates(experiment.learning_rate, experiment.objective, progress)
        batch = self._batch(sequences // experiment.microbatch)
        self.state, metrics = self.parts.step(self.state, batch, now)
        counters.step += 1
        counters.tokens += sequences * experiment.length
        before, self.pending = (
            self.pending,
            Pending(
                step=counters.step,
                tokens=counters.tokens,
                size=sequences * experiment.length,
                rates=now,
                metrics=metrics,
            ),
        )
        if before is not None:
            self._note(before)

    def _batch(self, microbatches: int) -> dict[str, jax.Array]:
        """The next microbatches, as global arrays [A, B, S]."""
        parts = [next(self.parts.data) for _ in range(microbatches)]
        rows = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        size = self.experiment.microbatch
        return hosts.assemble(rows, rows=size, axis=1, mesh=self.parts.mesh)

    def _note(self, done: Pending) -> None:
        """Waits for a step's figures and writes them. Raises UserError when it is the
        third in a row that is not finite.
        """
        metrics = jax.device_get(done.metrics)
        own = self.meter.step(done.size)
        self.stop.started()
        self.loss = float(metrics.loss)
        self.log.write(
            {
                "step": done.step,
                "tokens": done.tokens,
                "loss": metrics.loss,
                "mtp_loss": metrics.mtp_loss,
                "balance_loss": metrics.balance_loss,
                "gradient_norm": metrics.gradient_norm,
                "learning_rate": done.rates.learning_rate,
                "tokens_per_second": own.tokens,
                "mfu": own.mfu,
                "load": metrics.load_LE,
                "max_violation": metrics.max_violation_L,
                "entropy": metrics.entropy_L,
                "skipped": bool(metrics.skipped),
            }
        )
        self.console.step(self.loss, self.meter.recent)
        self._count(bool(metrics.skipped), done.step)

    def _count(self, skipped: bool, step: int) -> None:
        counters = self.counters
        counters.skipped += skipped
        counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if skipped else 0
        if counters.skipped_in_a_row < PATIENCE:
            return
        self.manager.wait()
        good = self.manager.newest
        where = "none was saved" if good is None else self.manager.path(good)
        raise UserError(
            f"loss or gradient not finite in {PATIENCE} steps in a row, the last of "
            f"them step {step}; the last good checkpoint: {where}"
        )

    def _settle(self) -> None:
        """Notes all that is pending."""
        if self.pending is not None:
            before, self.pending = self.pending, None
            self._note(before)
        self.meter.pause()

    def _evaluation_is_due(self) -> bool:
        every, step = self.experiment.evaluation.every_steps, self.counters.step
        return every > 0 and step % every == 0 and self.log.evaluated != step

    def _evaluate(self) -> None:
        """Held-out loss of the state, as a row and a line; nothing without held-out
        text.
        """
        self._settle()
        if self.parts.held_out is None:
            return
        model = nnx.merge(*nnx.split(self.parts.model))  # its weights go with it
        write_back(model, self.state)
        self.held_out = score(model, self.parts.held_out)
        step, bits = self.counters.step, self.held_out.bits_per_byte
        self.log.write(
            {
                "step": step,
                "tokens": self.counters.tokens,
                "held_out_loss": self.held_out.nats_per_token,
                "bits_per_byte": bits,
            }
        )
        nats = self.held_out.nats_per_token
        self.console.say(
            f"step {step}: held out {nats:.4f} nats/token, {bits:.4f} bits/byte"
        )
        self.meter.pause()

    def _save(self, *, at_end: bool = False) -> None:
        """A checkpoint of the state, unless there is one already; after a step that was
        not finite only `at_end`, so that the newest one is a good one.
        """
        self._settle()
        bad = self.counters.skipped_in_a_row and not at_end
        if bad or self.saved == self.counters.step:
            return
        with self.stop.saving():
            record = {
                "counters": vars(self.counters),
                "data": self.parts.data.get_state(),
            }
            self.manager.save(self.counters.step, self.state, record)
        self.saved = self.counters.step
        self.meter.pause()

    def _end(self) -> dict[str, Any]:
        """Saves; when the run is complete evaluates and writes the model, too."""
        self._settle()
        complete = self.counters.step >= self.total
        if complete and self.log.evaluated != self.counters.step:
            self._evaluate()
        self._save(at_end=True)
        with self.stop.saving():
            self.manager.wait()
            if complete:
                self._write_model()
        return self._result(complete)

    def _write_model(self) -> None:
        """The trained weights as `dsjax.save` writes them, and their average."""
        averages = [False, True] if self.experiment.ema else [False]
        for average in averages:
            path = self.directory / ("model_ema" if average else "model")
            if not path.exists():
                write_back(self.parts.model, self.state, average=average)
                save(self.parts.model, path)

    def _result(self, complete: bool) -> dict[str, Any]:
        held_out = self.held_out
        stopped = self.stop.signal
        return {
            "run": str(self.directory.path),
            "first": jax.process_index() == 0,
            "step": self.counters.step,
            "steps": self.total,
            "tokens": self.counters.tokens,
            "loss": self.loss,
            "held_out_loss": held_out and held_out.nats_per_token,
            "bits_per_byte": held_out and held_out.bits_per_byte,
            "skipped": self.counters.skipped,
            "stopped": stopped and stopped.name,
            "checkpoint": str(self.manager.path(self.counters.step)),
            "model": str(self.directory / "model") if complete else None,
        }

    def _profile(self, done: int) -> None:
        """Traces a few steps after the start, compiled ones, into RUN/profile."""
        if done == PROFILED.start:
            self._settle()
            shutil.rmtree(self.directory / "profile", ignore_errors=True)
            jax.profiler.start_trace(self.directory / "profile")
        elif done == PROFILED.stop:
            self._settle()
            jax.profiler.stop_trace()
            self.console.say(
                f"trace of {len(PROFILED)} steps in {self.directory / 'profile'}"
            )
