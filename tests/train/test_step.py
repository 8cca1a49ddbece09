"""The training step: it learns, shards, balances; router biases move by load alone."""

import functools
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
RECIPE = Recipe(
    sequence_balance=0.05, bias_speed=0.01, mtp=lambda step: 0.3 + 0.0 * step
)
TOKENS = np.random.default_rng(0).integers(0, 128, (8, LENGTH + 1)).astype(np.int32)
MESHES = {"one": {}, "many": {"fsdp": 2, "expert": 2, "tensor": 2}}
BIASES = (
    "segments.1.feed_forward.router.bias_E",
    "mtp.block.feed_forward.router.bias_E",
)


@functools.cache
def compiled(mesh):
    """(fresh state, step) on a mesh; compiled once for all tests."""
    model = Transformer.create(CONFIG, seed=0, mesh=make_mesh(**MESHES[mesh]))
    optimizer = adamw(3e-3)
    step = make_step(model, optimizer, RECIPE)
    return model, lambda: init_state(model, optimizer), step


def run(mesh, *, steps):
    _, fresh, step = compiled(mesh)
    state, history = fresh(), []
    for _ in range(steps):
        state, metrics = step(state, {"tokens": TOKENS})
        history.append(jax.device_get(metrics))
    return state, history


def test_learns_a_batch_by_heart():
    state, history = run("one", steps=40)
    assert history[0].loss == pytest.approx(np.log(128), abs=1.0)
    assert history[-1].loss < 0.3 * history[0].loss
    assert history[-1].mtp_loss < 0.7 * history[0].mtp_loss
    assert int(state.step) == 40
    model = Transformer.create(CONFIG, seed=1)
    write_back(model, state)
    after = loss.next_token_loss(model(TOKENS[:, :-1]), jnp.asarray(TOKENS[:, 1:]))
    assert after < history[-1].loss * 1.05, "the trained weights are in the model"


def test_sharded_steps_equal_single_device():
    """fsdp=2, expert=2, tensor=2 against one device: losses, loads, weights, biases."""
    (one, ones), (many, manys) = (run(mesh, steps=3) for mesh in MESHES)
    for a, b in zip(ones, manys):
        np.testing.assert_array_equal(a.load_LE, b.load_LE)
        np.testing.assert_allclose(a.loss, b.loss, atol=1e-5)
        np.testing.assert_allclose(a.mtp_loss, b.mtp_loss, atol=1e-5)
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
    for path, bias in one.biases.items():
        np.testing.assert_array_equal(bias, many.biases[path])
    # Adam divides a gradient by its own size: where it is rounding noise, so is the
    # step. All but a few weights in a million agree to 1e-5; none is a step apart.
    for path, weight in one.params.items():
        difference = np.abs(np.asarray(weight) - np.asarray(many.params[path]))
        assert difference.max() < 3e-3, path
        assert np.quantile(difference, 0.999) < 1e-5, path


def test_everything_rests_where_its_weight_does():
    state, _ = run("many", steps=1)
    for moments in (state.moments[1][0].mu, state.moments[1][0].nu):
        for path, weight in state.params.items():
            assert moments[path].sharding == weight.sharding, path
    for path, variable in flat(compiled("many")[0]).items():
        new = (state.params | state.biases)[path]
        assert new.sharding.is_equivalent_to(variable[...].sharding, new.ndim), path


def test_biases_move_by_the_load_of_the_whole_batch():
    """gamma * sign(mean - load) exactly; no moments, no decay."""
    state, (metrics,) = run("one", steps=1)
    stacked, mtp = (np.asarray(state.biases[path]) for path in BIASES)
    load_LE = metrics.load_LE
    assert (load_LE.sum(axis=-1) == TOKENS[:, :-1].size * 4).all()
    expected = 0.01 * np.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    np.testing.assert_allclose(np.concatenate([stacked, mtp[None]]), expected)
    assert not any("bias" in path for path in state.params)
    assert not any("bias" in path for path in state.moments[1][0].mu)
    np.testing.assert_allclose(
        metrics.max_violation_L, load_LE.max(axis=1) / load_LE.mean(axis=1) - 1
    )


def test_gradient_is_that_of_the_whole_objective():
    """loss + lambda * mtp + alpha * balance, written out; none reaches a router bias."""
    _, (metrics,) = run("one", steps=1)
    model = compiled("one")[0]
    graph, weights = nnx.split(model)
    inputs, targets = TOKENS[:, :-1], jnp.asarray(TOKENS[:, 1:])

    def objective(weights):
        model = nnx.merge(graph, weights)
        output = model.forward(inputs)
        total = loss.next_token_loss(model.logits(output.hidden_BTD), targets)
        further_BTD, last = model.predict_further(output.hidden_BTD, targets)
        two_on = loss.token_losses(model.head(further_BTD)[:, :-1], targets[:, 1:])
        total += 0.3 * two_on.sum() / targets.size
        stacked = output.routing[1]
        total += 0.05 * balance.sequence_loss(stacked.load_BE, stacked.probability_BE)
        return total + 0.05 * balance.sequence_loss(
            last.load_BE[None], last.probability_BE[None]
        )

    with jax.set_mesh(model.mesh):
        gradients = jax.jit(jax.grad(objective))(weights)
    squares = [float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients)]
    np.testing.assert_allclose(metrics.gradient_norm, np.sqrt(sum(squares)), rtol=1e-5)
    for path, gradient in flat(nnx.merge(graph, gradients)).items():
        assert bool(jnp.any(gradient[...] != 0)) == (path not in BIASES), path


def test_segments_keep_documents_apart():
    """Two documents in a window cost what each costs alone; the border does not count."""
    model = Transformer.create(replace(CONFIG, mtp=False), seed=0)
    graph, weights = nnx.split(model)
    half = LENGTH // 2 + 1
    segments = np.zeros_like(TOKENS)
    segments[:, half:] = 1

    @jax.jit
    def cost(weights, batch):
        return losses(nnx.merge(graph, weights), batch).loss

    with jax.set_mesh(model.mesh):
        together = cost(weights, {"tokens": TOKENS, "segments": segments})
        parts = [TOKENS[:, :half], TOKENS[:, half:]]
        alone = [cost(weights, {"tokens": part}) for part in parts]
    counts = [part.shape[1] - 1 for part in parts]
    np.testing.assert_allclose(together, np.average(alone, weights=counts), rtol=1e-5)


def test_a_dense_model_trains_too():
    config = models.shrink(models.llm_7b(), vocab_size=128, width=16)
    model, optimizer = Transformer.create(config, seed=0), adamw(3e-3)
    state, step = init_state(model, optimizer), make_step(model, optimizer)
    history = []
    for _ in range(5):
        state, metrics = step(state, {"tokens": TOKENS})
        history.append(metrics)
    assert history[-1].loss < history[0].loss
    assert history[0].load_LE.size == 0 and history[0].mtp_loss == 0
