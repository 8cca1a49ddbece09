"""What the operations' choices have in common: plain JAX for all of them, if asked for,
and saying, once, which kernel one takes where.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator

import jax

log = logging.getLogger("pallas_kernels")
_reference_only = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def reference_only(yes: bool = True) -> Iterator[None]:
    """What is traced inside is plain JAX, wherever no implementation is named: to see
    what the kernels are worth, or whether they are to blame. Grouped products are then
    what XLA has for them on the platform. Part of what `jax.jit` caches by.
    """
    with _reference_only(yes):
        yield


def without_kernels() -> bool:
    """Whether that is asked for."""
    return _reference_only.value


def named(implementation: str | None) -> str | None:
    """The implementation a caller named, else the reference if that is asked for."""
    if implementation is None and without_kernels():
        return "reference"
    return implementation


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
