"""Rows by an index that is known in both directions, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.nn.rows import gather_rows, inverse, sum_rows

N, R, M, D = 11, 3, 40, 24


@pytest.fixture
def places(rng):
    """Where the rows go, int32 [N, R]; some go nowhere, past the last place."""
    places = rng.permutation(M + 8)[: N * R].reshape(N, R)
    assert (places >= M).any()
    return jnp.asarray(places, jnp.int32)


@pytest.fixture
def row(places):
    """The row that is at each place, N for none."""
    return inverse(places.reshape(-1), M, nowhere=N * R) // R


def test_each_is_the_others_gradient(rng, places, row):
    """By hand: a matrix of ones says which row is where."""
    is_MN = np.asarray(row)[:, None] == np.arange(N)
    x = jnp.asarray(rng.standard_normal((N, D)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((M, D)), jnp.float32)
    gathered, back = jax.vjp(lambda x: gather_rows(x, row, places), x)
    np.testing.assert_array_equal(gathered, is_MN @ np.asarray(x))
    np.testing.assert_allclose(back(y)[0], is_MN.T @ np.asarray(y), atol=1e-6)
    summed, back = jax.vjp(lambda y: sum_rows(y, places, row), y)
    np.testing.assert_allclose(summed, is_MN.T @ np.asarray(y), atol=1e-6)
    np.testing.assert_array_equal(back(x)[0], is_MN @ np.asarray(x))
