"""Learning rates over the steps of a run: each function returns an optax schedule, step
-> rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import optax

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


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Linear warm-up, `peak`, then `factors` of it from fractions `at` of the tokens on
    (LLM, section 2.3).
    """

    peak: float
    warmup: int = 2000
    at: tuple[float, ...] = (0.8, 0.9)
    factors: tuple[float, ...] = (0.316, 0.1)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine from `peak` to `final` * peak."""

    peak: float
    warmup: int = 2000
    final: float = 0.1


@dataclass(frozen=True, kw_only=True)
class HoldCosine:
    """V3's (section 4.2): warm-up, `peak` until `hold_tokens`, half a cosine to
    `final` over `decay_tokens`, then each (tokens, rate) of `tail`.
    """

    peak: float
    hold_tokens: int
    decay_tokens: int
    final: float
    tail: tuple[tuple[int, float], ...] = ()
    warmup: int = 2000


@dataclass(frozen=True, kw_only=True)
class Piecewise:
    """`values[0]` until `at[0]` tokens, `values[1]` until `at[1]`, ..."""

    values: tuple[float, ...]
    at: tuple[int, ...]


Schedule = float | Constant | MultiStep | Cosine | HoldCosine | Piecewise


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """Sequences a step: `sequences`, reached from `start` over the first `ramp_tokens`
    in equal increments of `increment` sequences, linear in tokens.
    """

    sequences: int
    start: int | None = None
    ramp_tokens: int = 0
    increment: int = 1


def multi_step(
    *,
    peak: float,
    steps: int,
    warmup: int,
    decay_at: Sequence[float] = (0.8, 0.9),
    factors: Sequence[float] = (0.316, 0.1),
) -> optax.Schedule:
    """DeepSeek LLM's schedule (section 2.3): linear warm-up, constant, then `factors`
    of the peak.

    `decay_at` are fractions of `steps`: 31.6% of the peak from 80% on and 10% from 90%
    on (LLM, MoE, V2-Lite).
    """
    _check(peak=peak, steps=steps, warmup=warmup)
    if len(decay_at) != len(factors):
        raise UserError(f"decay_at={decay_at} and factors={factors} differ in length")

    def rate(step):
        scale = jnp.float32(1.0)
        for fraction, factor in zip(decay_at, factors):
            scale = jnp.where(step >= round(fraction * steps), factor, scale)
        return peak * scale * _ramp(step, warmup)

    return rate


def cosine(
    *, peak: float, steps: int, warmup: int, final: float = 0.1
) -> optax.Schedule:
    """Linear warm-up, then half a cosine from the peak to `final` * peak at `steps`."""
    _check(peak=peak, steps=steps, warmup=warmup)

    def rate(step):
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        scale = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return peak * scale * _ramp(step, warmup)

    return rate


def _ramp(step, warmup: int):
    """Linear from 1 / warmup at step 0: the first update is not wasted on a rate of
    0.
    """
    return jnp.minimum((step + 1) / max(warmup, 1), 1.0)


def _check(*, peak: float, steps: int, warmup: int) -> None:
    if peak <= 0 or steps < 1 or not 0 <= warmup <= steps:
        raise UserError(
            f"peak={peak} must be positive and warmup={warmup} within steps={steps}"
        )
