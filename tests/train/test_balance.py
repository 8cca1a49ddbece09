"""Balance losses and the bias update against plain NumPy written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Groups, GroupScore, Moe, Score
from dsjax.errors import UserError
from dsjax.nn.router import route
from dsjax.train.balance import (
    batch_wise,
    communication_loss,
    device_limit,
    device_loss,
    expert_loss,
    max_violation,
    sent,
    sequence_loss,
    update_bias,
)

L, B, T, E, K = 2, 3, 50, 8, 2
D = 4  # devices of two experts each


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


def frequency(chosen_tk, expert):
    """f_i of the tokens given: E / (k T) times how many of them chose the expert."""
    count = sum(expert in choices for choices in chosen_tk)
    return E / (K * len(chosen_tk)) * count


def probability_of(scores_tE, expert):
    """P_i of the tokens given."""
    return np.mean([token[expert] / token.sum() for token in scores_tE])


def device_by_hand(scores_tE, chosen_tk):
    """The device-level loss as both papers write it, over the tokens given."""
    total = 0.0
    for device in range(D):
        experts = range(device * E // D, (device + 1) * E // D)
        f = np.mean([frequency(chosen_tk, expert) for expert in experts])
        total += f * sum(probability_of(scores_tE, expert) for expert in experts)
    return total


def communication_by_hand(scores_tE, chosen_tk, limit):
    """The communication loss as V2 writes it, over the tokens given."""
    total = 0.0
    for device in range(D):
        experts = set(range(device * E // D, (device + 1) * E // D))
        tokens = sum(bool(experts & set(choices.tolist())) for choices in chosen_tk)
        f = D / (limit * len(chosen_tk)) * tokens
        total += f * sum(probability_of(scores_tE, expert) for expert in experts)
    return total


@pytest.fixture
def sequences(routing):
    """(scores [T, E], chosen [T, k]) of every sequence, layer by layer."""
    scores, chosen, *_ = routing
    return [list(zip(*layer)) for layer in zip(scores, chosen)]


@pytest.fixture
def batches(routing):
    """The same with each layer's sequences as one."""
    scores, chosen, *_ = routing
    return [
        [(s.reshape(B * T, E), c.reshape(B * T, K))] for s, c in zip(scores, chosen)
    ]


def over_layers(parts, by_hand, *args):
    """Mean over sequences, sum over layers."""
    return sum(np.mean([by_hand(*part, *args) for part in layer]) for layer in parts)


def test_device_loss_is_the_papers(routing, sequences, batches):
    _, _, load, probability = map(jnp.asarray, routing)
    loss = device_loss(load, probability, devices=D)
    expected = over_layers(sequences, device_by_hand)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss = device_loss(batch_wise(load), batch_wise(probability), devices=D)
    whole = over_layers(batches, device_by_hand)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    assert abs(whole - expected) > 1e-3, "the data would not show a mistake"


@pytest.mark.parametrize("limit", [1, 2])
def test_communication_loss_is_v2s(routing, sequences, batches, limit):
    _, chosen, _, probability = map(jnp.asarray, routing)
    there = sent(chosen, experts=E, devices=D)
    loss = communication_loss(there, probability, limit=limit)
    expected = over_layers(sequences, communication_by_hand, limit)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    whole = over_layers(batches, communication_by_hand, limit)
    loss = communication_loss(batch_wise(there), batch_wise(probability), limit=limit)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    assert abs(whole - expected) > 1e-3, "the data would not show a mistake"


def test_even_load_costs_one_a_layer():
    load, probability = np.full((L, B, E), T * K / E), np.full((L, B, E), 1 / E)
    np.testing.assert_allclose(sequence_loss(load, probability), L, rtol=1e-6)
    loss = device_loss(load, probability, devices=D)
    np.testing.assert_allclose(loss, L, rtol=1e-6)
    everywhere = np.full((L, B, D), 3 / D)  # each token on three of four devices
    loss = communication_loss(everywhere, probability, limit=3)
    np.testing.assert_allclose(loss, L, rtol=1e-6)


def losses_of(scores_LBTE, config):
    """The four losses, through the router itself."""
    routed = jax.vmap(lambda scores: route(scores, None, config))(scores_LBTE)
    load, probability = routed.load_BE, routed.probability_BE
    there = sent(routed.indices_BTk, experts=E, devices=D)
    return {
        "sequence": sequence_loss(load, probability),
        "expert": expert_loss(load, probability),
        "device": device_loss(load, probability, devices=D),
        "communication": communication_loss(there, probability, limit=2),
    }


@pytest.mark.parametrize("kind", ["sequence", "expert", "device", "communication"])
def test_gradients_are_those_with_f_held_fixed(routing, sequences, batches, kind):
    """Written out: d loss / d s_j = (f_j - sum_i f_i s_i / S) / (S T B), f of an expert
    being that of its device where the loss counts devices; against what JAX finds
    through the router.
    """
    scores, chosen, *_ = routing
    config = Moe(num_experts=E, num_shared=0, top_k=K, width=1, score=Score.SIGMOID)
    given = jnp.asarray(scores, jnp.float32)
    found = jax.grad(lambda scores: losses_of(scores, config)[kind])(given)
    expected = np.zeros((L, B, T, E))
    for layer, b in np.ndindex(L, B):
        tokens = batches[layer][0][1] if kind == "expert" else chosen[layer, b]
        f = np.array([frequency(tokens, expert) for expert in range(E)])
        if kind == "device":
            f = f.reshape(D, -1).mean(axis=1).repeat(E // D)
        if kind == "communication":
            there = [
                (tokens // (E // D) == device).any(1).mean() for device in range(D)
            ]
            f = D / 2 * np.array(there).repeat(E // D)
        for t, token in enumerate(scores[layer, b]):
            share = token / token.sum()
            expected[layer, b, t] = (f - f @ share) / token.sum() / (T * B)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_unequal_groups_of_experts_are_refused(routing):
    _, chosen, load, probability = map(jnp.asarray, routing)
    with pytest.raises(UserError, match="devices=3 must divide num_experts=8"):
        device_loss(load, probability, devices=3)
    with pytest.raises(UserError, match="devices=3 must divide num_experts=8"):
        sent(chosen, experts=E, devices=3)


def test_device_limit_is_the_routers():
    """V2: 3 of 8 devices; without groups like the devices, top_k bounds it."""
    groups = Groups(count=8, kept=3, score=GroupScore.MAX)
    moe = Moe(num_experts=160, num_shared=2, top_k=6, width=1, groups=groups)
    assert device_limit(moe, devices=8) == 3
    assert device_limit(moe, devices=4) == 4
    assert device_limit(moe, devices=16) == 6


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
