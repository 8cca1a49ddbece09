"""Rows to their experts, at models' shapes; run by `python -m pallas_kernels.bench`.

Letters: N tokens, M rows, D model, E experts, k chosen.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.measure import Case
from pallas_kernels.spread_rows import spread_rows


def _case(N: int, D: int, E: int, k: int) -> Case:
    """Rows by expert and, of one expert, in the order of tokens, as a layer sends them."""

    def inputs(key):
        x_key, score_key = jax.random.split(key)
        chosen = jax.lax.top_k(jax.random.uniform(score_key, (N, E)), k)[1]
        order = jnp.argsort(chosen.reshape(-1), stable=True).astype(jnp.int32)
        places = jnp.argsort(order).astype(jnp.int32).reshape(N, k)
        return jax.random.normal(x_key, (N, D), jnp.bfloat16), places, order // k

    contestants = {"pallas": spread_rows} | {
        name: functools.partial(spread_rows, implementation=name)
        for name in ("pairs", "reference")
    }
    return Case(
        operation="spread_rows",
        name=f"{N} tokens of {D}, {k} of {E} experts",
        inputs=inputs,
        contestants=contestants,
        exact=lambda x, _, row: x.astype(jnp.float32)[row],
        flops=0,
        bytes=2 * D * (N + k * N) + 4 * k * N,
    )


CASES = [
    _case(32768, 1280, 64, 7),
    _case(8192, 2048, 64, 6),
    _case(4096, 7168, 256, 8),
]
