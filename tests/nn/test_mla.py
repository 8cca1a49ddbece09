"""Latent attention: the absorbed form is the plain one, and the cache is small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.config import Mla, Rope, Yarn
from dsjax.errors import UserError
from dsjax.nn.cache import Context, LatentCache, Phase, empty_cache
from dsjax.nn.mla import MultiHeadLatentAttention
from dsjax.nn.options import FLOAT32, Build
from dsjax.sharding import BATCH, Sharding

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

    @jax.jit
    def both(x):
        q, (latent, rope) = mla.queries(mla.query_latents(x)), mla.latents(x, context)
        expanded = mla.expanded(q, latent, rope, context)
        cache = LatentCache(
            latent_YBSL=latent[None], rope_YBRS=rope.swapaxes(1, 2)[None]
        )
        return mla.absorbed(q, cache, 0, context), expanded

    absorbed, expanded = both(x)
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
    _, after = jax.jit(mla)(x, context, stack, jnp.int32(1))
    changed = np.asarray((after.latent_YBSL != 7.0).any(axis=-1))
    assert np.argwhere(changed).tolist() == [[1, 1, 3]]


def test_v3_keeps_644_bytes_of_fp8_a_token(mesh):
    """A byte for each part of the latent, a scale, the rotary part in bfloat16."""
    config = models.get("v3")
    cache = empty_cache(config, batch=3, slots=8, dtype=jnp.float8_e4m3fn, mesh=mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.segments))
    assert size == 3 * 8 * 61 * (512 + 4 + 2 * 64)
    assert cache.slots == 8


def test_keys_and_values_of_heads_are_not_kept_in_fp8(mesh):
    config = models.tiny_moe_16b()
    with pytest.raises(UserError, match="no latents to keep in float8_e4m3fn"):
        empty_cache(config, batch=1, slots=8, dtype="float8_e4m3fn", mesh=mesh)


def decoded(config, mla, x, dtype, mesh):
    """A prompt of 20 kept, then 4 tokens at once: what they get, and the cache."""
    cache = empty_cache(config, batch=2, slots=24, dtype=dtype, mesh=mesh).segments[1]
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))

    @jax.jit
    def both(x, positions, cache):
        prompt = Context(positions_BT=positions[:, :20], phase=Phase.PREFILL)
        _, cache = mla(x[:, :20], prompt, cache, jnp.int32(1))
        new = Context(positions_BT=positions[:, 20:], phase=Phase.DECODE)
        return mla(x[:, 20:], new, cache, jnp.int32(1))

    return both(*(jax.device_put(a, jax.P(BATCH)) for a in (x, positions)), cache)


@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
def test_an_fp8_cache_is_as_close_as_e4m3_is(mesh, rng, wide):
    """Each kept latent is off by at most half a step; results are, by their mean, less."""
    mla, config = attention(None), models.tiny_v2_lite()
    x = jnp.asarray(rng.standard_normal((2, 24, D)), jnp.float32)
    exact, full = decoded(config, mla, x, wide, mesh)
    found, fp8 = decoded(config, mla, x, "float8_e4m3fn", mesh)
    assert fp8.latent_YBSL.dtype == jnp.float8_e4m3fn
    assert fp8.rope_YBRS.dtype == jnp.bfloat16 and fp8.scale_YBS.dtype == jnp.float32
    kept = fp8.latent_YBSL.astype(jnp.float32) * fp8.scale_YBS[..., None]
    latent = full.latent_YBSL.astype(jnp.float32)
    step = np.maximum(2**-4 * np.abs(latent), 2**-10 * fp8.scale_YBS[..., None])
    rounded = 0 if wide == "float32" else 2**-8 * np.abs(latent)
    assert (np.abs(kept - latent) <= step + rounded).all()
    assert (kept[0] == 0).all() and (kept[1] != 0).any(-1).all()  # its own layer
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0.002 < error < 2**-4
