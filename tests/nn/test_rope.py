"""Rotary embedding: relative, in both layouts, with each scaling."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Llama3, Rope, Yarn
from dsjax.nn.rope import frequencies, rotate

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
