"""The dense feed-forward where weights rest whole on GPUs is what it is elsewhere."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.nn import feed_forward
from dsjax.nn.transformer import Transformer
from dsjax.sharding import Sharding, make_mesh, with_whole_dense
from tests.support import fill, random_tokens

CONFIG = models.tiny_v3()  # a dense layer, and shared experts behind it
CONFIG = replace(
    CONFIG,
    mtp=False,
    segments=tuple(replace(part, count=1) for part in CONFIG.segments[:2]),
)
WHOLE = with_whole_dense(Sharding())


@pytest.fixture
def calls(monkeypatch):
    """One for each feed-forward that each device has computed of its own rows."""
    calls, of_own_rows = [], feed_forward._of_own_rows

    def counted(*arrays, **options):
        calls.append(arrays)
        return of_own_rows(*arrays, **options)

    monkeypatch.setattr(feed_forward, "_of_own_rows", counted)
    return calls


def prepared(sharding, mesh):
    """A model, its parameters, and a loss of them."""
    model = Transformer.abstract(CONFIG, mesh=make_mesh(**mesh), sharding=sharding)
    fill(model, std=0.125)
    tokens = jnp.asarray(random_tokens(model, rows=8))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest)
        return jnp.square(model.logits(model.forward(tokens).hidden_BTD)).mean()

    return model, params, loss


@pytest.mark.parametrize(
    ("sharding", "mesh"),
    [(Sharding(), {}), (WHOLE, {"data": 2, "expert": 2})],
    ids=["one device", "four devices"],
)
def test_of_own_rows_on_gpus_with_whole_weights(monkeypatch, calls, sharding, mesh):
    """Loss and gradients are those of the sum over all devices' rows."""
    model, params, loss = prepared(sharding, mesh)
    found = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(feed_forward, "platform", lambda p=platform: p)
        with jax.set_mesh(model.mesh):
            jax.clear_caches()
            value, grads = jax.jit(jax.value_and_grad(loss))(params)
        found.append((float(value), nnx.to_pure_dict(grads)))
        assert bool(calls) == (platform == "gpu")
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found[0][1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale, rtol=1e-6),
        *found,
    )


@pytest.mark.parametrize(
    ("sharding", "mesh"),
    [(Sharding(), {"data": 2, "expert": 2}), (WHOLE, {"data": 2, "tensor": 2})],
    ids=["gathered", "cut"],
)
def test_weights_that_are_cut_are_left_to_the_compiler(
    monkeypatch, calls, sharding, mesh
):
    model, params, loss = prepared(sharding, mesh)
    monkeypatch.setattr(feed_forward, "platform", lambda: "gpu")
    with jax.set_mesh(model.mesh):
        jax.eval_shape(loss, params)
    assert not calls
