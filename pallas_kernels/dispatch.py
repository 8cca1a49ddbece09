"""Saying, once, which kernel an operation takes where, and where plain JAX is left."""

import functools
import logging

import jax

log = logging.getLogger("pallas_kernels")


def note_choice(
    operation: str, kernels: dict[str, str], lacking: dict[str, str]
) -> None:
    """Logs, once for each choice, which kernel `operation` takes where.

    `kernels` names one for each platform ("tpu", "cuda"); `lacking` says, by platform,
    why it is not taken, or nothing. The choice itself follows the platform that is
    compiled for: this is a line for people, and a warning where the accelerator at hand
    goes without.
    """
    taken = [f"{name} on {on}" for on, name in kernels.items() if not lacking[on]]
    reasons = [f"{kernels[on]}: {why}" for on, why in lacking.items() if why]
    line = ", ".join([*taken, f"plain JAX {'elsewhere' if taken else 'everywhere'}"])
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    level = logging.WARNING if lacking.get(here) else logging.INFO
    _say_once(level, f"{operation}: {line}" + "".join(f" ({why})" for why in reasons))


@functools.cache
def _say_once(level: int, line: str) -> None:
    log.log(level, line)
