"""What a run says while it goes on: loss, tokens/s, MFU, time left."""

import sys
import time
from collections import deque
from dataclasses import dataclass

import jax
from tqdm import tqdm

from dsjax import chips
from dsjax.count import training_flops
from dsjax.train.experiment import Experiment
from dsjax.train.schedule import is_zero

RECENT = 20  # steps that the shown rate is of


@dataclass(frozen=True)
class Rate:
    """Tokens a second, and the share of the devices' peak; None where it is unknown."""

    tokens: float | None
    mfu: float | None


class Meter:
    """Measures steps by when their figures arrive. Compiling, evaluating and saving are
    left out: `pause` before and after them.
    """

    def __init__(self, experiment: Experiment, devices: list[jax.Device]) -> None:
        self._flops = training_flops(
            experiment.model,
            length=experiment.length,
            mtp=not is_zero(experiment.objective.mtp),
        )
        chip = chips.find(devices[0].device_kind)
        self._peak = chip and chip.flops * len(devices)
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._last: float | None = None

    def pause(self) -> None:
        """The time until the next step's end tells nothing."""
        self._last = None

    def step(self, tokens: int) -> Rate:
        """A step of so many tokens is over: its own rate."""
        now, last = time.monotonic(), self._last
        self._last = now
        if last is None:
            return Rate(None, None)
        self._recent.append((tokens, now - last))
        return self._rate(tokens / max(now - last, 1e-9))

    @property
    def recent(self) -> Rate:
        """The rate of the last steps together."""
        seconds = sum(seconds for _, seconds in self._recent)
        if not seconds:
            return Rate(None, None)
        return self._rate(sum(tokens for tokens, _ in self._recent) / seconds)

    def _rate(self, tokens: float) -> Rate:
        return Rate(tokens, self._peak and tokens * self._flops / self._peak)


class Console:
    """A progress bar on stderr, of the first process alone."""

    def __init__(self, *, step: int, steps: int) -> None:
        self._shows = jax.process_index() == 0
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            desc="training (first step compiles)",
            disable=not self._shows,
            file=sys.stderr,
        )

    def step(self, loss: float, rate: Rate) -> None:
        """One more step is done."""
        self._bar.set_description("training", refresh=False)
        speed = "-" if rate.tokens is None else f"{rate.tokens:,.0f}"
        mfu = "-" if rate.mfu is None else f"{rate.mfu:.1%}"
        shown = f"loss {loss:.3f}, {speed} tokens/s, MFU {mfu}"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self._shows:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
