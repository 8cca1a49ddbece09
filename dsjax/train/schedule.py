"""Learning rates, loss weights and batch sizes over a run, in plain float64 Python.

Rates follow the tokens seen, so that a growing batch or another length moves nothing;
warm-up alone counts steps, as in the papers. A schedule is read on the host before each
step and handed to it as a number.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from dsjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is before a step: steps and tokens done, and how many there will be."""

    step: int
    tokens: int
    total_tokens: int


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up over `warmup` steps, then `peak` (MoE 145B)."""

    peak: float
    warmup: int = 2000

    def __post_init__(self) -> None:
        _check(self)

    def at(self, progress: Progress) -> float:
        """The rate of the step that follows."""
        return self.peak * _ramp(progress.step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Linear warm-up, `peak`, then `factors` of it from `fractions` of the tokens on
    (LLM, section 2.3).
    """

    peak: float
    warmup: int = 2000
    fractions: tuple[float, ...] = (0.8, 0.9)
    factors: tuple[float, ...] = (0.316, 0.1)

    def __post_init__(self) -> None:
        _check(self)
        if len(self.fractions) != len(self.factors):
            raise UserError(
                f"fractions={self.fractions} and factors={self.factors} "
                "differ in length"
            )
        if not _rising((0.0, *self.fractions, 1.0)):
            raise UserError(f"fractions={self.fractions} must rise from 0 to 1")

    def at(self, progress: Progress) -> float:
        """The rate of the step that follows."""
        begins = [round(part * progress.total_tokens) for part in self.fractions]
        factor = (1.0, *self.factors)[bisect_right(begins, progress.tokens)]
        return self.peak * factor * _ramp(progress.step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine from `peak` to `final` * peak."""

    peak: float
    warmup: int = 2000
    final: float = 0.1

    def __post_init__(self) -> None:
        _check(self)
        if self.final < 0:
            raise UserError(f"final={self.final} must not be negative")

    def at(self, progress: Progress) -> float:
        """The rate of the step that follows."""
        # Warm-up's tokens, by the mean batch so far: exact where the batch is constant.
        warmed = self.warmup * progress.tokens / max(progress.step, 1)
        rest = max(progress.total_tokens - warmed, 1)
        scale = self.final + (1.0 - self.final) * _fall(
            (progress.tokens - warmed) / rest
        )
        return self.peak * scale * _ramp(progress.step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class HoldCosine:
    """V3's (section 4.2): warm-up, `peak` until `hold_tokens`, half a cosine to
    `final` over `decay_tokens`, then each (tokens, rate) of `tail`, the last one for as
    long as the run goes on.
    """

    peak: float
    hold_tokens: int
    decay_tokens: int
    final: float
    tail: tuple[tuple[int, float], ...] = ()
    warmup: int = 2000

    def __post_init__(self) -> None:
        _check(self)
        if self.hold_tokens < 0 or self.decay_tokens < 1 or self.final < 0:
            raise UserError(
                f"hold_tokens={self.hold_tokens} and final={self.final} must not be "
                f"negative, decay_tokens={self.decay_tokens} must be positive"
            )
        if any(tokens < 1 or rate < 0 for tokens, rate in self.tail):
            raise UserError(f"tail={self.tail} must be pairs of (tokens, rate)")

    def at(self, progress: Progress) -> float:
        """The rate of the step that follows."""
        decayed = progress.tokens - self.hold_tokens
        scale = _fall(decayed / self.decay_tokens)
        rate = self.final + (self.peak - self.final) * scale
        begin = self.decay_tokens
        for tokens, value in self.tail:
            if decayed >= begin:
                rate = value
            begin += tokens
        return rate * _ramp(progress.step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class Piecewise:
    """`values[0]` until `boundaries[0]` tokens, then `values[1]` until the next, ..."""

    values: tuple[float, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.boundaries) + 1:
            raise UserError(
                f"values={self.values} must be one more than "
                f"boundaries={self.boundaries}"
            )
        if not _rising((0, *self.boundaries)):
            raise UserError(f"boundaries={self.boundaries} must rise from above 0")

    def at(self, progress: Progress) -> float:
        """The value for the step that follows."""
        return self.values[bisect_right(self.boundaries, progress.tokens)]


Schedule = float | Constant | MultiStep | Cosine | HoldCosine | Piecewise


def value(schedule: Schedule, progress: Progress) -> float:
    """A schedule's value, or the number that stands in its place."""
    if isinstance(schedule, int | float):
        return float(schedule)
    return schedule.at(progress)


def is_zero(schedule: Schedule) -> bool:
    """Whether a term with this weight can be left out: the number 0."""
    return isinstance(schedule, int | float) and schedule == 0


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """Sequences a step: `sequences`, reached from `start` over the first `ramp_tokens`
    in equal increments of `increment` sequences, linear in tokens.
    """

    sequences: int
    start: int | None = None
    ramp_tokens: int = 0
    increment: int = 1

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.increment < 1 or self.ramp_tokens < 0:
            raise UserError(
                f"sequences={self.sequences} and increment={self.increment} must be "
                f"positive, ramp_tokens={self.ramp_tokens} not negative"
            )
        if (self.start is None) != (self.ramp_tokens == 0):
            raise UserError(
                f"start={self.start} and ramp_tokens={self.ramp_tokens}: "
                "a ramp needs both"
            )
        if self.start is None:
            return
        if not 1 <= self.start <= self.sequences:
            raise UserError(
                f"start={self.start} must be from 1 to sequences={self.sequences}"
            )
        if (self.sequences - self.start) % self.increment:
            raise UserError(
                f"increment={self.increment} must divide the rise from "
                f"start={self.start} to sequences={self.sequences}"
            )

    def at(self, tokens: int) -> int:
        """Sequences of the step that follows when `tokens` are done."""
        if self.start is None or tokens >= self.ramp_tokens:
            return self.sequences
        return self.start + self.increment * (
            self._increments * tokens // self.ramp_tokens
        )

    @property
    def _increments(self) -> int:
        return (self.sequences - self.start) // self.increment

    def _until(self, tokens: int) -> int | None:
        """How many tokens will be done when the batch next grows; None: it stays."""
        if self.start is None or tokens >= self.ramp_tokens or not self._increments:
            return None
        done = self._increments * tokens // self.ramp_tokens
        return -(-(done + 1) * self.ramp_tokens // self._increments)


def steps(batch: BatchSize, tokens: int, length: int) -> int:
    """How many steps a run of `tokens` takes with sequences of `length`: the first
    number of them that reaches it.
    """
    count = done = 0
    while done < tokens:
        step = batch.at(done) * length
        grows = batch._until(done)
        until = tokens if grows is None else min(grows, tokens)
        more = -(-(until - done) // step)
        count, done = count + more, done + more * step
    return count


def _ramp(step: int, warmup: int) -> float:
    """Linear from 1 / warmup at step 0: the first update is not wasted on a rate of
    0.
    """
    return min((step + 1) / max(warmup, 1), 1.0)


def _fall(part: float) -> float:
    """Half a cosine: 1 until `part` is 0, 0 from 1 on."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(part, 0.0), 1.0)))


def _rising(numbers: tuple[float, ...]) -> bool:
    return all(one < two for one, two in pairwise(numbers))


def _check(schedule: Constant | MultiStep | Cosine | HoldCosine) -> None:
    if not schedule.peak > 0 or not math.isfinite(schedule.peak):
        raise UserError(f"peak={schedule.peak} must be a positive number")
    if schedule.warmup < 0:
        raise UserError(f"warmup={schedule.warmup} must not be negative")
