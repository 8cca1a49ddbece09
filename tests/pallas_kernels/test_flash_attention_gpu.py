"""The Hopper kernels of attention's gradients: what they take, anywhere; the compiled code,
on any machine; the results, on a GPU (`pytest -m gpu`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import api, cudnn, gradients_gpu, pallas_gpu
from pallas_kernels.flash_attention.reference import Visible
from pallas_kernels.grouped_matmul.ring_gpu import Ring
from tests.pallas_kernels.h200 import compile_for_h200
from tests.pallas_kernels.interpret_gpu import interpreted
from tests.pallas_kernels.test_flash_attention import (
    SCALE,
    both_ways,
    by_hand,
    operands,
)

NOTHING = Visible(None, None, None)


def lacking(kernel, B=1, T=2048, K=16, G=1, H=192, U=128, dtype=jnp.bfloat16):
    """Why a kernel is not for such operands."""
    found, sizes = [], ((B, T, K, G, H), (B, T, K, H), (B, T, K, U))
    operands = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
    jax.eval_shape(lambda *qkv: found.append(kernel.lacks(*qkv, NOTHING)), *operands)
    return found[0]


@pytest.fixture
def hopper(monkeypatch):
    """As if cuDNN and a Hopper GPU were at hand."""
    monkeypatch.setattr(cudnn, "available", lambda: True)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (dict(), ""),
        (dict(H=128), ""),
        (dict(H=64, U=64, dtype=jnp.float16), ""),
        (dict(T=128), ""),
        (dict(K=4, G=4, T=8192), ""),
        (dict(dtype=jnp.float32), "not of 16 bits"),
        (dict(H=128, U=64), "heads of 128 and 64"),
        (dict(T=120), "a length of 120"),
        (dict(T=2052), "a length of 2052"),
        (dict(K=4, G=4), "64 blocks of keys"),
    ],
    ids=str,
)
def test_what_it_takes(hopper, shape, words):
    why = lacking(pallas_gpu, **shape)
    assert words in why and bool(words) == bool(why)


def test_cudnn_has_what_it_does_not_take(hopper):
    def best(**shape):
        names = api.PLATFORMS["cuda"]
        why = {name: lacking(api.KERNELS[name], **shape) for name in names}
        return api._best(names, why)

    assert best() == "hopper"
    assert best(T=2052) == "cudnn"
    assert best(dtype=jnp.float32) == "cudnn"  # which then says why it is not


@pytest.mark.parametrize(("count", "blocks"), [(160, 16), (3, 16), (32, 32), (7, 300)])
def test_every_block_of_every_head_has_its_turn(monkeypatch, count, blocks):
    index = jnp.arange(count * blocks)
    monkeypatch.setattr(gradients_gpu.lax, "axis_index", lambda _: index)
    head, block = map(np.asarray, gradients_gpu.in_order(count, blocks))
    assert len(set(zip(head, block))) == count * blocks
    assert head.max() == count - 1 and block.max() == blocks - 1
    together = -(-2 * 132 // blocks)
    assert (np.diff(head // together) >= 0).all()


def test_tiles_of_scores_lie_side_by_side():
    plan = gradients_gpu.Plan(2, 1000, 3, 2, 192, 128, 1.0, jnp.dtype("bfloat16"), True)
    tiles = [gradients_gpu.triangle(i) + j for i in range(16) for j in range(i + 1)]
    assert tiles == list(range(plan.score_tiles))
    assert plan.score_bytes == 2 * 6 * len(tiles) * 64 * 64 * 2


COMPILE = """
from pallas_kernels.flash_attention import pallas_gpu

for B, T, K, G, H, U, most_kept in {cases}:
    pallas_gpu.MOST_KEPT = most_kept
    q, k, v, out = (B, T, K, G, H), (B, T, K, H), (B, T, K, U), (B, T, K, G, U)
    operands = [*map(lambda size: shape(*size), (q, k, v, out))]
    lse = shape(*q[:-1], dtype=jnp.float32)

    def run(q, k, v, out, lse):
        return pallas_gpu.backward(q, k, v, None, out, lse, out, scale=0.1)

    compiled = jax.jit(run).lower(*operands, lse).compile()
    print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
"""
KEPT, AGAIN = 2**40, 0
MLA, GQA = (16, 2048, 10, 1, 192, 128), (2, 4096, 8, 4, 128, 128)


# Measured, and without spills, with JAX 0.11.
spills = pytest.mark.xfail(
    jax.__version_info__[:2] != (0, 11),
    raises=AssertionError,
    strict=False,
    reason="the code of JAX 0.10 and 0.12 spills about 100 bytes",
)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([(*MLA, KEPT), (*MLA, AGAIN)], marks=spills),
        pytest.param(
            [
                (*sizes, kept)
                for sizes in (GQA, (1, 1000, 2, 1, 64, 64))
                for kept in (KEPT, AGAIN)
            ],
            marks=pytest.mark.aot,
        ),
    ],
    ids=["mla", "others"],
)
def test_compiles_for_an_h200_without_spills(cases):
    printed, _ = compile_for_h200(COMPILE.format(cases=cases))
    assert printed.count("kernels: 2") == len(cases)


def by_kernels(q, k, v, dout):
    """The gradients by the kernels, and in float64."""
    out, *expected = by_hand(q, k, v, dout, None)
    wide_q, wide_k = (np.asarray(x, np.float64) for x in (q, k))
    scores = SCALE * np.einsum("btkgh,bskh->btkgs", wide_q, wide_k)
    seen = np.tril(np.ones((q.shape[1],) * 2, bool))[:, None, None]
    lse = np.log(np.exp(np.where(seen, scores, -np.inf)).sum(-1))
    forward = jnp.asarray(out, q.dtype), jnp.asarray(lse, jnp.float32)
    found = pallas_gpu.backward(q, k, v, NOTHING, *forward, dout, scale=SCALE)
    return jax.block_until_ready(found), expected


def close(results, expected):
    for got, want in zip(results, expected, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - want)
        assert error < 3e-3 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((1, 200, 1, 1, 192, 128), True),
        ((2, 328, 1, 2, 64, 64), True),
        ((1, 328, 2, 2, 64, 64), False),
    ],
    ids=str,
)
def test_interpreted(monkeypatch, rng, shape, kept):
    """Barriers, copies and sums in any order that threads may run in, without a GPU."""
    monkeypatch.setattr(pallas_gpu, "MOST_KEPT", 2**40 if kept else 0)
    *arrays, _ = operands(rng, (*shape, False), jnp.bfloat16)
    with interpreted():
        close(*by_kernels(*arrays))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
def test_buffers_that_are_read_before_they_are_full_are_a_race(monkeypatch, rng, kept):
    """What the test above rests on: of a planted mistake it says so."""
    monkeypatch.setattr(pallas_gpu, "MOST_KEPT", 2**40 if kept else 0)
    monkeypatch.setattr(Ring, "filled", Ring.slot)
    *arrays, _ = operands(rng, (1, 136, 1, 1, 64, 64, False), jnp.bfloat16)
    with pytest.raises(AssertionError, match="a race"), interpreted():
        by_kernels(*arrays)


SHAPES = {  # B, T, K, G, H, U, segments
    "mla": (2, 512, 3, 1, 192, 128, False),
    "an odd number of steps": (1, 1096, 2, 1, 192, 128, False),
    "part of a step": (2, 136, 2, 1, 192, 128, False),
    "gqa": (3, 640, 12, 3, 128, 128, False),
    "small heads": (1, 968, 3, 1, 64, 64, False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_equals_the_definition(monkeypatch, rng, shape, kept, dtype):
    monkeypatch.setattr(pallas_gpu, "MOST_KEPT", 2**40 if kept else 0)
    arrays = operands(rng, shape, dtype)
    close(both_ways(*arrays, implementation="hopper"), by_hand(*arrays))


@pytest.mark.gpu
def test_the_same_bits_each_time(rng):
    arrays = operands(rng, (4, 2048, 8, 1, 192, 128, False), jnp.bfloat16)
    first = both_ways(*arrays)
    for _ in range(3):
        for got, before in zip(both_ways(*arrays, implementation="hopper"), first):
            np.testing.assert_array_equal(got, before)
