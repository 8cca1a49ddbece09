"""Losses against plain NumPy written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.train.loss import mtp_loss, mtp_targets, next_token_loss, token_losses

B, S, V = 3, 9, 17
T = S - 1


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    return rng.normal(0, 3, (B, T, V)), rng.integers(0, V, (B, S))


def by_hand(logits, targets):
    losses = np.zeros(targets.shape)
    for b, t in np.ndindex(targets.shape):
        probability = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
        losses[b, t] = -np.log(probability[targets[b, t]])
    return losses


def test_next_token_loss(example):
    logits, tokens = example
    expected = by_hand(logits, tokens[:, 1:])
    loss = next_token_loss(jnp.asarray(logits), jnp.asarray(tokens[:, 1:]))
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    mask = jnp.asarray(np.random.default_rng(1).integers(0, 2, (B, T)), bool)
    masked = next_token_loss(jnp.asarray(logits), jnp.asarray(tokens[:, 1:]), mask)
    np.testing.assert_allclose(masked, expected[np.asarray(mask)].mean(), rtol=1e-6)


def test_float32_whatever_the_logits_are(example):
    logits = jnp.asarray(example[0], jnp.bfloat16)
    losses = token_losses(logits, jnp.asarray(example[1][:, 1:]))
    assert losses.dtype == jnp.float32
    expected = by_hand(np.asarray(logits, np.float64), example[1][:, 1:])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_huge_logits_stay_finite():
    logits = jnp.asarray([[[1e4, -1e4, 0.0]]])
    losses, gradient = jax.value_and_grad(
        lambda x: next_token_loss(x, jnp.asarray([[1]]))
    )(logits)
    np.testing.assert_allclose(losses, 2e4)
    np.testing.assert_allclose(gradient, [[[1, -1, 0]]])


def test_mtp_loss(example):
    """Position i predicts token i + 2; T - 1 of the T inputs have one; the sum is over T."""
    logits, tokens = example
    expected = by_hand(logits[:, : T - 1], tokens[:, 2:]).sum(axis=1).mean() / T
    targets = mtp_targets(jnp.asarray(tokens))
    assert targets.shape == (B, T)
    loss = mtp_loss(jnp.asarray(logits), targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_mtp_loss_ignores_the_last_position(example):
    logits, tokens = example
    targets = mtp_targets(jnp.asarray(tokens))
    gradient = jax.grad(lambda x: mtp_loss(x, targets))(jnp.asarray(logits))
    assert not gradient[:, -1].any()
    assert gradient[:, :-1].any(axis=(0, 2)).all()
