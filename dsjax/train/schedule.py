"""Learning rates over the steps of a run: each function returns an optax schedule, step
-> rate.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import optax

from dsjax.errors import UserError


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
