"""A batch in groups of rows is the batch at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.nn import mla
from dsjax.nn.groups import groups
from dsjax.nn.transformer import Transformer
from dsjax.sharding import make_mesh
from tests.support import fill, random_tokens

# Its dense layers alone: experts are not in groups, but most of what is compiled.
CONFIG = models.tiny_v3()
CONFIG = replace(CONFIG, segments=CONFIG.segments[:1], mtp=False)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "expert": 2, "tensor": 2}], ids=str)
def test_attention_in_groups(monkeypatch, sizes):
    """Logits and gradients, documents in the batch; each row alone on its device."""
    model = Transformer.abstract(CONFIG, mesh=make_mesh(**sizes))
    fill(model, std=0.125)
    tokens = jnp.asarray(random_tokens(model, rows=8))
    segments = jnp.asarray(np.arange(24) // np.arange(3, 11)[:, None])
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest)
        hidden = model.forward(tokens, segments_BT=segments).hidden_BTD
        return jnp.square(model.logits(hidden)).mean()

    found = []
    for at_once in (mla.EXPANDED_BYTES, 1):
        monkeypatch.setattr(mla, "EXPANDED_BYTES", at_once)
        with jax.set_mesh(model.mesh):
            jax.clear_caches()
            traced = jax.jit(jax.value_and_grad(loss)).trace(params)
            value, grads = traced.lower().compile()(params)
        loops = str(traced.jaxpr).count("scan[")
        found.append((loops, float(value), nnx.to_pure_dict(grads)))
    (fewer, *once), (more, *grouped) = found
    assert more > fewer
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(once[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale, rtol=1e-6),
        once,
        grouped,
    )


def test_the_fewest_groups_that_fit(mesh):
    x = jnp.zeros((12, 10, 3))
    for at_once, number in [(10**6, 1), (600, 2), (599, 3), (100, 12), (1, 12)]:
        assert groups(x, 10, at_once=at_once) == number
