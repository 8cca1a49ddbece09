"""A run's figures: metrics.jsonl, one JSON object a line, and TensorBoard.

A row of a step: step, tokens, loss, mtp_loss, balance_loss, gradient_norm,
learning_rate, tokens_per_second, mfu, load, max_violation, entropy (a value, or a list,
for each MoE layer), skipped. A row of an evaluation: step, tokens, held_out_loss (nats a
token), bits_per_byte. What is not finite is null.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"
MANY_LOADS = 1024  # from here on only every 100th row has all experts' loads

Row = dict[str, Any]


class Log:
    """Writes rows; every process has one, only the first one's writes.

    Rows after `step` are those of steps that a resumed run does again: they are cut.
    """

    def __init__(self, directory: Path, *, step: int, writes: bool = True) -> None:
        self._file = self._board = None
        kept = _kept(directory / FILE, step)
        rows = [json.loads(line) for line in kept[-2:]]
        # the last step with a row of an evaluation
        self.evaluated = max(
            (r["step"] for r in rows if "bits_per_byte" in r), default=-1
        )
        if not writes:
            return
        _replace(directory / FILE, kept)
        self._file = (directory / FILE).open("a")
        self._board = _tensorboard(directory / TENSORBOARD, step)

    def write(self, row: Row) -> None:
        """Appends a row; the system has it when this returns."""
        if "bits_per_byte" in row:
            self.evaluated = row["step"]
        if self._file is None:
            return
        row = _plain(row)
        if sum(map(len, row.get("load", []))) > MANY_LOADS and row["step"] % 100:
            del row["load"]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            _draw(self._board, row)

    def close(self) -> None:
        """Ends the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


def _kept(path: Path, step: int) -> list[str]:
    """The whole lines up to `step`; a kill may have cut the last one short."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept


def _replace(path: Path, lines: list[str]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines))
    os.replace(partial, path)


def _tensorboard(directory: Path, step: int) -> Any:
    """A writer that hides what an interrupted run drew after `step`; None without the
    library.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print("dsjax: no tensorboardX: metrics.jsonl alone", file=sys.stderr)
        return None
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)


def _draw(board: Any, row: Row) -> None:
    """Numbers as scalars; lists over layers as a scalar each, loads as their largest
    over the mean.
    """
    for name, value in row.items():
        if name in ("step", "load"):
            continue
        values = value if isinstance(value, list) else [value]
        for index, number in enumerate(values):
            tag = f"{name}/{index}" if isinstance(value, list) else name
            if number is not None:
                board.add_scalar(tag, float(number), row["step"])


def _plain(value: Any) -> Any:
    """For JSON: arrays as lists, not-a-number and infinity as None."""
    match value:
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case float() if not math.isfinite(value):
            return None
    return value
