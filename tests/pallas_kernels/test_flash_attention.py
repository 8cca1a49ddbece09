"""Fused attention: one test body for every implementation, the TPU's interpreted; what
its kernels move; the real TPU compiler on the published models' shapes.
"""

import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
)
from jax.sharding import AxisType

from pallas_kernels.flash_attention import cudnn, flash_attention, pallas_tpu, work
from tests.pallas_kernels.aot import compile_for_tpu
from tests.pallas_kernels.interpret import interpreted, pallas_calls

# B, T, K, G, H, U, segments: few heads, since a block has at least 128 tokens
SHAPES = {
    "mla": (1, 256, 2, 1, 192, 128, False),
    "one more than a block, gqa, segments": (2, 129, 1, 2, 24, 16, True),
    "one token": (1, 1, 1, 1, 192, 128, False),
}
SCALE = 0.11


def operands(rng, shape, dtype):
    B, T, K, G, H, U, with_segments = shape
    sizes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, U), (B, T, K, G, U)]
    arrays = [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1), jnp.int32)
    return *arrays, segments if with_segments else None


def both_ways(q, k, v, dout, segments, **options):
    """The result and the three gradients."""

    @jax.jit
    def call(q, k, v, dout, segments):
        attend = lambda *qkv: flash_attention(  # noqa: E731
            *qkv, scale=SCALE, segments_BT=segments, **options
        )
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(dout)

    return jax.block_until_ready(call(q, k, v, dout, segments))


def by_hand(q, k, v, dout, segments):
    """The same in float64, from the definition and its written-out gradient."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    t, s = np.mgrid[: q.shape[1], : q.shape[1]]
    mask = np.broadcast_to(s <= t, (q.shape[0], *t.shape))
    if segments is not None:
        segments = np.asarray(segments)
        mask = mask & (segments[:, :, None] == segments[:, None])
    scores = SCALE * np.einsum("btkgh,bskh->bkgts", q, k)
    scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bkgts,bsku->btkgu", weights, v)
    dweights = np.einsum("btkgu,bsku->bkgts", dout, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * SCALE
    dq = np.einsum("bkgts,bskh->btkgh", dscores, k)
    dk = np.einsum("bkgts,btkgh->bskh", dscores, q)
    return out, dq, dk, np.einsum("bkgts,btkgu->bsku", weights, dout)


def run(implementation, *arrays):
    if implementation == "splash":
        with interpreted():
            return both_ways(*arrays, implementation="splash")
    return both_ways(*arrays, implementation=implementation)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", ["reference", "splash", None])
def test_equals_the_definition(rng, implementation, shape):
    arrays = operands(rng, shape, jnp.float32)
    for got, expected in zip(run(implementation, *arrays), by_hand(*arrays)):
        atol = 2e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(got, expected, atol=atol)


@pytest.mark.parametrize("implementation", ["reference", "splash"])
def test_bfloat16_to_its_rounding(rng, implementation):
    arrays = operands(rng, SHAPES["mla"], jnp.bfloat16)
    for got, expected in zip(run(implementation, *arrays), by_hand(*arrays)):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float64) - expected)
        assert error < 2**-7 * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cudnn", None])
@pytest.mark.parametrize("shape", [SHAPES["mla"], (2, 300, 2, 3, 128, 128, False)])
def test_cudnn_equals_the_definition(rng, implementation, shape):
    arrays = operands(rng, shape, jnp.bfloat16)
    results = both_ways(*arrays, implementation=implementation)
    for got, expected in zip(results, by_hand(*arrays)):
        error = np.linalg.norm(np.asarray(got, np.float64) - expected)
        assert error < 2**-7 * np.linalg.norm(expected)


def test_cut_by_a_mesh(rng):
    """Batch and kv heads over four devices, through the kernel and without."""
    arrays = operands(rng, (2, 130, 2, 1, 16, 8, True), jnp.float32)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    cut = [jax.P("a", None, "b")] * 4 + [jax.P("a", None)]
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, spec) for x, spec in zip(arrays, cut)]
        for implementation in ("splash", None):
            results = run(implementation, *arrays)
            assert all(x.sharding.spec[:3] == ("a", None, "b") for x in results)
            for got, expected in zip(results, by_hand(*arrays)):
                np.testing.assert_allclose(got, expected, atol=1e-5)


ODD, MLA = (1, 500, 2, 2, 24, 16), (1, 384, 2, 1, 192, 128)


@pytest.mark.parametrize(
    ("segments", "backward", "shape"),
    [  # each way and each shape; the slow ones are the other pairs of them
        (False, ("fused",), ODD),
        (True, ("fused",), MLA),
        (True, ("dkv", "dq"), ODD),
        pytest.param(False, ("fused",), MLA, marks=pytest.mark.slow),
        pytest.param(True, ("fused",), ODD, marks=pytest.mark.slow),
        pytest.param(True, ("dkv", "dq"), MLA, marks=pytest.mark.slow),
    ],
)
def test_bytes_moved_are_those_counted(rng, monkeypatch, segments, backward, shape):
    """Blocks of 128 here, so that there are several of them to a side; and the gradients
    of the longest sequences, in two kernels.
    """
    monkeypatch.setattr(pallas_tpu, "block_size", lambda *_: 128)
    if backward != ("fused",):
        monkeypatch.setattr(pallas_tpu, "MOST_PARTS_BYTES", 0)
    _, T, K, G, H, U = shape
    arrays = operands(rng, (*shape, segments), jnp.float32)
    with interpreted() as copies:
        results = both_ways(*arrays, implementation="splash")
    for got, wanted in zip(results, by_hand(*arrays)):
        atol = 2e-5 * max(1, np.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, atol=atol)
    options = dict(heads=(K * G, K), sizes=(H, U), block=128, bytes_each=4)
    expected = [
        work.count(phase, length=-(-T // 128) * 128, segments=segments, **options).moved
        for phase in ("fwd", *backward)
    ]
    for name in set().union(*expected):
        moved = sum(kernel.get(name, 0) for kernel in expected)
        assert copies[f"{name}_ref"] == moved, name
    # JAX 0.10 has three scratch arrays as outputs: a block each, once a kernel.
    others = {name: n for name, n in copies.items() if "scratch" in name}
    assert sum(copies.values()) - sum(others.values()) == sum(
        sum(kernel.values()) for kernel in expected
    )
    assert sum(others.values()) <= 128 * 4 * (128 + 128 + U + H + U + H)


def test_a_block_on_the_diagonal_is_the_only_waste():
    for length in (1024, 2048, 4096, 8192, 131072):
        block = pallas_tpu.block_size(length, (192, 128), 2)
        assert length % block == 0
        done = work.count(
            "fwd",
            length=length,
            heads=(1, 1),
            sizes=(192, 128),
            block=block,
            bytes_each=2,
        )
        assert 1 < done.flops / done.flops_needed <= (1.5 if length == 1024 else 1.25)


@pytest.mark.parametrize("length", [1, 127, 129, 513, 600, 1000, 4097, 8191])
def test_blocks_pad_little(length):
    block = pallas_tpu.block_size(length, (192, 128), 2)
    padded = -(-length // block) * block
    assert block % 128 == 0 and padded < 1.1 * length + 128


def test_scores_of_small_heads_fit_too():
    """1024 x 1024 of them are 4 MiB of the 16 in float32; 2048 x 2048 would be all."""
    assert pallas_tpu.block_size(65_536, (24, 16), 2) == 1024


def test_the_mask_is_that_of_jax():
    """Where JAX's builder, which does work of T x T, sees anything to do."""
    causal = masks.MultiHeadMask([masks.CausalMask((512, 512))])
    theirs, _ = mask_info.process_mask(
        causal, (128, 128), head_shards=1, q_seq_shards=1
    )
    ours = pallas_tpu._seen_by_queries(512, 128)
    for name in ("data_next", "block_mask", "q_sequence"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    theirs, _ = mask_info.process_mask_dkv(
        causal, (128, 128), head_shards=1, q_seq_shards=1
    )
    ours = pallas_tpu._seeing_keys(512, 128)
    np.testing.assert_array_equal(ours.block_mask, theirs.block_mask)
    busy = np.asarray(theirs.block_mask) > 0
    np.testing.assert_array_equal(ours.data_next[busy], theirs.data_next[busy])


def test_every_kernel_has_an_estimate(rng):
    """Of V3's attention: forward, then all gradients, some heads at a time."""
    shapes = operands(rng, (1, 8, 1, 1, 192, 128, False), jnp.bfloat16)[:4]
    wide = [jax.ShapeDtypeStruct((2, 4096, 128, *x.shape[3:]), x.dtype) for x in shapes]

    def call(q, k, v, dout):
        return both_ways(q, k, v, dout, None)

    traced = jax.make_jaxpr(call)(*wide)
    found = [
        equation.params["cost_estimate"] for equation in pallas_calls(traced.jaxpr)
    ]
    visited = 128 * 10 * 1024**2  # of the 16 blocks of a head
    products = [192 + 128, (3 * 192 + 2 * 128) / 2]
    assert [cost.flops for cost in found] == [2 * visited * n for n in products]
    assert all(cost.bytes_accessed > 3 * 128 * 4096 * 128 * 2 for cost in found)


@pytest.mark.parametrize(
    ("length", "backward"), [(65_536, ["dkv"]), (131_072, ["dkv", "dq"])]
)
def test_the_longest_sequences_take_two_kernels(length, backward):
    """Where a head's parts of the queries' gradient would be gigabytes."""
    sizes = (1, 192), (192,), (128,), (1, 128)
    arrays = [jax.ShapeDtypeStruct((1, length, 1, *size), "bfloat16") for size in sizes]
    traced = jax.make_jaxpr(lambda *qkv: both_ways(*qkv, None))(*arrays)
    names = {
        kernel.params["name"].split("_")[2] for kernel in pallas_calls(traced.jaxpr)
    }
    assert names == {"fwd", *backward}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(implementation="fast"), ValueError, "implementation='fast'"),
        (dict(k=(1, 8, 3, 16)), ValueError, r"k.shape=\(1, 8, 3, 16\)"),
        (dict(v=(1, 7, 2, 16)), ValueError, r"v.shape=\(1, 7, 2, 16\)"),
        (dict(q=(1, 8, 2, 1, 24)), ValueError, r"q.shape=\(1, 8, 2, 1, 24\)"),
        (dict(q=(1, 4, 2, 1, 16)), ValueError, "4 queries, 8 keys"),
        (dict(segments_BT=(1, 9)), ValueError, r"segments \(1, 9\)"),
        (dict(v=(1, 8, 32)), ValueError, r"ranks of .*v.shape=\(1, 8, 32\)"),
        (dict(segments_BS=(1, 8)), ValueError, "segments_BS without segments_BT"),
        (
            {f"{name}_dtype": jnp.float16 for name in "qkv"}
            | {"implementation": "splash"},
            NotImplementedError,
            "float16.* is neither bfloat16 nor float32",
        ),
        (
            dict(segments_BT=(1, 8), segments_BS=(1, 8), implementation="splash"),
            NotImplementedError,
            "queries that are not the keys' own",
        ),
        (dict(k_dtype=jnp.bfloat16), ValueError, "k.dtype=dtype.bfloat16"),
        (
            dict(q=(1, 8, 2, 1, 264), k=(1, 8, 2, 264), implementation="splash"),
            NotImplementedError,
            "heads of 264 and 16",
        ),
        (
            dict(softmax_dtype=jnp.bfloat16, implementation="splash"),
            NotImplementedError,
            "a softmax in bfloat16",
        ),
        (dict(implementation="cudnn"), NotImplementedError, "no Hopper GPU"),
        (dict(implementation="hopper"), NotImplementedError, "no Hopper GPU"),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, error, words):
    change = dict(change)
    shapes = dict(q=(1, 8, 2, 1, 16), k=(1, 8, 2, 16), v=(1, 8, 2, 16))
    arrays = {
        name: jnp.zeros(
            change.pop(name, shape), change.pop(f"{name}_dtype", jnp.float32)
        )
        for name, shape in shapes.items()
    }
    for name in {"segments_BT", "segments_BS"} & set(change):
        change[name] = jnp.zeros(change[name], jnp.int32)
    with pytest.raises(error, match=words):
        # beneath the shape check of the tests
        inspect.unwrap(flash_attention)(*arrays.values(), scale=1.0, **change)


def test_what_runs_where_is_said_once(caplog):
    q, k = jnp.zeros((1, 3, 2, 1, 104)), jnp.zeros((1, 3, 2, 104))
    wide = jnp.zeros((1, 3, 2, 1, 264)), jnp.zeros((1, 3, 2, 264))
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            flash_attention(q, k, k, scale=1.0)
            flash_attention(*wide, wide[1], scale=1.0)
    lines = [line for line in caplog.messages if line.startswith("flash_attention")]
    assert len(lines) == len(set(lines)) <= 2
    assert any("heads of 264" in line and "everywhere" in line for line in lines)


def test_a_gpu_that_is_not_here_is_no_hopper():
    assert not cudnn.available()


# --- the real TPU compiler, inside its default VMEM limits

MODELS = {  # B, T, K, G, H, U, segments of one device
    "v3 training": (1, 4096, 16, 1, 192, 128, False),
    "v2-lite training, documents": (2, 2048, 16, 1, 192, 128, True),
    "llm 67b training": (1, 4096, 8, 8, 128, 128, False),
    "v2 prefill of an odd length": (1, 5003, 16, 1, 192, 128, False),
    "v3 long": (1, 131072, 2, 1, 192, 128, True),
    "widest heads": (1, 4096, 4, 1, 256, 256, True),
    "tiny": (2, 16, 4, 1, 24, 16, False),
}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SOME = [("v5p:2x2x1", "v3 training", "bfloat16")]
ALL = [
    (topology, model, dtype)
    for topology in TOPOLOGIES
    for model in MODELS
    for dtype in ("bfloat16", "float32")
]


def compiles(topology, model, dtype):
    B, T, K, G, H, U, segments = MODELS[model]
    sizes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, U), (B, T, K, G, U)]
    shapes = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
    shapes.append(jax.ShapeDtypeStruct((B, T), jnp.int32) if segments else None)
    text = compile_for_tpu(topology, both_ways, *shapes).as_text()
    kernels = 2 if T <= 65_536 else 3
    assert text.count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.parametrize(("topology", "model", "dtype"), SOME)
def test_compiles_for_a_tpu(topology, model, dtype):
    compiles(topology, model, dtype)


@pytest.mark.aot
@pytest.mark.parametrize(("topology", "model", "dtype"), ALL)
def test_compiles_for_every_tpu(topology, model, dtype):
    compiles(topology, model, dtype)
