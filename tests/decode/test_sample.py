"""Sampling against the definitions, computed by hand on four tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.decode.sample import Sampling, choose, filtered, row_keys
from dsjax.errors import UserError

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 1}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.71, "top_k": 2}, [1, 3]),
        ({"top_p": 1e-6}, [1]),
    ],
)
def test_filtered_keeps(options, kept):
    result = np.asarray(filtered(LOGITS, Sampling(**options)))[0]
    assert np.flatnonzero(np.isfinite(result)).tolist() == kept
    np.testing.assert_array_equal(result[kept], np.asarray(LOGITS)[0, kept])


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, np.square([0.1, 0.4, 0.2, 0.3]) / 0.30),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_frequencies(mesh, options, probabilities):
    """20,000 draws: three standard deviations of a frequency are at most 0.011."""
    rows = 20_000
    logits = jnp.broadcast_to(LOGITS, (rows, 4))
    drawn = choose(logits, Sampling(**options), row_keys(0, rows), 0)
    frequency = np.bincount(np.asarray(drawn), minlength=4) / rows
    np.testing.assert_allclose(frequency, probabilities, atol=0.011)


def test_greedy_takes_the_likeliest(mesh):
    assert choose(LOGITS, Sampling(), row_keys(0, 1), 0).tolist() == [1]


def test_steps_and_rows_draw_differently(mesh):
    logits = jnp.zeros((8, 1000))
    draws = [
        choose(logits, Sampling(temperature=1.0), row_keys(0, 8), s) for s in (0, 1)
    ]
    assert len(np.unique(jax.device_get(draws))) > 12


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_values_out_of_range_are_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        Sampling.checked(**bad)
