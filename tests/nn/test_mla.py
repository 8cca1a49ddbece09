"""Latent attention: the absorbed form is the plain one, and the cache is small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.config import Mla, Rope, Yarn
from dsjax.nn.cache import Context, LatentCache, Phase, empty_cache
from dsjax.nn.mla import MultiHeadLatentAttention
from dsjax.nn.options import FLOAT32, Build
from dsjax.sharding import Sharding

D = 64


def attention(q_rank, scaling=None):
    config = Mla(
        num_heads=4,
        kv_rank=32,
        q_rank=q_rank,
        nope_dim=16,
        rope_dim=8,
        value_dim=24,  # unlike nope_dim: a swapped split would not fit
        rope=Rope(interleaved=True, scaling=scaling),
    )
    build = Build(std=0.2, sharding=Sharding(), precision=FLOAT32, rngs=nnx.Rngs(0))
    return MultiHeadLatentAttention(config, D, build=build)


@pytest.mark.parametrize("q_rank", [None, 48])
@pytest.mark.parametrize("scaling", [None, Yarn(factor=40, original_length=8)], ids=str)
def test_absorbed_equals_expanded(mesh, rng, q_rank, scaling):
    mla = attention(q_rank, scaling)
    x = jnp.asarray(rng.standard_normal((2, 20, D)), jnp.float32)
    context = Context(positions_BT=jnp.broadcast_to(jnp.arange(20), (2, 20)))
    q, latents = mla.queries(mla.query_latents(x)), mla.latents(x, context)
    expanded = mla.expanded(q, *latents, context)
    latent, rope = latents
    cache = LatentCache(latent_YBSL=latent[None], rope_YBRS=rope.swapaxes(1, 2)[None])
    absorbed = mla.absorbed(q, cache, 0, context)
    assert expanded.std() > 0.3
    np.testing.assert_allclose(absorbed, expanded, atol=1e-5)


def test_yarn_multiplies_the_softmax_scale():
    yarn = Yarn(factor=40, mscale=0.707, mscale_all_dim=0.707)
    plain, scaled = attention(None).scale, attention(None, yarn).scale
    assert plain == pytest.approx(24**-0.5)
    assert scaled / plain == pytest.approx(1.5896, abs=1e-4)  # V2's factor


@pytest.mark.parametrize(("name", "values"), [("v2", 34560), ("v3", 35136)])
def test_cache_holds_nothing_per_head(mesh, name, values):
    """Values a token over all layers, as the papers count them."""
    config = models.get(name)
    cache = empty_cache(config, batch=3, slots=8, dtype=jnp.bfloat16, mesh=mesh)
    size = sum(leaf.size for leaf in jax.tree.leaves(cache.segments))
    assert size == 3 * 8 * values


def test_slots_past_the_end_are_dropped(mesh, rng):
    """A row that is full keeps what it has; nothing wraps around or spills over."""
    config = models.tiny_v2_lite()
    cache = empty_cache(config, batch=2, slots=4, dtype=jnp.float32, mesh=mesh)
    mla = attention(None)
    x = jnp.asarray(rng.standard_normal((2, 1, D)), jnp.float32)
    context = Context(positions_BT=jnp.array([[4], [3]]), phase=Phase.DECODE)
    stack = cache.segments[1]
    stack = type(stack)(
        latent_YBSL=jnp.full((2, 2, 4, 32), 7.0), rope_YBRS=jnp.full((2, 2, 8, 4), 7.0)
    )
    _, after = mla(x, context, stack, jnp.int32(1))
    changed = np.asarray((after.latent_YBSL != 7.0).any(axis=-1))
    assert np.argwhere(changed).tolist() == [[1, 1, 3]]
