"""AdamW against Optax's own and by hand: what decays, how the gradient is clipped, bfloat16 moments."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsjax.errors import UserError
from dsjax.train.optimizer import AdamW, adamw, apply, decays, global_norm


def run(optimizer, params, gradients, rates):
    transform = adamw(optimizer)
    state = transform.init(params)
    for gradient, rate in zip(gradients, rates):
        norm = global_norm(gradient)
        updates, state = transform.update(gradient, state, params, norm=norm)
        params = apply(params, updates, rate)
    return params, state


def random(seed, scale):
    rng = np.random.default_rng(seed)
    shapes = {"w": (5, 7), "norm.scale": (7,), "q_bias_KGH": (3,)}
    return {
        k: jnp.asarray(rng.normal(0, scale, v), jnp.float32) for k, v in shapes.items()
    }


def test_by_hand():
    """Two steps of Loshchilov and Hutter's algorithm, gradient clipped to norm 1."""
    params = {"w": jnp.asarray([1.0, -2.0]), "norm.scale": jnp.asarray([3.0])}
    gradients = [
        {"w": jnp.asarray([3.0, 0.0]), "norm.scale": jnp.asarray([4.0])},
        {"w": jnp.asarray([0.1, 0.2]), "norm.scale": jnp.asarray([0.3])},
    ]
    rates = [0.1, 0.05]
    expected = {"w": np.array([1.0, -2.0]), "norm.scale": np.array([3.0])}
    m, v = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for t, (gradient, rate) in enumerate(zip(gradients, rates), start=1):
        norm = np.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        for name in expected:
            g = np.asarray(gradient[name]) / max(norm, 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            decay = 0.1 * expected[name] if name == "w" else 0.0
            expected[name] = expected[name] - rate * (step + decay)
    params, _ = run(AdamW(), params, gradients, rates)
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_norm_is_summed_in_float32(dtype):
    """Stacks whole or layer by layer; bfloat16 sums of so many would stand still."""
    rng = np.random.default_rng(0)
    gradients = {
        "stack": jnp.asarray(rng.standard_normal((4, 300, 70)), dtype),
        "norm.scale": jnp.asarray(rng.standard_normal(70), dtype),
    }
    exact = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradients.values()))
    for apart in (), {"stack"}:
        found = global_norm(gradients, apart=apart)
        np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_equals_optaxs_own():
    """20 steps with a rate that changes, other constants than the defaults."""
    settings = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.3}
    gradients = [random(seed, 10.0 ** (seed % 3 - 1)) for seed in range(20)]
    rates = np.linspace(0.1, 0.01, 20)
    oracle = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            lambda step: jnp.asarray(rates)[step],
            mask={"w": True, "norm.scale": False, "q_bias_KGH": False},
            **settings,
        ),
    )
    expected = random(99, 1.0)
    state = oracle.init(expected)
    for gradient in gradients:
        updates, state = oracle.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    optimizer = AdamW(clip=0.5, **settings)
    params, _ = run(optimizer, random(99, 1.0), gradients, rates)
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-6, atol=1e-7)


def test_bfloat16_moments_rest_rounded_and_compute_in_float32():
    """Each step uses the moments before they are rounded; both rest in bfloat16."""
    optimizer = AdamW(moments=jnp.bfloat16, weight_decay=0.0, clip=1e9)
    w = jnp.asarray([1.0, 2.0, 3.0])
    gradients = [jnp.asarray([0.3, -1.7, 5.3]), jnp.asarray([1.1, 0.7, -0.9])]
    params, state = run(optimizer, {"w": w}, [{"w": g} for g in gradients], [0.1, 0.1])
    rounded = lambda x: np.asarray(jnp.bfloat16(x), np.float32)  # noqa: E731
    m = v = np.float32(0)
    for t, g in enumerate(map(np.asarray, gradients), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w -= 0.1 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        m, v = rounded(m), rounded(v)
    np.testing.assert_allclose(params["w"], w, rtol=1e-6)
    moments = state[1]
    assert moments.count.dtype == jnp.int32 and int(moments.count) == 2
    for found, expected in ((moments.mu, m), (moments.nu, v)):
        assert found["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(found["w"]), expected)


def test_bfloat16_parameters_move_in_float32():
    params = {"w": jnp.asarray([1.0], jnp.bfloat16)}
    moved = apply(params, {"w": jnp.asarray([-3.0])}, jnp.float32(0.001))
    assert moved["w"].dtype == jnp.bfloat16
    assert float(moved["w"][0]) == float(jnp.bfloat16(1.003))


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


@pytest.mark.parametrize("wrong", [{"b1": 1.0}, {"clip": 0.0}, {"weight_decay": -0.1}])
def test_nonsense_is_refused(wrong):
    ((name, number),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={number}"):
        AdamW(**wrong)
