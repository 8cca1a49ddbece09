"""AdamW's constants, what decays, and the learning-rate schedules."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsjax.errors import UserError
from dsjax.train.optimizer import adamw, decays
from dsjax.train.schedule import cosine, multi_step


def test_adamw_by_hand():
    """Two steps of Loshchilov and Hutter's algorithm, gradient clipped to norm 1."""
    params = {"w": jnp.asarray([1.0, -2.0]), "norm.scale": jnp.asarray([3.0])}
    gradients = [
        {"w": jnp.asarray([3.0, 0.0]), "norm.scale": jnp.asarray([4.0])},
        {"w": jnp.asarray([0.1, 0.2]), "norm.scale": jnp.asarray([0.3])},
    ]
    optimizer = adamw(0.1)
    state = optimizer.init(params)
    expected = {"w": np.array([1.0, -2.0]), "norm.scale": np.array([3.0])}
    m = {k: 0.0 for k in params}
    v = {k: 0.0 for k in params}
    for t, gradient in enumerate(gradients, start=1):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        for name in expected:
            g = np.asarray(gradient[name]) / max(norm, 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            decay = 0.1 * expected[name] if name == "w" else 0.0
            expected[name] = expected[name] - 0.1 * (step + decay)
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("embedding_VD", True),
        ("segments.0.attention.q_up_NHQ", True),
        ("segments.1.feed_forward.router.weight_ED", True),
        ("segments.0.attention_norm.scale", False),
        ("segments.0.attention.q_bias_KGH", False),
        ("mtp.hidden_norm.scale", False),
    ],
)
def test_norms_and_biases_do_not_decay(path, expected):
    assert decays(path) is expected


def test_multi_step_is_deepseek_llms():
    rate = jax.vmap(multi_step(peak=4.2e-4, steps=10000, warmup=2000))
    steps = np.array([0, 999, 1999, 5000, 7999, 8000, 8999, 9000, 9999])
    factors = [1 / 2000, 0.5, 1, 1, 1, 0.316, 0.316, 0.1, 0.1]
    np.testing.assert_allclose(rate(steps), 4.2e-4 * np.array(factors), rtol=1e-5)


def test_cosine_ends_at_its_final_rate():
    rate = cosine(peak=1.0, steps=100, warmup=10, final=0.1)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == pytest.approx(0.1) and values[10] == 1.0
    assert values[55] == pytest.approx(0.55) and values[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="warmup=20"):
        cosine(peak=1.0, steps=10, warmup=20)
    with pytest.raises(UserError, match="differ in length"):
        multi_step(peak=1.0, steps=10, warmup=2, decay_at=(0.6,))
