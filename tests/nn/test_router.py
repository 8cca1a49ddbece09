"""Routing of all three generations against a plain loop over tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Groups, GroupScore, Moe, Score
from dsjax.errors import UserError
from dsjax.nn.router import _two_largest, route

BASE = Moe(num_experts=16, num_shared=1, top_k=4, width=8)
V2 = replace(BASE, groups=Groups(count=4, kept=2, score=GroupScore.MAX), scale=16.0)
V3 = replace(
    BASE,
    score=Score.SIGMOID,
    groups=Groups(count=4, kept=2, score=GroupScore.TOP2_SUM),
    renormalize=True,
    scale=2.5,
    selection_bias=True,
)


def by_hand(scores, bias, config):
    """One token: (indices by falling choice score, weights)."""
    choice = scores + bias
    allowed = np.arange(16)
    if config.groups:
        best = np.sort(choice.reshape(4, 4), axis=1)[:, ::-1]
        rating = (
            best[:, 0] if config.groups.score is GroupScore.MAX else best[:, :2].sum(1)
        )
        kept = np.argsort(-rating)[: config.groups.kept]
        allowed = np.flatnonzero(np.isin(np.arange(16) // 4, kept))
    indices = allowed[np.argsort(-choice[allowed])][: config.top_k]
    weights = scores[indices]
    if config.renormalize:
        weights = weights / weights.sum()
    return indices, weights * config.scale


@pytest.mark.parametrize("config", [BASE, V2, V3], ids=["MoE", "V2", "V3"])
@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["bias", "negative choice scores"])
def test_equals_a_loop_over_tokens(mesh, rng, config, shift):
    """With a shift of -2 all choice scores are negative: a zero mask would win."""
    logits = rng.standard_normal((3, 50, 16)).astype(np.float32)
    if config.score is Score.SIGMOID:
        scores = np.asarray(jax.nn.sigmoid(logits))
        bias = (0.1 * rng.standard_normal(16) + shift).astype(np.float32)
    else:
        scores, bias = np.asarray(jax.nn.softmax(logits)), np.zeros(16, np.float32)
    given = jnp.asarray(bias) if config.selection_bias else None
    routing = jax.jit(route, static_argnums=2)(jnp.asarray(scores), given, config)
    for row in range(3):
        for token in range(50):
            indices, weights = by_hand(scores[row, token], bias, config)
            np.testing.assert_array_equal(routing.indices_BTk[row, token], indices)
            np.testing.assert_allclose(
                routing.weights_BTk[row, token], weights, rtol=1e-6
            )
    load = [np.bincount(row.ravel(), minlength=16) for row in routing.indices_BTk]
    np.testing.assert_array_equal(routing.load_BE, load)
    assert (np.sum(load, axis=0) > 0).all()  # every expert used
    share = (scores / scores.sum(-1, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(routing.probability_BE, share, rtol=1e-5)
    share = scores / scores.sum(-1, keepdims=True)
    entropy = -(share * np.log(share)).sum(-1).mean(1)
    assert (entropy < 0.99 * np.log(16)).any()
    np.testing.assert_allclose(routing.entropy_B, entropy, rtol=1e-5)


def test_bias_selects_and_does_not_weigh(mesh):
    """A bias that moves one expert into the choice leaves its raw affinity as weight."""
    scores = jnp.linspace(0.2, 0.8, 16).reshape(1, 1, 16)
    config = replace(BASE, score=Score.SIGMOID, selection_bias=True)
    bias = jnp.zeros(16).at[0].set(10.0)
    routing = route(scores, bias, config)
    assert routing.indices_BTk[0, 0].tolist() == [0, 15, 14, 13]
    assert routing.weights_BTk[0, 0, 0] == scores[0, 0, 0]


def test_gradient_reaches_the_scores_not_the_bias(mesh, rng):
    scores = jnp.asarray(rng.uniform(0.2, 0.8, (1, 5, 16)), jnp.float32)
    weigh = jnp.asarray(rng.standard_normal((1, 5, 4)), jnp.float32)

    def value(scores, bias):
        return (route(scores, bias, V3).weights_BTk * weigh).sum()

    by_score, by_bias = jax.grad(value, argnums=(0, 1))(scores, jnp.zeros(16))
    assert np.abs(by_score).max() > 0.1
    assert not np.any(by_bias)


def test_entropy_of_no_preference_and_of_one_expert(mesh):
    even = route(jnp.full((1, 2, 16), 1 / 16), None, BASE)
    np.testing.assert_allclose(even.entropy_B, np.log(16), rtol=1e-6)
    one = route(jax.nn.one_hot(jnp.zeros((1, 2), int), 16), None, BASE)
    np.testing.assert_array_equal(one.entropy_B, 0.0)


def test_entropy_has_no_gradient(mesh):
    scores = jnp.linspace(0.2, 0.8, 16).reshape(1, 1, 16)
    gradient = jax.grad(lambda scores: route(scores, None, BASE).entropy_B.sum())
    assert not np.any(gradient(scores))


def test_masked_experts_are_passed_over(rng):
    """The next best take their places, with their own affinities as weights."""
    scores = rng.dirichlet(np.ones(16), (2, 5)).astype(np.float32)
    got = route(jnp.asarray(scores), None, replace(BASE, mask_best=3))
    expected = np.argsort(-scores, axis=-1)[..., 3:7]
    np.testing.assert_array_equal(got.indices_BTk, expected)
    weights = np.take_along_axis(scores, expected, axis=-1)
    np.testing.assert_allclose(got.weights_BTk, weights, rtol=1e-6)
    with pytest.raises(UserError, match="top_k=4 and mask_best=13 is more than"):
        replace(BASE, mask_best=13)


def test_two_largest_with_equals():
    x = np.array([[3, 1, 2, 0], [2, 2, 1, 2], [-1, -1, -5, -2], [0, -7, -7, -7]])
    got = _two_largest(jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(got, [5, 4, -2, -7])
    x = np.random.default_rng(0).standard_normal((50, 32)).astype(np.float32)
    expected = jax.lax.top_k(x, 2)[0].sum(axis=-1)
    np.testing.assert_array_equal(_two_largest(jnp.asarray(x)), expected)
