"""Rows to their experts, at models' shapes; run by `python -m pallas_kernels.bench`.

Letters: N tokens, M rows, D model, E experts, k chosen.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.measure import Case
from pallas_kernels.take_rows import take_rows


def _case(N: int, D: int, E: int, k: int, target: str = "") -> Case:
    """Rows by expert and, of one expert, in the order of tokens, as a layer sends them."""

    def inputs(key):
        x_key, score_key = jax.random.split(key)
        chosen = jax.lax.top_k(jax.random.uniform(score_key, (N, E)), k)[1]
        index = jnp.argsort(chosen.reshape(-1), stable=True) // k
        return jax.random.normal(x_key, (N, D), jnp.bfloat16), index.astype(jnp.int32)

    contestants = {
        "pallas": take_rows,
        **{
            name: functools.partial(take_rows, implementation=name)
            for name in ("pairs", "reference")
        },
    }
    return Case(
        operation="take_rows",
        name=f"{N} tokens of {D}, {k} of {E} experts",
        inputs=inputs,
        contestants=contestants,
        exact=lambda x, index: x.astype(jnp.float32)[index],
        flops=0,
        bytes=2 * D * (N + k * N) + 4 * k * N,
        target=target,
    )


CASES = [
    _case(32768, 1280, 64, 7, ">= 1.4x pairs"),
    _case(8192, 2048, 64, 6),
    _case(4096, 7168, 256, 8),
]
