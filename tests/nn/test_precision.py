"""Each dtype of a model's arithmetic does what it says, and alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsjax import models
from dsjax.config import Moe
from dsjax.nn.cache import Context
from dsjax.nn.norm import RmsNorm
from dsjax.nn.options import FLOAT32, Build, Precision
from dsjax.nn.router import Router
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import RouterBias, flat, use
from dsjax.sharding import Sharding
from dsjax.train.objective import head_loss
from tests.support import fill

BF16 = Precision()  # the papers': bfloat16 compute, the rest float32
CONFIG = models.shrink(models.v3(), vocab_size=128, width=16)


def build(precision):
    return Build(std=0.2, sharding=Sharding(), precision=precision, rngs=nnx.Rngs(0))


def test_equal_precisions_are_one():
    """However they are written, so that nothing compiles twice."""
    assert Precision(compute="bfloat16") == BF16
    assert hash(Precision(compute=jnp.dtype("bfloat16"))) == hash(BF16)


def test_router_is_float32_from_float32_weights(mesh, rng):
    """Activations in bfloat16, weights too fine for it: the exact affinities."""
    x = jnp.asarray(rng.standard_normal((2, 40, 32)), jnp.bfloat16)
    context = Context(positions_BT=jnp.zeros((2, 40), jnp.int32))
    moe = Moe(num_experts=16, num_shared=0, top_k=4, width=8)

    def error(precision):
        router = Router(moe, 32, build=build(precision))
        weight = np.asarray(router.weight_ED[...], np.float64)
        logits = np.asarray(x, np.float64) @ weight.T
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        best = -np.sort(-scores, axis=-1)[..., :4]
        return np.abs(router(x, context).weights_BTk / best - 1).max()

    assert error(BF16) < 1e-5
    assert error(replace(BF16, router=jnp.bfloat16)) > 1e-3


def test_norm_statistics(mesh, rng):
    x = jnp.asarray(3 + rng.standard_normal((4, 512)), jnp.float32)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)

    def error(precision):
        normed = RmsNorm(512, build=build(precision))(x)
        assert normed.dtype == x.dtype
        return np.abs(np.asarray(normed, np.float64) / exact - 1).mean()

    assert error(BF16) < 1e-6
    assert error(replace(BF16, statistics=jnp.bfloat16)) > 5e-4


def test_logits_of_losses(mesh, rng):
    """Losses of 40 positions, each rounding its own way; log-sum-exps stay float32."""
    normed = jnp.asarray(20 * rng.standard_normal((1, 40, 64)), jnp.float32)
    targets, weights = jnp.full((1, 40), 3), jnp.asarray(rng.random((1, 40)))

    def loss(**options):
        precision = replace(FLOAT32, **options)
        model = fill(Transformer.abstract(CONFIG, precision=precision), std=0.05)
        return head_loss(model, normed, targets, weights)

    exact = loss()
    assert 1e-7 < abs(loss(logits=jnp.float16) / exact - 1) < 1e-3
    assert 1e-5 < abs(loss(logits=jnp.bfloat16) / exact - 1) < 1e-2


def test_weights_rest_in_params_and_router_bias_in_float32():
    model = Transformer.abstract(CONFIG, precision=replace(BF16, params=jnp.float16))
    for variable in flat(model).values():
        bias = isinstance(variable, RouterBias)
        assert variable.dtype == (jnp.float32 if bias else jnp.float16)


def test_activations_are_computed_in_compute():
    model = Transformer.abstract(CONFIG, precision=BF16)
    graph, state = nnx.split(model)
    with jax.set_mesh(model.mesh):
        hidden = jax.eval_shape(
            lambda state, tokens: nnx.merge(graph, state).forward(tokens).hidden_BTD,
            state,
            jax.ShapeDtypeStruct((2, 8), jnp.int32),
        )
    assert hidden.dtype == jnp.bfloat16


def test_a_frequent_tokens_gradient_adds_up_in_float32(rng):
    """4096 positions of one token: in bfloat16 the sum would stop growing early."""
    model = fill(Transformer.abstract(CONFIG, precision=BF16), std=0.05)
    graph, state = nnx.split(model)
    weigh = jnp.asarray(1 + rng.random((1, 4096, 64)), jnp.bfloat16)
    tokens = jnp.full((1, 4096), 7)

    @jax.jit
    @jax.grad
    def gradient(state):
        return (nnx.merge(graph, state).embed(tokens) * weigh).sum(dtype=jnp.float32)

    with jax.set_mesh(model.mesh):
        found = gradient(state)["embedding_VD"][...][7]
    expected = np.asarray(weigh, np.float64).sum(axis=(0, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def primitives(function, *arguments):
    """The names of what a function is made of, in order."""
    equations = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    return [equation.primitive.name for equation in equations]


@pytest.mark.parametrize("looped", [True, False])
def test_no_slice_is_cast_without_a_barrier(mesh, looped):
    """XLA for TPUs casts the stacked layers as a whole, before the loop over them, if
    nothing stands between a layer's slice and its cast. Elsewhere a barrier is a copy.
    """
    weight = replace(build(FLOAT32), looped=looped).weight((8, 8), P())
    cast = primitives(lambda: use(weight, jnp.bfloat16))
    barrier = ["optimization_barrier"] if looped else []
    assert cast == [*barrier, "convert_element_type"]
    assert primitives(lambda: use(weight, jnp.float32)) == []


@pytest.mark.parametrize(("unroll", "looped"), [(1, True), (2, False)])
def test_weights_of_a_loop_know_it(unroll, looped):
    assert {segment.count for segment in CONFIG.segments} == {2}
    weights = flat(Transformer.abstract(CONFIG, unroll=unroll))
    found = {path: weight.get_metadata("looped") for path, weight in weights.items()}
    assert not found["embedding_VD"]
    assert {found[path] for path in found if path.startswith("segments.")} == {looped}


def test_a_plain_model_is_float32_throughout():
    """What parity is measured on."""
    model = Transformer.abstract(CONFIG)
    assert model.precision == FLOAT32
    graph, state = nnx.split(model)

    def forward(state, tokens):
        return nnx.merge(graph, state).forward(tokens).hidden_BTD

    with jax.set_mesh(model.mesh):
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        text = jax.jit(forward).lower(state, tokens).as_text()
    assert "bf16" not in text and "f16" not in text and "f64" not in text
