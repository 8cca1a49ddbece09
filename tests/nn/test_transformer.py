"""Properties of the whole model: causality, sharding, cached decoding, segments."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.config import Gqa, Mla, Moe
from dsjax.nn.cache import empty_cache
from dsjax.nn.options import Precision
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import RouterBias, flat
from dsjax.sharding import make_mesh
from tests.support import random_model, random_tokens

KINDS = ["tiny_llm_67b", "tiny_r1_distill_qwen_7b", "tiny_moe_16b", "tiny_v2_lite"]
KINDS += ["tiny_v2", "tiny_v3"]


@pytest.mark.parametrize("name", KINDS)
def test_causality(name):
    model = random_model(name)
    tokens = random_tokens(model)  # of the one shape that other tests compile, too
    changed = tokens.copy()
    changed[:, 13] += 1
    before, after = np.asarray(model(tokens)), np.asarray(model(changed % 512))
    np.testing.assert_allclose(before[:, :13], after[:, :13], atol=1e-5)
    assert np.abs(before[:, 13:] - after[:, 13:]).max() > 0.1
    assert 0.3 < before.std() < 3


MESHES = [
    ("tiny_v3", {"fsdp": 2, "expert": 4}),
    # The slow ones: gradients are compared below, decoding in `test_serving.py`.
    pytest.param(
        "tiny_v3", {"data": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow
    ),
    ("tiny_v2", {"fsdp": 2, "expert": 2, "tensor": 2}),
    pytest.param(
        "tiny_moe_16b", {"data": 2, "fsdp": 2, "expert": 2}, marks=pytest.mark.slow
    ),
    ("tiny_r1_distill_qwen_7b", {"data": 2, "fsdp": 2, "tensor": 2}),
]


@pytest.mark.parametrize(("name", "sizes"), MESHES, ids=str)
def test_sharded_equals_unsharded(name, sizes):
    one, many = random_model(name), random_model(name, **sizes)
    tokens = random_tokens(one)
    logits = np.asarray(one(tokens))
    np.testing.assert_allclose(np.asarray(many(tokens)), logits, atol=2e-5)
    odd = np.asarray(many(tokens[:3]))  # a batch that the mesh does not divide
    np.testing.assert_allclose(odd, logits[:3], atol=2e-5)


@pytest.mark.parametrize(
    "name", ["tiny_v3", pytest.param("tiny_moe_16b", marks=pytest.mark.slow)]
)
def test_sharded_gradients_equal_unsharded(name):
    def gradients(**sizes):
        model = random_model(name, **sizes)
        tokens = jnp.asarray(random_tokens(model))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            model = nnx.merge(graph, params, rest)
            logits = model.logits(model.forward(tokens).hidden_BTD)
            return jnp.square(logits).mean()

        with jax.set_mesh(model.mesh):
            grads = jax.jit(jax.grad(loss))(params)
        return jax.tree.map(np.asarray, nnx.to_pure_dict(grads))

    one, many = gradients(), gradients(data=2, expert=2, tensor=2)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(one))
    assert scale > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), one, many
    )


@pytest.mark.parametrize(
    "name",
    [
        "tiny_v3",
        pytest.param("tiny_v2", marks=pytest.mark.slow),
        pytest.param("tiny_moe_16b", marks=pytest.mark.slow),
        "tiny_llm_67b",
    ],
)
def test_each_device_holds_an_eighth(name):
    model = Transformer.create(models.get(name), mesh=make_mesh(fsdp=2, expert=4))
    weights = {p: v[...] for p, v in flat(model).items() if not p.endswith("scale")}
    total = sum(array.nbytes for array in weights.values())
    for device in model.mesh.devices.flat:
        held = sum(
            shard.data.nbytes
            for array in weights.values()
            for shard in array.addressable_shards
            if shard.device == device
        )
        assert held <= total / 8


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, {}) for name in KINDS),
        # `tests/test_meshes.py` and `test_serving.py` decode on meshes.
        pytest.param("tiny_v3", {"expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_cached_decode_equals_full_forward(name, sizes):
    """Prompts of unequal length in one batch, then eight tokens, one at a time."""
    model = random_model(name, **sizes)
    tokens = random_tokens(model)
    full = np.asarray(model(tokens))[:4]
    tokens = tokens[:4]
    lengths = np.array([16, 9, 3, 12], np.int32)
    graph, state = nnx.split(model)

    @jax.jit
    def prefill(state, tokens, lengths, cache):
        out = nnx.merge(graph, state).prefill(tokens, lengths, cache)
        return out.hidden_BTD, out.cache

    @jax.jit
    def step(state, tokens, cache):
        model = nnx.merge(graph, state)
        out = model.decode(tokens, cache)
        return model.logits(out.hidden_BTD), out.cache

    with jax.set_mesh(model.mesh):
        cache = empty_cache(
            model.config, batch=4, slots=32, dtype=jnp.float32, mesh=model.mesh
        )
        padded = np.where(np.arange(16) < lengths[:, None], tokens[:, :16], 0)
        _, cache = prefill(state, padded, lengths, cache)
        for offset in range(8):
            at = lengths + offset
            given = np.take_along_axis(tokens, at[:, None], axis=1)
            logits, cache = step(state, given, cache)
            expected = full[np.arange(4), at]
            # Logits reach 4: 5e-6 of them, which float32's sums in another order take.
            np.testing.assert_allclose(np.asarray(logits)[:, 0], expected, atol=2e-5)


def test_documents_do_not_mix():
    model = random_model("tiny_v3")
    tokens = random_tokens(model, rows=1)
    segments = np.concatenate([np.full((1, 12), 1), np.full((1, 12), 2)], axis=1)
    positions = np.concatenate([np.arange(12), np.arange(12)])[None]
    graph, state = nnx.split(model)

    @jax.jit
    def packed(state, tokens, segments, positions):
        model = nnx.merge(graph, state)
        out = model.forward(tokens, segments_BT=segments, positions_BT=positions)
        return model.logits(out.hidden_BTD)

    with jax.set_mesh(model.mesh):
        together = np.asarray(packed(state, tokens, segments, positions))
    apart = [np.asarray(model(tokens[:, part])) for part in (slice(12), slice(12, 24))]
    np.testing.assert_allclose(together, np.concatenate(apart, axis=1), atol=1e-5)


def test_layers_are_compiled_once():
    """61 layers compile to the same program as 4, but for the loop's bound."""

    def lines(layers):
        config = models.tiny_v3()
        segments = tuple(replace(s, count=layers) for s in config.segments)
        model = Transformer.abstract(replace(config, segments=segments))
        graph, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        with jax.set_mesh(model.mesh):
            lowered = jax.jit(
                lambda state, tokens: nnx.merge(graph, state).forward(tokens).hidden_BTD
            ).lower(state, tokens)
        return lowered.as_text().count("\n")

    assert lines(30) == lines(2)


def test_abstract_holds_no_memory():
    """V3 itself: 671 billion parameters of shapes and shardings."""
    model = Transformer.abstract(models.v3(), precision=Precision(params=jnp.bfloat16))
    variables = flat(model)
    assert all(
        isinstance(v.get_value(), jax.ShapeDtypeStruct) for v in variables.values()
    )
    assert variables["segments.1.feed_forward.experts.gate_EFD"].shape == (
        58,
        256,
        2048,
        7168,
    )


def test_router_bias_is_float32_and_no_param():
    model = Transformer.abstract(models.v3(), precision=Precision(params=jnp.bfloat16))
    bias = flat(model)["segments.1.feed_forward.router.bias_E"]
    assert isinstance(bias, RouterBias) and not isinstance(bias, nnx.Param)
    assert bias.dtype == jnp.float32


def test_every_kind_is_covered():
    configs = [models.get(name) for name in KINDS]
    assert {type(c.attention) for c in configs} == {Gqa, Mla}
    assert any(isinstance(c.segments[-1].feed_forward, Moe) for c in configs)
