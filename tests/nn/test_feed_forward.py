"""The feed-forward of many rows, whose two first products are one, and of few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.nn.feed_forward import MANY, swiglu

D, F = 24, 16


def by_hand(x, gate, up, down, dy):
    """y and the gradients of all four, in float64."""
    x, gate, up, down, dy = (np.asarray(a, np.float64) for a in (x, gate, up, down, dy))
    gated, lifted = x @ gate.T, x @ up.T
    sigmoid = 1 / (1 + np.exp(-gated))
    dh = dy @ down
    dgated = dh * lifted * sigmoid * (1 + gated * (1 - sigmoid))
    dlifted = dh * gated * sigmoid
    dx = dgated @ gate + dlifted @ up
    h = gated * sigmoid * lifted
    return h @ down.T, dx, dgated.T @ x, dlifted.T @ x, dy.T @ h


@pytest.mark.parametrize("rows", [MANY * F - 1, MANY * F])
def test_equals_its_definition(rng, rows):
    shapes = (rows, D), (F, D), (F, D), (D, F), (rows, D)
    *arrays, dy = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)

    @jax.jit
    def both_ways(*arrays):
        y, back = jax.vjp(swiglu, *arrays)
        return y, *back(dy)

    for found, expected in zip(both_ways(*arrays), by_hand(*arrays, dy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)


def test_many_rows_are_multiplied_once(rng):
    """By both matrices together; few are not worth their copy."""

    def products(rows):
        operands = [jnp.ones(s) for s in ((rows, D), (F, D), (F, D), (D, F))]
        return str(jax.make_jaxpr(swiglu)(*operands)).count("dot_general")

    assert products(MANY * F - 1) == 3
    assert products(MANY * F) == 2
