"""A run's checkpoints: RUN/checkpoints/STEP, written beside the training.

STEP/params, config.json and the tokenizer's files make it a checkpoint as `dsjax.save`
writes it, so that export, eval and generate read it as it is. STEP/state has the rest
of `TrainState`, STEP/run the counters and the place in the data. A directory appears
under its name when all of it is on disk.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices

from dsjax.checkpoint.orbax import PARAMS, nested
from dsjax.errors import UserError
from dsjax.train.experiment import Checkpoints
from dsjax.train.step import TrainState

STATE, RUN, UNREADABLE = "state", "run", "unreadable"
FULL = ("No space left on device", "Disk quota exceeded")
AGREE = 10  # steps from one look at the first process's clock to the next

Record = dict[str, Any]  # what STEP/run holds, for JSON


class _Run(ocp.CheckpointHandler):
    """STEP/run/record.json, and beside it in STEP what `write(STEP)` writes."""

    def save(self, directory: epath.Path, args: "_SaveRun") -> None:
        """Both while STEP has its temporary name; by the first process."""
        if jax.process_index() == 0:
            (directory / "record.json").write_text(json.dumps(args.record))
            args.write(directory.parent)

    def restore(self, directory: epath.Path, args: Any = None) -> Record:
        """The record."""
        return json.loads((directory / "record.json").read_text())


@ocp.args.register_with_handler(_Run, for_save=True)
@dataclass
class _SaveRun(ocp.args.CheckpointArgs):
    record: Record
    write: Callable[[epath.Path], None]


@ocp.args.register_with_handler(_Run, for_restore=True)
@dataclass
class _RestoreRun(ocp.args.CheckpointArgs):
    pass


class Manager:
    """Saves and restores the states of one run.

    `write(directory)` adds config.json and the tokenizer to each checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        options: Checkpoints,
        *,
        write: Callable[[epath.Path], None],
    ) -> None:
        self.directory, self._options, self._write = directory, options, write
        self._saved_at = time.monotonic()
        self._orbax = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._options.keep, cleanup_tmp_directories=True
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(RUN, _SaveRun, handler := _Run())
        registry.add(RUN, _RestoreRun, handler)
        for item in (PARAMS, STATE):
            arrays = ocp.PyTreeCheckpointHandler()
            registry.add(item, ocp.args.PyTreeSave, arrays)
            registry.add(item, ocp.args.PyTreeRestore, arrays)
        return ocp.CheckpointManager(
            self.directory.resolve(), options=options, handler_registry=registry
        )

    @property
    def newest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._orbax.latest_step()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.directory / str(step)

    def due(self, step: int) -> bool:
        """Whether to save after `step`. All processes answer alike."""
        every = self._options.every_steps
        return (every > 0 and step % every == 0) or self._minutes_are_over(step)

    def _minutes_are_over(self, step: int) -> bool:
        if not self._options.every_minutes:
            return False
        over = time.monotonic() - self._saved_at >= 60 * self._options.every_minutes
        if jax.process_count() == 1:
            return over
        return step % AGREE == 0 and bool(broadcast_one_to_all(over))

    def save(self, step: int, state: TrainState, record: Record) -> None:
        """Copies the state and returns; the writing goes on in threads.

        Raises UserError when the disk is full, now or at the save before.
        """
        with self._explained():
            self._orbax.wait_until_finished()
            self._orbax.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(nested(state.params | state.biases)),
                    state=ocp.args.PyTreeSave(_rest(state)),
                    run=_SaveRun(record=record, write=self._write),
                ),
                force=True,
            )
        self._saved_at = time.monotonic()

    def check(self) -> None:
        """Raises what went wrong in the threads since the last call."""
        with self._explained():
            self._orbax.check_for_errors()

    def wait(self) -> None:
        """Until all is on disk."""
        with self._explained():
            self._orbax.wait_until_finished()

    def close(self) -> None:
        """Ends the threads, whatever they were at."""
        self._orbax.close()

    def restore(
        self, like: TrainState, *, fallback: bool = False
    ) -> tuple[TrainState, Record] | None:
        """The newest state, laid out as the abstract `like`, and its record; None when
        nothing was saved.

        Raises UserError, naming the one before, when the newest cannot be read; with
        `fallback` that one is taken, and what cannot be read is moved aside.
        """
        steps = sorted(self._orbax.all_steps(), reverse=True)
        for step, older in zip(steps, [*steps[1:], None]):
            try:
                restored = self._restore(step, like)
            except Exception as error:  # whatever a damaged file makes of it
                self._unreadable(step, older, error, fallback=fallback)
                continue
            self._set_aside([later for later in steps if later > step])
            return restored
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, Record]:
        def asked(tree: Any) -> ocp.args.PyTreeRestore:
            places = ocp.checkpoint_utils.construct_restore_args(tree)
            return ocp.args.PyTreeRestore(item=tree, restore_args=places)

        found = self._orbax.restore(
            step,
            args=ocp.args.Composite(
                params=asked(nested(like.params | like.biases)),
                state=asked(_rest(like)),
                run=_RestoreRun(),
            ),
        )
        weights = _flat(found[PARAMS])
        paths, structure = jax.tree.flatten(_without_weights(like))
        rest = [found[STATE][name] for name in _names(like)]
        assert len(paths) == len(rest)
        state = replace(
            jax.tree.unflatten(structure, rest),
            params={path: weights[path] for path in like.params},
            biases={path: weights[path] for path in like.biases},
        )
        return state, found[RUN]

    def _unreadable(
        self, step: int, older: int | None, error: Exception, *, fallback: bool
    ) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"checkpoint {self.path(step)} cannot be read ({reason})"
        if older is None:
            raise UserError(f"{what}, and there is none before it") from error
        if not fallback:
            raise UserError(
                f"{what}; the one before it is {self.path(older)}: --fallback uses it"
            ) from error
        if jax.process_index() == 0:
            print(f"{what}; using {self.path(older)}")

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints out of the way of those that will have their names."""
        if not steps:
            return
        self._orbax.close()
        if jax.process_index() == 0:
            aside = self.directory.parent / UNREADABLE
            aside.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                self.path(step).rename(aside / str(step))
        sync_global_devices("dsjax: unreadable checkpoints are set aside")
        self._orbax = self._open()

    def _explained(self) -> "_Explained":
        return _Explained(self)


class _Explained:
    """Turns a full disk, as Python or array stores word it, into one line; and removes
    the checkpoint that did not become whole, so that there is room.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not any(text in str(error) for text in FULL):
            return
        directory = self._manager.directory
        if jax.process_index() == 0:
            _remove_partial(directory)
        steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
        newest = (
            f"the newest is {directory / str(max(steps))}" if steps else "none is whole"
        )
        raise UserError(
            f"{directory}: the disk is full, a checkpoint was not written; {newest}: "
            "make room and --resume"
        ) from error


def _remove_partial(
    directory: Path, *, quiet: float = 1.0, at_most: float = 60
) -> None:
    """Removes what did not become a checkpoint, until none has come back for `quiet`
    seconds: when one array's thread fails, the others are still writing, and make the
    directories anew in which they write.
    """
    end = time.monotonic() + at_most
    gone = time.monotonic()
    while time.monotonic() < min(gone + quiet, end):
        for partial in directory.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
            gone = time.monotonic()
        time.sleep(quiet / 20)


def _without_weights(state: TrainState) -> TrainState:
    return replace(state, params={}, biases={})


def _names(state: TrainState) -> list[str]:
    """A name for every leaf but the weights: "moments.0.mu.embedding_VD"."""
    leaves = jax.tree_util.tree_leaves_with_path(_without_weights(state))
    return [
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves
    ]


def _rest(state: TrainState) -> dict[str, Any]:
    return dict(
        zip(_names(state), jax.tree.leaves(_without_weights(state)), strict=True)
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    flat = {}
    for name, value in tree.items():
        path = prefix + name
        flat |= (
            _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
        )
    return flat
