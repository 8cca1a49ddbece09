"""Cross-entropies at models' vocabularies; run by `python -m pallas_kernels.bench`.

Letters: R rows, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.measure import Case


def _case(R: int, V: int, target: str = "") -> Case:
    def inputs(key):
        logits_key, target_key = jax.random.split(key)
        logits = 3 * jax.random.normal(logits_key, (R, V), jnp.float32)
        targets = jax.random.randint(target_key, (R,), 0, V)
        return logits, targets, jnp.full((R,), 1 / R, jnp.float32)

    def gradient_first(implementation):
        run = functools.partial(
            cross_entropy, dtype=jnp.bfloat16, implementation=implementation
        )
        return lambda *operands: run(*operands)[::-1]

    def exact(logits, targets, weights):
        own = jax.nn.one_hot(targets, V)
        return (jax.nn.softmax(logits) - own) * weights[:, None]

    return Case(
        operation="cross_entropy",
        name=f"{R} rows, a vocabulary of {V}",
        inputs=inputs,
        contestants={
            "pallas": gradient_first(None),
            "reference": gradient_first("reference"),
        },
        exact=exact,
        flops=0,
        bytes=R * V * (4 + 2) + 12 * R,
        target=target,
    )


CASES = [_case(4096, 32000, ">= 1.5x reference"), _case(1024, 129280)]
