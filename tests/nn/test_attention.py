"""Softmax attention in blocks of queries against the whole at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.nn.attention import attend
from dsjax.nn.cache import Context
from pallas_kernels.flash_attention import reference


@pytest.fixture
def operands(rng):
    """27 tokens, 2 kv heads of 3 queries each, values of another size than keys."""
    shapes = [(2, 27, 2, 3, 16), (2, 27, 2, 16), (2, 27, 2, 8)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def sight(documents=False):
    positions = jnp.broadcast_to(jnp.arange(27), (2, 27))
    segments = (
        jnp.asarray(np.arange(27) // 10)[None].repeat(2, 0) if documents else None
    )
    return Context(positions_BT=positions, segments_BT=segments).sight()


def mask(documents):
    """Query t of a document sees key s of the same document, s <= t."""
    t, s = np.mgrid[:27, :27]
    return (s <= t) & (not documents or (t // 10 == s // 10))


def by_hand(q, k, v, mask, scale):
    scores = np.einsum("btkgh,bskh->bkgts", q, k) * scale
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bkgts,bsku->btkgu", weights, v)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block", [512, 9, 8], ids=["whole", "exact", "padded"])
def test_equals_the_definition(mesh, monkeypatch, operands, documents, block):
    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    got = attend(*operands, sight(documents), 0.5)
    expected = by_hand(*map(np.float64, operands), mask(documents), 0.5)
    np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("block", [512, 9, 8], ids=["whole", "exact", "padded"])
def test_gradients_are_those_of_the_definition(
    mesh, monkeypatch, operands, rng, documents, block
):
    """The written-out backward pass against JAX's own of the plain formula."""
    weigh = jnp.asarray(rng.standard_normal((2, 27, 2, 3, 8)), jnp.float32)

    def plain(q, k, v):
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * 0.5
        weights = jax.nn.softmax(jnp.where(mask(documents), scores, -jnp.inf))
        return jnp.einsum("bkgts,bsku->btkgu", weights, v)

    def gradients(form):
        value = lambda *qkv: (form(*qkv) * weigh).sum()  # noqa: E731
        return jax.grad(value, argnums=(0, 1, 2))(*operands)

    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    ours = gradients(lambda *qkv: attend(*qkv, sight(documents), 0.5))
    for got, expected in zip(ours, gradients(plain)):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_softmax_in_the_dtype_asked_for(mesh, operands):
    """bfloat16 operands: a float32 softmax is nearer to the truth than a bfloat16 one."""
    narrow = [x.astype(jnp.bfloat16) for x in operands]
    exact = by_hand(*(np.asarray(x, np.float64) for x in narrow), mask(False), 0.5)

    def error(dtype):
        got = attend(*narrow, sight(), 0.5, dtype)
        assert got.dtype == jnp.bfloat16
        return np.abs(np.asarray(got, np.float64) - exact).mean()

    assert 1.5 * error(jnp.float32) < error(jnp.bfloat16)


@pytest.mark.parametrize("gradient", [False, True])
def test_scores_of_one_block_exist_at_a_time(mesh, gradient):
    """8192 tokens: all scores at once would take 256 MiB a head, a mask 64."""
    shapes = [(1, 8192, 1, 1, 16), (1, 8192, 1, 16), (1, 8192, 1, 16)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def value(q, k, v):
        sight = Context(positions_BT=jnp.zeros((1, 8192), jnp.int32)).sight()
        return attend(q, k, v, sight, 0.5).sum()

    function = jax.grad(value, argnums=(0, 1, 2)) if gradient else value
    compiled = jax.jit(function).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 90 << 20
