"""The layout for decoding: weights stay cut, tokens come to them."""

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.nn.cache import empty_cache
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import SERVING, make_mesh
from tests.support import fill, random_model, random_tokens


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # The slow ones: `tests/test_meshes.py` has such meshes of another small MoE.
        pytest.param("tiny_v3", {"expert": 8}, marks=pytest.mark.slow),
        ("tiny_v3", {"data": 2, "expert": 4}),
        pytest.param(
            "tiny_v2_lite",
            {"fsdp": 2, "expert": 2, "tensor": 2},
            marks=pytest.mark.slow,
        ),
        ("tiny_moe_16b", {"expert": 4, "tensor": 2}),
        ("tiny_llm_67b", {"data": 2, "expert": 4}),
    ],
    ids=str,
)
def test_decoding_equals_the_full_forward_pass(name, sizes):
    """Prompts of unequal length in one batch, then eight tokens, one at a time."""
    one = random_model(name)
    abstract = Transformer.abstract(
        one.config, mesh=make_mesh(**sizes), sharding=SERVING
    )
    model = fill(abstract, std=0.125)
    tokens = random_tokens(model, rows=8)
    full = np.asarray(one(tokens))
    lengths = np.array([16, 9, 3, 12, 1, 16, 7, 8], np.int32)
    graph, state = nnx.split(model)

    @jax.jit
    def prefill(state, tokens, lengths, cache):
        model = nnx.merge(graph, state)
        out = model.prefill(tokens, lengths, cache)
        return model.logits(out.hidden_BTD), out.cache

    @jax.jit
    def decode(state, tokens, cache):
        model = nnx.merge(graph, state)
        out = model.decode(tokens, cache)
        return model.logits(out.hidden_BTD), out.cache

    with jax.set_mesh(model.mesh):
        cache = empty_cache(
            model.config, batch=8, slots=24, dtype="float32", mesh=model.mesh
        )
        logits, cache = prefill(state, tokens[:, :16], lengths, cache)
        for row, length in enumerate(lengths):
            got = np.asarray(logits)[row, :length]
            np.testing.assert_allclose(got, full[row, :length], atol=2e-5)
        for step in range(8):
            place = lengths + step
            given = tokens[np.arange(8), place][:, None]
            logits, cache = decode(state, given, cache)
            got = np.asarray(logits)[:, 0]
            np.testing.assert_allclose(got, full[np.arange(8), place], atol=2e-5)


def test_no_weight_of_v3_is_on_all_devices():
    """But norms, router and the like: a v6e has room for an even share and no more."""
    mesh = make_mesh(expert=8)
    model = Transformer.abstract(models.v3(), mesh=mesh, sharding=SERVING)
    for path, leaf in flat(model).items():
        held = np.prod(leaf.get_value().sharding.shard_shape(leaf.shape))
        if leaf.size > 2**24 and ".router." not in path and ".merge" not in path:
            assert held == leaf.size / 8, path
