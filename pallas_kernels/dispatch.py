"""Saying, once an operation, that no kernel is there for the accelerator at hand."""

import functools
import logging

import jax

log = logging.getLogger("pallas_kernels")


@functools.cache
def note_reference(operation: str, platform: str) -> None:
    """Logs one line the first time `operation` runs as plain JAX on `platform`, "gpu" or
    "tpu", where a kernel belongs.

    Only on that platform. The choice itself follows the platform that is compiled for;
    this is for the person who waits.
    """
    if jax.default_backend() == platform:
        device = jax.devices()[0].device_kind
        log.warning("%s: no kernel for %s, plain JAX is used", operation, device)
