"""ZeRO-1: the same run from a state that is cut along `data`, gathered once a step."""

import functools
import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax import models
from dsjax.nn.options import Precision
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import Sharding, make_mesh, with_whole_dense
from dsjax.train.build import _options, sharding_of
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.schedule import Progress
from dsjax.train.step import init_state, make_step, rates, write_back
from dsjax.train.zero import gathered, spread
from tests.support import fill
from tests.train import tiny

CONFIG = models.shrink(models.v3(), vocab_size=128, width=16)
CONFIG = replace(CONFIG, segments=CONFIG.segments[1:], mtp=False)
OBJECTIVE = Objective(sequence_balance=0.05, bias_speed=0.01)
START = Progress(step=0, tokens=0, total_tokens=2000)
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 8, 17)).astype(np.int32)
ZERO1 = Sharding(state=("data",))
EMA, STEPS = 0.75, 3
CASES = {
    "whole": (Sharding(), {"data": 8}),
    "data": (ZERO1, {"data": 8}),
    "experts": (ZERO1, {"data": 4, "expert": 2}),
}


@functools.cache
def run(case):
    """(model, compiled step, last state, metrics) of steps of two microbatches."""
    sharding, sizes = CASES[case]
    mesh = make_mesh(**sizes)
    model = Transformer.abstract(CONFIG, mesh=mesh, sharding=sharding)
    fill(model, std=CONFIG.init_std)
    state = init_state(model, AdamW(), ema=EMA)
    step = make_step(model, optimizer=AdamW(), objective=OBJECTIVE, ema=EMA)
    arguments = {"tokens": TOKENS}, rates(3e-3, OBJECTIVE, START)
    compiled = step.lower(state, *arguments).compile()
    history = []
    for _ in range(STEPS):
        state, metrics = compiled(state, *arguments)
        history.append(jax.device_get(metrics))
    return model, compiled, state, history


CUT = [pytest.param("data", marks=pytest.mark.slow), "experts"]


@pytest.mark.parametrize("case", CUT)
def test_same_losses_and_weights(case):
    """But for a few weights whose gradients are rounding noise, which Adam divides by
    its own size."""
    (_, _, one, ones), (_, _, other, others) = run("whole"), run(case)
    for a, b in zip(ones, others, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, atol=1e-5)
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
        np.testing.assert_array_equal(a.load_LE, b.load_LE)
    for name in ("params", "ema"):
        ours, theirs = getattr(one, name), getattr(other, name)
        for path in ours:
            difference = np.abs(np.asarray(ours[path]) - np.asarray(theirs[path]))
            assert difference.max() < 3e-3, path
            assert np.quantile(difference, 0.999) < 1e-5, path


@pytest.mark.parametrize("case", CUT)
def test_a_device_holds_an_eighth(case):
    """Of parameters, moments and average; before and after steps, and as planned."""
    model, _, after, _ = run(case)
    abstract = Transformer.abstract(CONFIG, mesh=model.mesh, sharding=ZERO1)
    for state in (after, init_state(abstract, AdamW(), ema=EMA)):
        adam = state.moments[1]
        for tree in (state.params, adam.mu, adam.nu, state.ema):
            for path, leaf in tree.items():
                held = np.prod(leaf.sharding.shard_shape(leaf.shape))
                whole_along_expert = case == "experts" and path.endswith("scale")
                assert (4 if whole_along_expert else 8) * held == leaf.size, path


def test_each_weight_is_gathered_once():
    """Before the loop over microbatches; no weight is gathered in it."""
    _, compiled, state, _ = run("data")
    *loops, entry = re.split(r"^ENTRY ", compiled.as_text(), flags=re.M)
    # But along axes of one device, which the program has and a device does nothing for.
    # Written as groups of one or as an axis of a mesh, by JAX's version.
    alone = r"groups=(?:\{\{0\},|mesh\[[^]]*'(?P<axis>\w+)'=1\b[^]]*\] \{'(?P=axis)'\})"
    gather = re.compile(rf" = \w+\[([\d,]*)\]\S* all-gather\((?!.*{alone})")

    def gathered(program: str) -> Counter:
        return Counter(match[1] for match in gather.finditer(program))

    found = gathered(entry)
    weights = [",".join(map(str, w.shape)) for w in state.params.values()]
    found.subtract(weights)
    assert {shape: n for shape, n in found.items() if n} == {}
    assert not gathered("".join(loops)).keys() & {*weights}


def test_weights_return_to_the_model():
    model, _, state, _ = run("data")
    write_back(model, state)
    for path, variable in flat(model).items():
        weight = variable.get_value()
        assert weight.sharding.is_fully_replicated, path
        expected = (state.params | state.biases)[path]
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(expected))


def test_gathered_in_the_dtype_of_use():
    """Matrices in bfloat16; what is computed in float32 as it rests."""
    model = Transformer.abstract(
        CONFIG, mesh=make_mesh(data=8), sharding=ZERO1, precision=Precision()
    )
    state = init_state(model, AdamW())
    with jax.set_mesh(model.mesh):
        used = jax.eval_shape(lambda params: gathered(params, model), state.params)
    wide = {path.split(".")[-1] for path in used if used[path].dtype == jnp.float32}
    assert wide == {"scale", "weight_ED", "embedding_VD", "head_VD"}
    assert {leaf.dtype for leaf in used.values()} == {
        jnp.dtype("float32"),
        jnp.dtype("bfloat16"),
    }


def test_spread():
    """Into the largest part that divides; behind the axes that are there."""
    mesh = make_mesh(data=4, expert=2)
    one = ("data",)
    assert spread(P(None, "expert"), (8, 32), mesh, one) == P(None, ("expert", "data"))
    assert spread(P(None, "expert"), (16, 16), mesh, one) == P("data", "expert")
    assert spread(P(), (3, 8), mesh, one) == P(None, "data")
    assert spread(P(), (3, 6), mesh, one) == P(None, None)


def test_an_experiment_asks_for_it():
    experiment = replace(tiny.run(), zero1=True)
    mesh = make_mesh(data=2)
    assert _options(experiment, mesh)["sharding"] == ZERO1
    assert _options(tiny.run(), mesh)["sharding"] == Sharding()


def test_an_experiment_asks_for_whole_dense_weights():
    experiment = replace(tiny.run(), whole_dense=True)
    sharding = sharding_of(experiment)
    assert sharding == with_whole_dense(Sharding()) != Sharding()
    assert sharding.storage == ("fsdp",) and sharding.in_FD == P("tensor", "fsdp")
