"""Rotary embedding: relative, in both layouts, with each scaling."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.config import Llama3, Mla, Rope, Yarn
from dsjax.nn.cache import Context
from dsjax.nn.mla import MultiHeadLatentAttention
from dsjax.nn.options import FLOAT32, Build
from dsjax.nn.rope import frequencies, rotate, rotate_end
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import Sharding
from tests.support import random_model, random_tokens

SCALINGS = [None, Yarn(factor=40), Llama3()]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_alone(rng, scaling, interleaved):
    rope = Rope(interleaved=interleaved, scaling=scaling)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 64)), jnp.float32) for _ in "qk")

    def product(i, j):
        at = [jnp.array([[position]]) for position in (i, j)]
        return float((rotate(q, at[0], rope) * rotate(k, at[1], rope)).sum())

    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-3)
    assert abs(product(7, 3) - product(3, 7)) > 0.1


def test_layouts_are_one_rotation_of_permuted_dimensions(rng):
    """Interleaved pairs are halves after [0, 2, 4, ..., 1, 3, 5, ...]: the published
    permutation. Without it the half-split rotation gives something else."""
    x = jnp.asarray(rng.standard_normal((2, 5, 3, 64)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    order = np.concatenate([np.arange(0, 64, 2), np.arange(1, 64, 2)])
    interleaved = rotate(x, positions, Rope(interleaved=True))
    halves = rotate(x[..., order], positions, Rope())
    np.testing.assert_array_equal(interleaved, halves)
    assert np.abs(interleaved - rotate(x, positions, Rope())).max() > 0.5


def test_complex_rotation_of_pairs(rng):
    """The definition: pair (x0, x1) is the complex number x0 + i x1, turned."""
    x = rng.standard_normal((1, 9, 16)).astype(np.float32)
    angle = np.arange(9)[:, None] * 10000.0 ** -(np.arange(8) / 8)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    got = rotate(jnp.asarray(x), jnp.arange(9)[None], Rope(interleaved=True))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_yarn_ramp_of_the_published_models():
    """Of V3's 32 pairs, those up to 10 keep their frequency, from 23 on a fortieth."""
    plain = frequencies(Rope(), 64)
    ratio = frequencies(Rope(scaling=Yarn(factor=40)), 64) / plain
    np.testing.assert_allclose(ratio[:11], 1)
    np.testing.assert_allclose(ratio[23:], 1 / 40)
    assert (np.diff(ratio[10:24]) < 0).all()


@pytest.mark.parametrize(
    ("mscale", "all_dim", "rotation", "softmax"),
    [(0.707, 0.707, 1.0, 1.5896), (1.0, 1.0, 1.0, 1.8739), (1.0, 0.0, 1.3689, 1.0)],
)
def test_yarn_magnitudes(mscale, all_dim, rotation, softmax):
    yarn = Yarn(factor=40, mscale=mscale, mscale_all_dim=all_dim)
    assert yarn.rotation_scale == pytest.approx(rotation, abs=1e-4)
    assert yarn.softmax_scale == pytest.approx(softmax, abs=1e-4)


def test_llama3_stretches_long_waves_only():
    plain = frequencies(Rope(theta=5e5), 128)
    ratio = frequencies(Rope(theta=5e5, scaling=Llama3()), 128) / plain
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[waves < 8192 / 4], 1)
    np.testing.assert_allclose(ratio[waves > 8192], 1 / 8)
    between = (waves > 8192 / 4) & (waves < 8192)
    assert ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all() and between.any()


def test_extension_keeps_weights_and_reaches_further(mesh):
    """Four times the length by YaRN: the same weights fit, near positions hardly turn
    otherwise, and what lies beyond the old length is seen where it is.
    """
    short = replace(models.tiny_v3(), max_length=64, init_std=0.125)
    rope = Rope(interleaved=True, scaling=Yarn(factor=4, original_length=64))
    attention = replace(short.attention, rope=rope)
    long = replace(short, attention=attention, max_length=256)
    start = random_model("tiny_v3")
    extended = Transformer.abstract(long)
    weights, places = flat(start), flat(extended)
    assert {p: v.shape for p, v in weights.items()} == {
        p: v.shape for p, v in places.items()
    }
    for path, variable in places.items():
        variable.set_value(weights[path][...])
    tokens = random_tokens(start, rows=1, length=200)
    moved = tokens.copy()
    moved[0, [3, 120]] = moved[0, [120, 3]]
    logits, other = (np.asarray(extended(t))[0, -1] for t in (tokens, moved))
    assert np.abs(logits - other).max() > 1e-3, "the order of far tokens matters"


@pytest.mark.parametrize("mscale", [1.0, 0.707])
def test_latent_attention_beyond_the_original_length(mesh, rng, mscale):
    """One layer at positions from 0 to 63, made for 16: against the formulas in complex
    numbers, with every frequency and the scale of the softmax worked out here.
    """
    N, H, R, L = 3, 8, 8, 12
    yarn = Yarn(
        factor=8,
        original_length=16,
        beta_fast=4.0,
        mscale=mscale,
        mscale_all_dim=mscale,
    )
    config = Mla(
        num_heads=N,
        kv_rank=L,
        q_rank=None,
        nope_dim=H,
        rope_dim=R,
        value_dim=H,
        rope=Rope(interleaved=True, scaling=yarn),
    )
    build = Build(std=0.3, sharding=Sharding(), precision=FLOAT32, rngs=nnx.Rngs(0))
    layer = MultiHeadLatentAttention(config, 20, build=build)
    x = rng.standard_normal((64, 20)).astype(np.float32)
    context = Context(positions_BT=jnp.arange(64)[None])
    got, _ = layer(jnp.asarray(x)[None], context)

    def turn(values_TR):
        """Pair i turns by its frequency; a pair that turns more than beta_fast times in
        the original length keeps it, one below beta_slow has an eighth, by pair index
        in a straight line between.
        """
        at = lambda turns: R * np.log(16 / (turns * 2 * np.pi)) / 2 / np.log(1e4)  # noqa: E731
        low, high = max(np.floor(at(4.0)), 0), np.ceil(at(1.0))
        share = np.clip((np.arange(R // 2) - low) / max(high - low, 0.001), 0, 1)
        plain = 1e4 ** (-np.arange(0, R, 2) / R)
        angle = np.arange(64)[:, None] * (plain * (1 - share) + plain / 8 * share)
        return (values_TR[:, ::2] + 1j * values_TR[:, 1::2]) * np.exp(1j * angle)

    w = {
        name: np.asarray(layer_weight[...], np.float64)
        for name, layer_weight in (
            ("q", layer.q_NHD),
            ("down", layer.kv_down_CD),
            ("up", layer.kv_up_NHL),
            ("o", layer.o_DNH),
        )
    }
    c = x @ w["down"].T
    latent = c[:, :L] / np.sqrt((c[:, :L] ** 2).mean(-1, keepdims=True) + 1e-6)
    key = turn(c[:, L:])
    expected = np.zeros((64, 20))
    for n in range(N):
        q, kv = x @ w["q"][n].T, latent @ w["up"][n].T
        scores = q[:, :H] @ kv[:, :H].T + (turn(q[:, H:]) @ key.conj().T).real
        scores *= (0.1 * mscale * np.log(8) + 1) ** 2 / np.sqrt(H + R)
        scores[np.triu_indices(64, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected += weights @ kv[:, H:] @ w["o"][:, n].T
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got[0], expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotated_end_is_the_rest_beside_it(rng, interleaved):
    """And so is its gradient."""
    rope = Rope(interleaved=interleaved)
    x, dy = (jnp.asarray(rng.standard_normal((2, 5, 3, 20)), jnp.float32) for _ in "xy")
    positions = jnp.asarray(rng.integers(0, 100, (2, 5)), jnp.int32)

    def apart(x):
        end = rotate(x[..., 12:], positions, rope)
        return jnp.concatenate([x[..., :12], end], axis=-1)

    def at_once(x):
        return rotate_end(x, positions, rope, 8)

    (y, back), (expected, expected_back) = (jax.vjp(f, x) for f in (at_once, apart))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(*back(dy), *expected_back(dy), rtol=1e-6)
