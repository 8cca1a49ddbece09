"""Token dropping against a loop over rows, and what the experts make of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.config import Moe
from dsjax.errors import UserError
from dsjax.nn import experts
from dsjax.nn.cache import Context, Phase
from dsjax.nn.dropping import Dropping, kept_rows
from dsjax.nn.moe import MixtureOfExperts
from dsjax.nn.options import FLOAT32, Build
from dsjax.nn.transformer import Transformer
from dsjax.sharding import Sharding, make_mesh
from tests.support import fill

B, T, E, K = 4, 10, 8, 3
MOE = Moe(num_experts=E, num_shared=1, top_k=K, width=16)


def by_hand(indices, affinities, protected, dropping):
    """Device by device: the protected rows, then the best of the others that fit."""
    size, kept = E // dropping.devices, np.zeros(indices.shape, bool)
    capacity = int(dropping.capacity * indices.size / dropping.devices)
    for device in range(dropping.devices):
        rows = [
            row for row in np.ndindex(*indices.shape) if indices[row] // size == device
        ]
        spared = [row for row in rows if protected[row[0]]]
        others = [row for row in rows if not protected[row[0]]]
        others.sort(key=lambda row: -affinities[row])  # stable: the earlier row first
        for row in spared + others[: max(capacity - len(spared), 0)]:
            kept[row] = True
    return kept


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("capacity", [1.0, 0.5])
@pytest.mark.parametrize("protected", [[], [2], [0, 1, 3]], ids=str)
def test_equals_a_loop_over_rows(mesh, rng, devices, capacity, protected):
    """Early experts are liked best, so that some devices overflow; some affinities are
    equal. Three protected sequences are more than half the capacity.
    """
    scores = rng.random((B, T, E)) * np.linspace(1.5, 0.5, E)
    indices = np.argsort(-scores, axis=-1)[..., :K].astype(np.int32)
    affinities = (
        np.take_along_axis(scores, indices, axis=-1).round(1).astype(np.float32)
    )
    spared = np.isin(np.arange(B), protected)
    dropping = Dropping(devices=devices, capacity=capacity)
    kept = jax.jit(kept_rows, static_argnums=0, static_argnames="experts")(
        dropping, *map(jnp.asarray, (indices, affinities, spared)), experts=E
    )
    expected = by_hand(indices, affinities, spared, dropping)
    np.testing.assert_array_equal(kept, expected)
    assert kept.all() == (devices == 1 and capacity == 1)


def test_unequal_groups_of_experts_are_refused(mesh):
    rows = jnp.zeros((B, T, K), jnp.int32)
    with pytest.raises(UserError, match="devices=3 must divide num_experts=8"):
        kept_rows(Dropping(devices=3), rows, rows * 1.0, jnp.zeros(B, bool), experts=E)


def layer():
    build = Build(std=0.2, sharding=Sharding(), precision=FLOAT32, rngs=nnx.Rngs(0))
    return MixtureOfExperts(MOE, 24, build=build)


def dropping_context(**options):
    return Context(
        positions_BT=jnp.broadcast_to(jnp.arange(T), (B, T)),
        dropping=Dropping(devices=4, capacity=0.8, **options),
        protected_B=jnp.arange(B) == 1,
    )


def test_dropped_rows_add_nothing(mesh, rng):
    """Every kept choice weighs what it weighs without dropping; the shared expert and
    the counts for the balance losses see all tokens."""
    mixture = layer()
    x = jnp.asarray(rng.standard_normal((B, T, 24)), jnp.float32)
    context = dropping_context()
    y, routing = jax.jit(mixture)(x, context)
    whole = mixture.router(x, replace(context, dropping=None))
    kept = np.asarray(routing.kept_BTk)
    assert not kept[[0, 2, 3]].all() and kept[1].all()
    for field in ("indices_BTk", "load_BE"):
        np.testing.assert_array_equal(getattr(routing, field), getattr(whole, field))
    for field in ("weights_BTk", "probability_BE"):
        found, expected = getattr(routing, field), getattr(whole, field)
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # fused, or one by one
    gate, up, down = (
        np.asarray(w[...], np.float64)
        for w in (
            mixture.experts.gate_EFD,
            mixture.experts.up_EFD,
            mixture.experts.down_EDF,
        )
    )
    expected = np.asarray(mixture.shared(x), np.float64)
    for b, t, k in np.argwhere(kept):
        e, token = int(routing.indices_BTk[b, t, k]), np.asarray(x[b, t], np.float64)
        pre = gate[e] @ token
        hidden = pre / (1 + np.exp(-pre)) * (up[e] @ token)
        expected[b, t] += float(routing.weights_BTk[b, t, k]) * (down[e] @ hidden)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_dropped_rows_cost_nothing(mesh, rng, monkeypatch):
    """The grouped products are told of the kept rows alone."""
    told = []

    def record(product):
        def recorded(x, *weights_and_sizes, **options):
            told.append(int(weights_and_sizes[-1].sum()))
            return product(x, *weights_and_sizes, **options)

        return recorded

    recorded = record(experts.grouped_feed_forward)
    monkeypatch.setattr(experts, "grouped_feed_forward", recorded)
    x = jnp.asarray(rng.standard_normal((B, T, 24)), jnp.float32)
    indices = jnp.asarray(rng.integers(0, E, (B, T, K)), jnp.int32)
    kept = jnp.asarray(rng.random((B, T, K)) < 0.7)
    layers, chosen = layer().experts, jnp.where(kept, indices, E)
    weights = [w[...] for w in (layers.gate_EFD, layers.up_EFD, layers.down_EDF)]
    rows = [a.reshape(B * T, -1) for a in (x, chosen, jnp.ones((B, T, K)))]
    experts.apply_experts(*rows, tuple(weights))
    assert told == [int(kept.sum())]


def test_gradient_of_a_dropped_row_is_zero(mesh, rng):
    """And only that: each weight of a kept choice has one."""
    mixture = layer()
    x = jnp.asarray(rng.standard_normal((B, T, 24)), jnp.float32)
    weigh = jnp.asarray(rng.standard_normal((B, T, 24)), jnp.float32)
    routing = mixture.router(x, dropping_context())

    @jax.jit
    @jax.grad
    def gradient(weights_BTk):
        y = mixture.experts(x, replace(routing, weights_BTk=weights_BTk), Phase.FULL)
        return (y * weigh).sum()

    reached = np.asarray(gradient(routing.weights_BTk)) != 0
    np.testing.assert_array_equal(reached, routing.kept_BTk)


CONFIG = models.shrink(models.v2(), vocab_size=128, width=16)
TOKENS = np.random.default_rng(1).integers(0, 128, (8, 16), dtype=np.int32)


def compiled(model, dropping=None):
    """seed -> (hidden state, which rows were kept or None)."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, rng):
        output = nnx.merge(graph, state).forward(TOKENS, dropping=dropping, rng=rng)
        return output.hidden_BTD, output.routing[-1].kept_BTk

    def forward(seed=0):
        with jax.set_mesh(model.mesh):
            return jax.device_get(run(state, jax.random.key(seed)))

    return forward


def test_a_model_drops_alike_on_every_mesh():
    """Capacity is one of the batch over all devices; one key, one choice of sequences."""
    meshes = make_mesh(), make_mesh(fsdp=2, expert=2, tensor=2)
    one, many = (fill(Transformer.abstract(CONFIG, mesh=m), std=0.2) for m in meshes)
    dropping = Dropping(devices=4, capacity=1.0, protected=0.3)
    dropped = compiled(one, dropping)
    (hidden, kept), (there, kept_there) = dropped(), compiled(many, dropping)()
    np.testing.assert_array_equal(kept, kept_there)
    np.testing.assert_allclose(there, hidden, atol=1e-5 * np.abs(hidden).max())
    assert 0.5 < kept.mean() < 1
    spared = [dropped(seed)[1].all(axis=(0, 2, 3)).tolist() for seed in range(4)]
    assert len(set(map(tuple, spared))) > 1, "the key makes no difference"


def test_nothing_is_dropped_unless_it_is_asked_for():
    model = Transformer.abstract(CONFIG)
    graph, state = nnx.split(model)

    def kept(state):
        output = nnx.merge(graph, state).forward(jnp.asarray(TOKENS))
        return output.routing[-1].kept_BTk

    with jax.set_mesh(model.mesh):
        assert jax.eval_shape(kept, state) is None


def test_a_key_is_required():
    model = Transformer.abstract(CONFIG)
    with jax.set_mesh(model.mesh), pytest.raises(ValueError, match="needs an rng key"):
        model.forward(TOKENS, dropping=Dropping(devices=4))
