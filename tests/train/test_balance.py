"""Balance losses and the bias update against plain NumPy written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Moe, Score
from dsjax.nn.router import route
from dsjax.train.balance import expert_loss, max_violation, sequence_loss, update_bias

L, B, T, E, K = 2, 3, 50, 8, 2


@pytest.fixture
def routing():
    """Affinities of T tokens, each token's chosen experts, load and mean probability."""
    rng = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-rng.normal(0, 2, (L, B, T, E))))
    chosen = np.argsort(-scores, axis=-1)[..., :K]
    load = np.stack([(chosen == e).sum(axis=(2, 3)) for e in range(E)], axis=-1)
    probability = (scores / scores.sum(-1, keepdims=True)).mean(axis=2)
    return scores, chosen, load.astype(np.float32), probability.astype(np.float32)


def test_sequence_loss_is_v3s_equations_17_to_20(routing):
    scores, chosen, load, probability = routing
    expected = 0.0
    for layer in range(L):
        for b in range(B):
            for e in range(E):
                f = E / (K * T) * (chosen[layer, b] == e).sum()
                s = scores[layer, b]
                expected += f * (s[:, e] / s.sum(axis=1)).mean() / B
    loss = sequence_loss(jnp.asarray(load), jnp.asarray(probability))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_expert_loss_takes_the_batch_as_one(routing):
    scores, chosen, load, probability = routing
    expected = 0.0
    for layer in range(L):
        tokens = scores[layer].reshape(B * T, E)
        for e in range(E):
            f = E / (K * B * T) * (chosen[layer] == e).sum()
            expected += f * (tokens[:, e] / tokens.sum(axis=1)).mean()
    loss = expert_loss(jnp.asarray(load), jnp.asarray(probability))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_even_load_costs_one_a_layer():
    load, probability = np.full((L, B, E), T * K / E), np.full((L, B, E), 1 / E)
    np.testing.assert_allclose(sequence_loss(load, probability), L, rtol=1e-6)


def test_update_bias_by_hand():
    bias = update_bias(
        jnp.zeros((1, 4)), jnp.asarray([[10.0, 20.0, 30.0, 20.0]]), speed=0.001
    )
    np.testing.assert_allclose(bias, [[0.001, 0, -0.001, 0]])


def test_max_violation():
    load = jnp.asarray([[10.0, 20, 30, 20], [5, 5, 5, 5]])
    np.testing.assert_allclose(max_violation(load), [0.5, 0.0])


def test_updates_move_a_lopsided_router_to_balance():
    """Experts whose affinities differ widely: MaxVio falls from above 1 to below 0.1."""
    config = Moe(
        num_experts=E,
        num_shared=0,
        top_k=K,
        width=1,
        score=Score.SIGMOID,
        renormalize=True,
        selection_bias=True,
    )
    offset = jnp.linspace(-1.0, 1.0, E)
    draw = jax.random.normal(jax.random.key(0), (1, 4000, E))
    scores = jax.nn.sigmoid(draw + offset)

    @jax.jit
    def step(bias_E):
        load_E = route(scores, bias_E, config).load_BE.sum(axis=0)
        new_1E = update_bias(bias_E[None], load_E[None], speed=0.005)
        return new_1E[0], max_violation(load_E)

    bias, violations = jnp.zeros(E), []
    for _ in range(200):
        bias, violation = step(bias)
        violations.append(float(violation))
    assert violations[0] > 1.0
    assert max(violations[-10:]) < 0.1
