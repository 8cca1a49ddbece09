"""The training step: it learns, shards, balances, and leaves router biases to balancing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import make_mesh
from dsjax.train import balance, loss
from dsjax.train.optimizer import adamw
from dsjax.train.step import Recipe, init_state, losses, make_step, write_back

CONFIG = models.shrink(models.v3(), vocab_size=128, width=16)
LENGTH = 16


@pytest.fixture
def batch(rng):
    return {"tokens": rng.integers(0, 128, (8, LENGTH + 1)).astype(np.int32)}


def run(model, batch, *, steps, recipe=None, rate=1e-3):
    optimizer = adamw(rate)
    state, step = init_state(model, optimizer), make_step(model, optimizer, recipe)
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


def test_learns_a_batch_by_heart(batch):
    model = Transformer.create(CONFIG, seed=0)
    state, history = run(model, batch, steps=60, rate=3e-3)
    assert history[0].loss == pytest.approx(np.log(128), abs=1.0)
    assert history[-1].loss < 0.3 * history[0].loss
    assert history[-1].mtp_loss < 0.5 * history[0].mtp_loss
    assert int(state.step) == 60
    write_back(model, state)
    logits = model(batch["tokens"][:, :-1])
    after = loss.next_token_loss(logits, jnp.asarray(batch["tokens"][:, 1:]))
    assert after < history[-1].loss * 1.05


def test_sharded_step_equals_single_device(batch):
    """fsdp=2, expert=2, tensor=2 against one device: losses, loads, weights, biases."""
    meshes = [make_mesh(), make_mesh(fsdp=2, expert=2, tensor=2)]
    (one, h1), (many, h8) = (
        run(Transformer.create(CONFIG, seed=0, mesh=mesh), batch, steps=3)
        for mesh in meshes
    )
    for a, b in zip(h1, h8):
        np.testing.assert_array_equal(a.load_LE, b.load_LE)
        np.testing.assert_allclose(a.loss, b.loss, atol=1e-5)
        np.testing.assert_allclose(a.mtp_loss, b.mtp_loss, atol=1e-5)
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
    for path, bias in one.biases.items():
        np.testing.assert_array_equal(bias, many.biases[path])
    # Adam divides by the gradient's own size: where that is rounding noise, so is the
    # step. Weights agree to a hundredth of the three steps' length.
    for path, weight in one.params.items():
        np.testing.assert_allclose(weight, many.params[path], atol=3e-5, err_msg=path)


def test_moments_rest_where_their_weights_do(batch):
    model = Transformer.create(CONFIG, seed=0, mesh=make_mesh(fsdp=2, expert=4))
    state, _ = run(model, batch, steps=1)
    for moments in (state.moments[1][0].mu, state.moments[1][0].nu):
        for path, weight in state.params.items():
            assert moments[path].sharding == weight.sharding, path
    for path, variable in flat(model).items():
        new = (state.params | state.biases)[path]
        assert new.sharding.is_equivalent_to(variable[...].sharding, new.ndim), path


def test_biases_move_by_load_alone(batch):
    """One step: gamma * sign(mean - load) exactly; no gradient, no moments, no decay."""
    model = Transformer.create(CONFIG, seed=0)
    state, (metrics,) = run(model, batch, steps=1, recipe=Recipe(bias_speed=0.01))
    bias_LE = np.concatenate(
        [
            state.biases["segments.1.feed_forward.router.bias_E"],
            state.biases["mtp.block.feed_forward.router.bias_E"][None],
        ]
    )
    mean = metrics.load_LE.mean(axis=-1, keepdims=True)
    assert (metrics.load_LE.sum(axis=-1) == 8 * LENGTH * 4).all(), "the whole batch"
    np.testing.assert_allclose(bias_LE, 0.01 * np.sign(mean - metrics.load_LE))
    assert not any("bias" in path for path in state.params)
    assert not any("bias" in path for path in state.moments[1][0].mu)

    def objective(state):
        terms = losses(nnx.merge(graph, state), batch)
        return terms.loss + terms.mtp_loss + terms.balance_loss

    graph, weights = nnx.split(model)
    with jax.set_mesh(model.mesh):
        gradients = flat(nnx.merge(graph, jax.grad(objective)(weights)))
    for path, gradient in gradients.items():
        assert bool(jnp.any(gradient[...] != 0)) == (not path.endswith("bias_E")), path


def test_bias_updates_even_out_the_load(batch):
    """The same data with and without updates: only the former ends near balance."""
    recipes = [Recipe(bias_speed=speed, sequence_balance=0.0) for speed in (0.0, 0.02)]
    left, moved = (
        run(Transformer.create(CONFIG, seed=0), batch, steps=40, recipe=recipe)[1]
        for recipe in recipes
    )
    start = left[0].max_violation_L.mean()
    assert start > 0.4
    assert np.mean([h.max_violation_L for h in moved[-5:]]) < 0.5 * np.mean(
        [h.max_violation_L for h in left[-5:]]
    )


def test_every_term_of_the_objective_pulls(batch):
    """The gradient is that of loss + lambda * mtp + alpha * balance, written out here."""
    model = Transformer.create(CONFIG, seed=0)
    recipe = Recipe(mtp=lambda step: 0.3 + 0.0 * step, sequence_balance=0.05)
    _, (metrics,) = run(model, batch, steps=1, recipe=recipe)
    graph, weights = nnx.split(model)
    tokens = jnp.asarray(batch["tokens"])

    def objective(weights):
        model = nnx.merge(graph, weights)
        output = model.forward(tokens[:, :-1])
        logits = model.logits(output.hidden_BTD)
        total = loss.next_token_loss(logits, tokens[:, 1:])
        further = model.mtp_logits(output.hidden_BTD, tokens[:, 1:])
        exact = loss.token_losses(further[:, :-1], tokens[:, 2:])
        total += 0.3 * exact.sum() / tokens[:, 1:].size
        _, last = model.predict_further(output.hidden_BTD, tokens[:, 1:])
        stacked = output.routing[1]
        total += 0.05 * balance.sequence_loss(stacked.load_BE, stacked.probability_BE)
        return total + 0.05 * balance.sequence_loss(
            last.load_BE[None], last.probability_BE[None]
        )

    with jax.set_mesh(model.mesh):
        gradients = jax.jit(jax.grad(objective))(weights)
    squares = [float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients)]
    np.testing.assert_allclose(metrics.gradient_norm, np.sqrt(sum(squares)), rtol=1e-5)


def test_segments_keep_documents_apart(batch):
    """Two documents in a window cost what each costs alone; the border does not count."""
    model = Transformer.create(replace(CONFIG, mtp=False), seed=0)
    half = LENGTH // 2 + 1
    segments = np.zeros((8, LENGTH + 1), np.int32)
    segments[:, half:] = 1
    with jax.set_mesh(model.mesh):
        together = losses(model, {**batch, "segments": segments}).loss
        parts = [batch["tokens"][:, :half], batch["tokens"][:, half:]]
        alone = [losses(model, {"tokens": part}).loss for part in parts]
    counts = [part.shape[1] - 1 for part in parts]
    np.testing.assert_allclose(together, np.average(alone, weights=counts), rtol=1e-5)


def test_a_dense_model_trains_too(batch):
    config = models.shrink(models.llm_7b(), vocab_size=128, width=16)
    _, history = run(Transformer.create(config, seed=0), batch, steps=5, rate=3e-3)
    assert history[-1].loss < history[0].loss
    assert history[0].load_LE.size == 0 and history[0].mtp_loss == 0
