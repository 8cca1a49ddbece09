"""Softmax attention in blocks of queries against the whole at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.nn import attention
from dsjax.nn.attention import attend
from dsjax.nn.cache import Context


@pytest.fixture
def operands(rng):
    """27 tokens, 2 kv heads of 3 queries each, values of another size than keys."""
    shapes = [(2, 27, 2, 3, 16), (2, 27, 2, 16), (2, 27, 2, 8)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def mask(documents=False):
    positions = jnp.broadcast_to(jnp.arange(27), (2, 27))
    segments = (
        jnp.asarray(np.arange(27) // 10)[None].repeat(2, 0) if documents else None
    )
    return Context(positions_BT=positions, segments_BT=segments).mask()


def by_hand(q, k, v, mask, scale):
    scores = np.einsum("btkgh,bskh->bkgts", q, k) * scale
    scores = np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgts,bsku->btkgu", weights, v)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block", [512, 9, 8], ids=["whole", "exact", "padded"])
def test_equals_the_definition(mesh, monkeypatch, operands, documents, block):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    got = attend(*operands, mask(documents), 0.5)
    expected = by_hand(*map(np.float64, operands), mask(documents), 0.5)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_gradients_of_blocks_equal_those_of_the_whole(mesh, monkeypatch, operands, rng):
    weigh = jnp.asarray(rng.standard_normal((2, 27, 2, 3, 8)), jnp.float32)

    def gradients(block):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        value = lambda *qkv: (attend(*qkv, mask(), 0.5) * weigh).sum()  # noqa: E731
        return jax.grad(value, argnums=(0, 1, 2))(*operands)

    for whole, blocks in zip(gradients(512), gradients(8)):
        np.testing.assert_allclose(blocks, whole, atol=1e-5)


def test_scores_of_one_block_exist_at_a_time(mesh):
    """4096 tokens: all scores at once would take 64 MiB a head."""
    shapes = [(1, 4096, 1, 1, 16), (1, 4096, 1, 16), (1, 4096, 1, 16), (1, 4096, 4096)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes[:3]]
    args.append(jax.ShapeDtypeStruct(shapes[3], bool))
    compiled = jax.jit(attend, static_argnums=4).lower(*args, 0.5).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 48 << 20
