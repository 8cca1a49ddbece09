"""The training step: it learns, shards, balances, adds up microbatches, skips what is not finite."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.errors import UserError
from dsjax.nn.dropping import Dropping
from dsjax.nn.options import Precision
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import make_mesh
from dsjax.train import balance, loss
from dsjax.train.objective import Objective, losses, shares
from dsjax.train.optimizer import AdamW
from dsjax.train.schedule import Piecewise, Progress
from dsjax.train.step import Rates, init_state, make_step, rates, write_back
from tests.support import fill

CONFIG = models.shrink(models.v3(), vocab_size=128, width=16)
DENSE = models.shrink(models.llm_7b(), vocab_size=128, width=16)
LENGTH = 16
OBJECTIVE = Objective(
    sequence_balance=0.05,
    bias_speed=0.01,
    mtp=Piecewise(values=(0.3, 0.1), boundaries=(1000,)),
)
START = Progress(step=0, tokens=0, total_tokens=2000)
RATES = rates(3e-3, OBJECTIVE, START)
TOKENS = np.random.default_rng(0).integers(0, 128, (8, LENGTH + 1)).astype(np.int32)
MESHES = {"one": {}, "many": {"fsdp": 2, "expert": 2, "tensor": 2}}
EMA = 0.75
# Documents of uneven number in the sequences; none ends in the first two.
BORDERS = np.random.default_rng(2).integers(1, LENGTH, (8, 3))
BORDERS[:2] = LENGTH + 1
SEGMENTS = (np.arange(LENGTH + 1)[:, None] >= BORDERS[:, None]).sum(-1).astype(np.int32)
BIASES = (
    "segments.1.feed_forward.router.bias_E",
    "mtp.block.feed_forward.router.bias_E",
)


def batch(rows=TOKENS, *, microbatches=1, **more):
    """A step's batch [A, B, S] of sequences [A * B, S]."""
    arrays = {"tokens": rows, **more}
    return {k: v.reshape(microbatches, -1, v.shape[1]) for k, v in arrays.items()}


def compiled(mesh="one", *, config=CONFIG, objective=OBJECTIVE):
    """(model, fresh state, step) on a mesh; compiled once for all tests."""
    return _compiled(mesh, config, objective)


@functools.cache  # to which an argument by name or by default is another one
def _compiled(mesh, config, objective):
    model = Transformer.create(config, seed=0, mesh=make_mesh(**MESHES[mesh]))
    step = make_step(model, optimizer=AdamW(), objective=objective, ema=EMA)
    first = init_state(model, AdamW(), ema=EMA)
    places = jax.tree.map(lambda leaf: leaf.sharding, first)
    first = jax.device_get(first)
    # A step takes its state's buffers, and `init_state` compiles a program each time.
    return model, lambda: jax.device_put(first, places, may_alias=False), step


def run(mesh="one", *, steps, **options):
    _, fresh, step = compiled(mesh, **options)
    state, history = fresh(), []
    for _ in range(steps):
        state, metrics = step(state, batch(), RATES)
        history.append(jax.device_get(metrics))
    return state, history


def test_learns_a_batch_by_heart():
    state, history = run(steps=40)
    assert history[0].loss == pytest.approx(np.log(128), abs=1.0)
    assert history[-1].loss < 0.3 * history[0].loss
    assert history[-1].mtp_loss < 0.7 * history[0].mtp_loss
    assert int(state.step) == 40 and not any(m.skipped for m in history)
    model = Transformer.abstract(CONFIG)
    write_back(model, state)
    after = plain_loss(model(TOKENS[:, :-1]), TOKENS[:, 1:])
    assert after < history[-1].loss * 1.05, "the trained weights are in the model"


def plain_loss(logits, targets):
    chosen = jax.nn.one_hot(targets, logits.shape[-1])
    return (jax.nn.logsumexp(logits, axis=-1) - (logits * chosen).sum(axis=-1)).mean()


def test_sharded_steps_equal_single_device():
    """fsdp=2, expert=2, tensor=2 against one device: losses, loads, weights, biases."""
    (one, ones), (many, manys) = (run(mesh, steps=3) for mesh in MESHES)
    for a, b in zip(ones, manys):
        np.testing.assert_array_equal(a.load_LE, b.load_LE)
        np.testing.assert_allclose(a.loss, b.loss, atol=1e-5)
        np.testing.assert_allclose(a.mtp_loss, b.mtp_loss, atol=1e-5)
        np.testing.assert_allclose(a.entropy_L, b.entropy_L, atol=1e-5)
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
    same(one, many)


def same(one, other, *, tolerance=1e-5, step=3e-3):
    """Adam divides a gradient by its own size: where it is rounding noise, so is the
    step. All but a few weights in a million agree; none is a step apart."""
    for path, bias in one.biases.items():
        np.testing.assert_array_equal(bias, other.biases[path])
    for path, weight in one.params.items():
        difference = np.abs(np.asarray(weight) - np.asarray(other.params[path]))
        assert difference.max() < step, path
        assert np.quantile(difference, 0.999) < tolerance, path


def test_everything_rests_where_its_weight_does():
    """And an abstract model's state says so without memory."""
    model, fresh, _ = compiled("many")
    before = fresh()
    abstract = Transformer.abstract(CONFIG, mesh=model.mesh)
    state, _ = run("many", steps=1)
    trees = (state, before, init_state(abstract, AdamW(), ema=EMA))
    for new, old, planned in zip(*map(jax.tree.leaves, trees), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
        assert planned.sharding.is_equivalent_to(old.sharding, new.ndim)
        assert (new.shape, new.dtype) == (planned.shape, planned.dtype)
    for moments in (state.moments[1].mu, state.moments[1].nu, state.ema):
        for path, weight in state.params.items():
            assert moments[path].sharding == weight.sharding, path
    for path, variable in flat(model).items():
        new = (state.params | state.biases)[path]
        assert new.sharding.is_equivalent_to(variable[...].sharding, new.ndim), path


def test_biases_move_by_the_load_of_the_whole_batch():
    """gamma * sign(mean - load) exactly, also when it came in microbatches; no moments,
    no decay."""
    in_four = batch(microbatches=4, segments=SEGMENTS)
    # The first is compiled for other tests, too; the other one is for one device.
    for mesh, rows in (("many", batch()), ("one", in_four)):
        _, fresh, step = compiled(mesh)
        state, metrics = step(fresh(), rows, RATES)
        stacked, mtp = (np.asarray(state.biases[path]) for path in BIASES)
        load_LE = np.asarray(metrics.load_LE)
        assert (load_LE.sum(axis=-1) == TOKENS[:, :-1].size * 4).all()
        expected = np.float32(0.01) * np.sign(
            load_LE.mean(axis=-1, keepdims=True) - load_LE
        )
        assert len(np.unique(expected)) > 1
        np.testing.assert_allclose(np.concatenate([stacked, mtp[None]]), expected)
    assert not any("bias" in path for path in state.params)
    assert not any("bias" in path for path in state.moments[1].mu)
    np.testing.assert_allclose(
        metrics.max_violation_L, load_LE.max(axis=1) / load_LE.mean(axis=1) - 1
    )


def test_gradient_is_that_of_the_whole_objective():
    """loss + lambda * mtp + alpha * balance, written out; none reaches a router bias."""
    _, (metrics,) = run(steps=1)
    model = compiled()[0]
    graph, weights = nnx.split(model)
    inputs, targets = TOKENS[:, :-1], jnp.asarray(TOKENS[:, 1:])

    def objective(weights):
        model = nnx.merge(graph, weights)
        output = model.forward(inputs)
        total = plain_loss(model.logits(output.hidden_BTD), targets)
        further_BTD, last = model.predict_further(output.hidden_BTD, targets)
        # equation 24: the T - 1 targets' sum over T
        two_on = plain_loss(model.head(further_BTD)[:, :-1], targets[:, 1:])
        total += 0.3 * two_on * (LENGTH - 1) / LENGTH
        stacked = output.routing[1]
        total += 0.05 * balance.sequence_loss(stacked.load_BE, stacked.probability_BE)
        return total + 0.05 * balance.sequence_loss(
            last.load_BE[None], last.probability_BE[None]
        )

    with jax.set_mesh(model.mesh):
        gradients = jax.jit(jax.grad(objective))(weights)
    gradients = jax.device_get(gradients)
    squares = [float((leaf**2).sum()) for leaf in jax.tree.leaves(gradients)]
    np.testing.assert_allclose(metrics.gradient_norm, np.sqrt(sum(squares)), rtol=1e-5)
    for path, gradient in flat(nnx.merge(graph, gradients)).items():
        assert np.any(gradient.get_value() != 0) == (path not in BIASES), path


# --- microbatches


@pytest.mark.parametrize(
    ("mesh", "config", "objective"),
    [
        pytest.param("many", CONFIG, OBJECTIVE, id="moe", marks=pytest.mark.slow),
        pytest.param("one", DENSE, Objective(), id="dense"),
    ],
)
def test_microbatches_add_up_to_one_batch(mesh, config, objective):
    """4 microbatches of 2 sequences against 1 of 8, documents of uneven number apart:
    every target weighs the same. Two steps, so that the first one's update shows."""
    _, fresh, step = compiled(mesh, config=config, objective=objective)
    results = []
    for microbatches in (1, 4):
        state, history = fresh(), []
        for _ in range(2):
            rows = batch(microbatches=microbatches, segments=SEGMENTS)
            state, metrics = step(state, rows, RATES)
            history.append(jax.device_get(metrics))
        results.append((state, history))
    (one, ones), (four, fours) = results
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    for a, b in zip(ones, fours):
        jax.tree.map(close, a, b)
    same(one, four)


def test_a_single_microbatch_has_no_loop_of_its_own():
    _, fresh, step = compiled(config=DENSE, objective=Objective())
    state = fresh()
    two, one = (
        step.lower(state, batch(microbatches=n), RATES).as_text() for n in (2, 1)
    )
    assert two.count("stablehlo.while") == 1 + one.count("stablehlo.while")


# --- balance losses, dropping


WITHOUT_MTP = replace(CONFIG, mtp=False)


def filled(config):
    """Of random weights that nothing has to be compiled for."""
    return fill(Transformer.abstract(config), std=config.init_std)


@functools.partial(jax.jit, static_argnames=("graph", "objective"))
def terms(graph, weights, rows, key, *, objective):
    """The terms of all microbatches [A, B, S], one after the other."""
    model, parts = nnx.merge(graph, weights), shares(rows)
    each = [{k: v[a] for k, v in rows.items()} for a in range(len(rows["tokens"]))]
    found = [
        losses(model, one, objective=objective, shares=parts, key=key) for one in each
    ]
    return jax.tree.map(lambda *parts: sum(parts), *found)


def test_balance_terms_are_those_of_balance_py():
    """V2's three, per sequence; DeepSeekMoE's two, each over its microbatch."""
    model = filled(WITHOUT_MTP)
    graph, weights = nnx.split(model)
    moe = CONFIG.segments[1].feed_forward
    devices = moe.groups.count

    @jax.jit
    def by_hand(weights, tokens, wise):
        routing = nnx.merge(graph, weights).forward(tokens).routing[1]
        sent = balance.sent(
            routing.indices_BTk, experts=moe.num_experts, devices=devices
        )
        figures = routing.load_BE, routing.probability_BE, sent
        over_batch = [balance.batch_wise(figure) for figure in figures]
        load, probability, sent = (
            jnp.where(wise, figure, mean) for figure, mean in zip(figures, over_batch)
        )
        limit = balance.device_limit(moe, devices=devices)
        return jnp.stack(
            [
                balance.sequence_loss(load, probability),
                balance.device_loss(load, probability, devices=devices),
                balance.communication_loss(sent, probability, limit=limit),
            ]
        )

    both = {"device_balance": 0.5, "communication_balance": 0.7, "devices": devices}
    rows = batch(microbatches=2)
    with jax.set_mesh(model.mesh):
        for objective, wise in (
            (Objective(sequence_balance=0.3, **both), True),
            (Objective(expert_balance=0.3, **both), False),
        ):
            found = terms(graph, weights, rows, None, objective=objective)
            expected = np.mean(
                [by_hand(weights, tokens[:, :-1], wise) for tokens in rows["tokens"]],
                axis=0,
            )
            np.testing.assert_allclose(
                found.balance_loss, expected @ [0.3, 0.5, 0.7], rtol=1e-5
            )


def test_the_sequences_spared_from_dropping_change_from_step_to_step():
    """Drawn from the run's key and the step."""
    model = filled(WITHOUT_MTP)
    graph, weights = nnx.split(model)
    state = init_state(model, AdamW(), seed=5)
    dropping = Dropping(devices=2, capacity=0.5, protected=0.5)

    def loss(number, dropping=dropping):
        with jax.set_mesh(model.mesh):
            key = replace(state, step=jnp.int32(number)).key()
            objective = Objective(dropping=dropping)
            return float(terms(graph, weights, batch(), key, objective=objective).loss)

    assert loss(0) == loss(0)
    assert len({loss(number) for number in range(5)}) > 1
    assert loss(0) != loss(0, None)


# --- non-finite steps, the average, the options


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    """One infinite weight, and then the same run goes on."""
    _, fresh, step = compiled()
    good, _ = step(fresh(), batch(), RATES)
    path = "segments.0.attention.o_DNH"
    weight, place = np.array(good.params[path]), good.params[path].sharding
    infinite = weight.copy()
    infinite.flat[0] = np.inf

    def holding(state, weight):
        """Placed as the weight rests: elsewhere the step would be compiled again."""
        return replace(
            state, params={**state.params, path: jax.device_put(weight, place)}
        )

    bad = holding(good, infinite)
    before = jax.device_get(bad)
    after, metrics = step(bad, batch(), RATES)
    assert bool(metrics.skipped) and not np.isfinite(metrics.gradient_norm)
    assert int(after.step) == before.step + 1
    jax.tree.map(
        np.testing.assert_array_equal, replace(after, step=before.step), before
    )
    final, metrics = step(holding(after, weight), batch(), RATES)
    assert not metrics.skipped and np.isfinite(metrics.loss)
    assert int(final.moments[1].count) == 2, "Adam counts the updates that were made"


def test_the_average_of_the_parameters():
    """decay * average + (1 - decay) * new parameters, from the first ones on; off, there
    is none."""
    model, fresh, step = compiled()
    state = fresh()
    expected = {path: np.float64(weight) for path, weight in state.params.items()}
    for _ in range(3):
        state, _ = step(state, batch(), RATES)
        for path, weight in state.params.items():
            expected[path] = EMA * expected[path] + (1 - EMA) * np.float64(weight)
    for path, mean in state.ema.items():
        np.testing.assert_allclose(mean, expected[path], rtol=1e-5, atol=1e-7)
    other = Transformer.abstract(CONFIG, mesh=model.mesh)
    write_back(other, state, average=True)
    for path, variable in flat(other).items():
        np.testing.assert_array_equal(
            variable[...], (state.ema | state.biases)[path], path
        )
    assert init_state(model, AdamW()).ema == {}


def test_bfloat16_compute_and_parameters():
    """bfloat16 weights, moments and arithmetic train too, their sums in float32."""
    model = Transformer.create(DENSE, seed=0, precision=Precision(params=jnp.bfloat16))
    optimizer = AdamW(moments=jnp.bfloat16)
    step = make_step(model, optimizer=optimizer, objective=Objective(), ema=0.9)
    state, history = init_state(model, optimizer, ema=0.9), []
    for _ in range(10):
        state, metrics = step(state, batch(microbatches=2), RATES)
        history.append(float(metrics.loss))
    assert history[-1] < history[0] - 1
    kinds = {leaf.dtype.name for leaf in state.params.values()}
    assert kinds == {"bfloat16"} == {m.dtype.name for m in state.moments[1].nu.values()}
    assert {leaf.dtype.name for leaf in state.ema.values()} == {"float32"}


def test_rates_are_inputs():
    """Schedules are read in float64; a new value compiles nothing, a learning rate of 0
    moves nothing."""
    late = rates(1e-3, OBJECTIVE, replace(START, tokens=1000))
    assert (late.learning_rate, late.mtp) == (np.float32(1e-3), np.float32(0.1))
    _, fresh, step = compiled()
    still = Rates(
        learning_rate=np.float32(0), mtp=np.float32(0.5), bias_speed=np.float32(0)
    )
    step(fresh(), batch(), RATES)
    entries = step.compiled._cache_size()
    state, _ = step(fresh(), batch(), still)
    assert step.compiled._cache_size() == entries
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.biases),
        (fresh().params, fresh().biases),
    )


def test_segments_keep_documents_apart():
    """Two documents in a window cost what each costs alone; the border does not count."""
    model = filled(CONFIG)
    graph, weights = nnx.split(model)
    half = LENGTH // 2 + 1
    segments = np.zeros_like(TOKENS)
    segments[:, half:] = 1

    def cost(rows):
        objective = Objective(mtp=1.0)
        with jax.set_mesh(model.mesh):
            found = terms(graph, weights, batch(**rows), None, objective=objective)
        return found.loss, found.mtp_loss

    together = cost({"rows": TOKENS, "segments": segments})
    parts = [TOKENS[:, :half], TOKENS[:, half:]]
    alone = [cost({"rows": part}) for part in parts]
    counts = [part.shape[1] - 1 for part in parts]
    expected = np.average(alone, axis=0, weights=counts)
    np.testing.assert_allclose(together, expected, rtol=1e-5)


def test_a_dense_model_trains_too():
    _, history = run(config=DENSE, objective=Objective(), steps=5)
    assert history[-1].loss < history[0].loss
    assert history[0].load_LE.size == 0 and history[0].mtp_loss == 0
    assert history[0].entropy_L.size == 0


@pytest.mark.parametrize(
    ("config", "objective", "message"),
    [
        (DENSE, Objective(mtp=0.3), "mtp=0.3: .* no multi-token"),
        (DENSE, Objective(bias_speed=0.1), "bias_speed=0.1: .* no selection bias"),
        (DENSE, Objective(device_balance=0.1), "device_balance=0.1: .* no routed"),
        (CONFIG, Objective(device_balance=0.1, devices=7), "7 devices must divide"),
    ],
)
def test_terms_that_the_model_has_nothing_for_are_refused(config, objective, message):
    model = Transformer.abstract(config)
    with pytest.raises(UserError, match=message):
        make_step(model, optimizer=AdamW(), objective=objective)


def test_the_objective_says_how_many_tokens_have_logits_at_once(monkeypatch):
    """Of the next token, and of the one after it."""
    model, microbatch = Transformer.abstract(CONFIG), {"tokens": jnp.asarray(TOKENS)}
    real, chunks = loss.cross_entropy, []

    def recorded(*arrays, **options):
        chunks.append(options["chunk"])
        return real(*arrays, **options)

    monkeypatch.setattr(loss, "cross_entropy", recorded)
    with jax.set_mesh(model.mesh):
        for chunk in (None, 32):
            objective = replace(OBJECTIVE, chunk=chunk)
            options = {"objective": objective, "shares": shares(batch())}
            jax.eval_shape(functools.partial(losses, **options), model, microbatch)
    assert chunks == [None, None, 32, 32]


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="expert_balance=-1"):
        Objective(expert_balance=-1)
    with pytest.raises(UserError, match="chunk=-1 must not be negative"):
        Objective(chunk=-1)
    with pytest.raises(UserError, match="chunk=0 tokens have no logits"):
        Objective(chunk=0)
    with pytest.raises(UserError, match=r"ema=1.0"):
        init_state(Transformer.abstract(DENSE), AdamW(), ema=1.0)
