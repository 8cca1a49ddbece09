"""MLA decoding: one test body for every implementation, the TPU's interpreted; what the
kernel copies; the real TPU compiler, and a whole loop that writes the cache in place.
"""

import inspect
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from pallas_kernels import dispatch
from pallas_kernels.mla_decode import append, mla_decode, work
from tests.pallas_kernels.aot import compile_for_tpu
from tests.pallas_kernels.interpret import checked, interpreted, pallas_calls

SCALE, L, R, LAYERS, F32 = 0.21, 128, 16, 2, jnp.float32
# tokens, heads, slots of a row or page, pages of a row, lengths
CASES = {
    "a length of 1, a whole row": (1, 2, 512, None, [1, 512, 300]),
    "exact blocks and one more": (1, 3, 1152, None, [1024, 1025, 511, 513]),
    "four tokens over a block's edge": (4, 2, 768, None, [514, 768]),
    "empty, and shorter than the tokens": (3, 2, 256, None, [0, 2, 3, 256]),
    "beyond the cache, and below": (2, 2, 256, None, [300, 10_000, -7]),
    "pages smaller than a block": (2, 2, 128, 4, [512, 129]),
    "pages as large as a block": (1, 2, 512, 2, [1024, 513, 40]),
}


def operands(rng, case, dtype):
    """Queries, the cache of two layers, lengths, and pages in no order."""
    tokens, heads, slots, pages, lengths = case
    B = len(lengths)
    X = B if pages is None else B * pages + 1
    sizes = [(B, tokens, heads, L), (B, tokens, heads, R)]
    sizes += [(LAYERS, X, slots, L), (LAYERS, X, R, slots)]
    arrays = [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]
    if pages is not None:
        pages = jnp.asarray(rng.permutation(X)[: B * pages].reshape(B, -1), jnp.int32)
    return *arrays, jnp.asarray(lengths, jnp.int32), pages


def call(implementation, *arrays):
    """Compiled anew, since what is interpreted and what is not looks the same to jit."""

    @jax.jit
    def compiled(q_latent, q_rope, latent, rope, lengths, pages):
        return mla_decode(
            q_latent,
            q_rope,
            latent,
            rope,
            lengths,
            layer=jnp.int32(1),
            scale=SCALE,
            pages_BP=pages,
            implementation=implementation,
        )

    return compiled(*arrays)


def run(implementation, *arrays, params=None):
    if implementation != "pallas_tpu":
        return call(implementation, *arrays)
    with interpreted(params):
        return jax.block_until_ready(call(implementation, *arrays))


def by_hand(q_latent, q_rope, latent, rope, lengths, pages):
    """In float64, query by query, on the slots it sees and no others."""
    q_latent, q_rope, latent, rope = (
        np.asarray(x, np.float64) for x in (q_latent, q_rope, latent[1], rope[1])
    )
    out, lse = np.zeros(q_latent.shape), np.full(q_latent.shape[:3], -np.inf)
    for row, length in enumerate(lengths):
        places = [row] if pages is None else pages[row]
        c = np.concatenate([latent[place] for place in places])
        k = np.concatenate([rope[place].T for place in places])
        tokens = q_latent.shape[1]
        for token in range(tokens):
            seen = min(int(length), len(c)) - tokens + 1 + token
            if seen <= 0:
                continue
            scores = q_latent[row, token] @ c[:seen].T + q_rope[row, token] @ k[:seen].T
            powers = np.exp(SCALE * scores)
            out[row, token] = powers @ c[:seen] / powers.sum(-1, keepdims=True)
            lse[row, token] = np.log(powers.sum(-1))
    return out, lse


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_equals_the_definition(rng, implementation, case):
    arrays = operands(rng, case, F32)
    for got, expected in zip(run(implementation, *arrays), by_hand(*arrays)):
        np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_equals_the_definition_and_copies_what_is_counted(rng, case):
    arrays, (tokens, heads, slots, pages, lengths) = operands(rng, case, F32), case
    with interpreted() as copies:
        results = jax.block_until_ready(call("pallas_tpu", *arrays))
    for got, expected in zip(results, by_hand(*arrays)):
        np.testing.assert_allclose(got, expected, atol=5e-6)
    lengths = np.clip(lengths, 0, slots * (pages or 1)).tolist()
    sizes = dict(tokens=tokens, heads=heads, sizes=(L, R), dtype=F32)
    moved = work.count(lengths, **sizes).moved
    names = {"q": "q_ref", "q_rope": "q_rope_ref", "out": "out_ref", "lse": "lse_ref"}
    names |= {"latent": ("dma", 2), "rope": ("dma", 3)}
    assert {name: copies[theirs] for name, theirs in names.items()} == moved
    assert sum(copies.values()) == sum(moved.values())


@pytest.mark.parametrize("implementation", ["reference", "pallas_tpu"])
def test_bfloat16_to_its_rounding(rng, implementation):
    arrays = operands(rng, (2, 4, 1024, None, [1000, 530]), jnp.bfloat16)
    out, lse = run(implementation, *arrays)
    expected, expected_lse = by_hand(*arrays)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(out, np.float64) - expected)
    assert error < 2**-8 * np.linalg.norm(expected)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def test_what_nobody_sees_may_be_anything(rng):
    """Behind the lengths, and in the other layer: not even NaN gets through."""
    arrays = list(operands(rng, (2, 2, 512, None, [130, 257]), F32))
    expected = by_hand(*arrays)
    behind = np.arange(512) >= np.asarray(arrays[4])[:, None]
    arrays[2] = (
        jnp.where(behind[None, :, :, None], jnp.nan, arrays[2]).at[0].set(jnp.nan)
    )
    arrays[3] = jnp.where(behind[None, :, None], jnp.nan, arrays[3]).at[0].set(jnp.nan)
    for implementation in ("reference", "pallas_tpu"):
        for got, wanted in zip(run(implementation, *arrays), expected):
            np.testing.assert_allclose(got, wanted, atol=5e-6)


def test_two_cores_share_the_rows(rng):
    """As on a v5p, each with its own buffers and copies ahead."""
    arrays = operands(rng, (1, 2, 512, None, [1, 512, 0, 300]), F32)
    out, _ = run("pallas_tpu", *arrays, params=checked(num_cores_or_threads=2))
    np.testing.assert_allclose(out, by_hand(*arrays)[0], atol=5e-6)


def test_not_waiting_for_a_copy_is_a_race(rng, monkeypatch):
    """The same kernel with its waits left out: the check sees that."""
    arrays = operands(rng, (1, 2, 512, None, [512]), F32)
    copy = pltpu.make_async_copy
    careless = lambda *ends: SimpleNamespace(  # noqa: E731
        start=copy(*ends).start, wait=lambda: None
    )
    monkeypatch.setattr(pltpu, "make_async_copy", careless)
    params = checked(dma_execution_mode="eager")
    with pytest.raises(AssertionError, match="a race"):
        run("pallas_tpu", *arrays, params=params)


def test_cut_by_a_mesh(rng):
    """Rows and heads over four devices, through the kernel and without."""
    arrays = operands(rng, (2, 4, 256, None, [200, 256]), F32)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    P = jax.P
    cut = [P("a", None, "b"), P("a", None, "b"), P(None, "a"), P(None, "a"), P("a")]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, spec) for x, spec in zip(arrays, cut)]
        for implementation in ("pallas_tpu", None):
            out, lse = run(implementation, *placed, None)
            assert out.sharding.spec[:3] == lse.sharding.spec[:3] == ("a", None, "b")
            np.testing.assert_allclose(out, by_hand(*arrays)[0], atol=5e-6)


@pytest.mark.parametrize("length", [2500, 4096, 4097, 8192, 163_840])
def test_at_most_a_twentieth_of_the_cache_is_read_in_vain(length):
    sizes = dict(tokens=1, heads=128, sizes=(512, 64), dtype=jnp.bfloat16)
    done = work.count([length] * 8, **sizes)
    assert done.ratio("latent", "rope") <= 1.05


def test_a_short_row_costs_what_a_short_row_costs():
    sizes = dict(tokens=1, heads=128, sizes=(512, 64), dtype=jnp.bfloat16)
    one, many = work.count([1], **sizes), work.count([1, 8192], **sizes)
    assert one.moved["latent"] == 128 * 512 * 2
    assert many.flops - one.flops == work.count([8192], **sizes).flops


def test_pages_that_are_not_there_are_the_nearest(rng):
    """Nothing is read out of bounds."""
    *arrays, pages = operands(rng, CASES["pages as large as a block"], F32)
    wrong, near = (pages.at[0].set(jnp.array(row)) for row in ([-5, 99], [0, 6]))
    for got, expected in zip(run("pallas_tpu", *arrays, wrong), by_hand(*arrays, near)):
        np.testing.assert_allclose(got, expected, atol=5e-6)


# --- appending


@pytest.mark.parametrize("implementation", ["reference", "pallas_tpu", None])
@pytest.mark.parametrize(
    ("tokens", "slots", "pages", "first"),
    [
        (1, 256, None, [0, 255, 256]),  # the last has no room
        (3, 384, None, [126, 381, 383]),
        (2, 128, 3, [127, 255, 383]),
    ],
)
def test_append_writes_what_fits_and_nothing_else(
    rng, implementation, tokens, slots, pages, first
):
    _, _, _, cache, _, table = operands(rng, (1, 1, slots, pages, first), F32)
    new = jnp.asarray(rng.standard_normal((len(first), tokens, R)), F32)

    @jax.jit
    def call(cache, new, first, table):
        return append(
            cache, new, first, layer=1, pages_BP=table, implementation=implementation
        )

    arguments = cache, new, jnp.asarray(first, jnp.int32), table
    if implementation == "pallas_tpu":
        with interpreted():
            got = jax.block_until_ready(call(*arguments))
    else:
        got = call(*arguments)
    expected = np.array(cache)
    for row, start in enumerate(first):
        for token in range(tokens):
            page, slot = divmod(start + token, slots)
            if page < (pages or 1):
                place = row if pages is None else int(table[row, page])
                expected[1, place, :, slot] = new[row, token]
    np.testing.assert_array_equal(got, expected)


# --- bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(implementation="fast"), ValueError, "implementation='fast'"),
        (dict(rope=(2, 3, 256, 16)), ValueError, r"\(2, 3, 256, 16\)"),
        (dict(q_rope=(3, 2, 4, 16)), ValueError, "rows, tokens or heads"),
        (dict(latent=(2, 3, 256, 64)), ValueError, "latents of queries and cache"),
        (dict(lengths=(2,)), ValueError, "rows, tokens or heads"),
        (dict(pages_BP=(2, 1)), ValueError, r"pages of \(2, 1\) for 3 rows"),
        (
            dict(latent=(2, 3, 256, 640), q_latent=(3, 1, 4, 640)),
            NotImplementedError,
            "sizes 640 and 16",
        ),
        (
            dict(latent=(2, 3, 200, 128), rope=(2, 3, 16, 200)),
            NotImplementedError,
            "rows or pages of 200 slots",
        ),
        (
            dict(q_latent=(3, 1, 600, 128), q_rope=(3, 1, 600, 16)),
            NotImplementedError,
            "1 tokens of 600 heads",
        ),
        (dict(softmax_dtype=jnp.bfloat16), NotImplementedError, "softmax in bfloat16"),
        (dict(q_latent=(3, 1, 4)), ValueError, r"ranks of \(3, 1, 4\)"),
        (dict(latent=(2, 4, 256, 128), rope=(2, 4, 16, 256)), ValueError, "4 rows of"),
        (dict(dtypes=["f4", "f2", "f4", "f4"]), ValueError, "float32', 'float16'"),
        (dict(dtypes=["f4", "f4", "f2", "f4"]), ValueError, "float16', 'float32'"),
        (dict(lengths_dtype="f4"), ValueError, "lengths of float32 are no integers"),
        (
            dict(dtypes=["f4", "f4", "f2", "f2"]),
            NotImplementedError,
            "float32 queries on a cache of float16",
        ),
        (
            dict(latent=(2, 9, 384, 128), rope=(2, 9, 16, 384), pages_BP=(3, 2)),
            NotImplementedError,
            "pages of 384 slots",
        ),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, error, words):
    change = {"implementation": "pallas_tpu"} | change
    shapes = dict(
        q_latent=(3, 1, 4, 128),
        q_rope=(3, 1, 4, 16),
        latent=(2, 3, 256, 128),
        rope=(2, 3, 16, 256),
        lengths=(3,),
    )
    dtypes = [*change.pop("dtypes", ["f4"] * 4), change.pop("lengths_dtype", "i4")]
    arrays = [
        jnp.zeros(change.pop(name, shape), dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes)
    ]
    if "pages_BP" in change:
        change["pages_BP"] = jnp.zeros(change["pages_BP"], jnp.int32)
    with pytest.raises(error, match=words):
        # beneath the shape check of the tests
        inspect.unwrap(mla_decode)(*arrays, layer=0, scale=1.0, **change)


@pytest.mark.parametrize(
    ("new", "options", "error", "words"),
    [
        ((3, 1, 8), {}, ValueError, r"entries \(3, 1, 8\) for a cache"),
        ((3, 16), {}, ValueError, r"entries \(3, 16\) for a cache"),
        ((3, 1, 16), {"implementation": "fast"}, ValueError, "implementation='fast'"),
        (
            (3, 129, 16),
            {"implementation": "pallas_tpu"},
            NotImplementedError,
            "129 tokens at once",
        ),
    ],
)
def test_bad_input_of_append_is_named(new, options, error, words):
    cache, first = jnp.zeros((2, 3, 16, 256)), jnp.zeros(3, jnp.int32)
    with pytest.raises(error, match=words):
        inspect.unwrap(append)(cache, jnp.zeros(new), first, layer=0, **options)


def test_what_the_kernel_does_not_take_is_left_to_plain_jax(caplog, rng):
    arrays = operands(rng, (1, 2, 200, None, [200]), F32)
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            out, _ = run(None, *arrays)
    np.testing.assert_allclose(out, by_hand(*arrays)[0], atol=5e-6)
    (line,) = caplog.messages
    assert line.startswith("mla_decode: plain JAX everywhere")
    assert "rows or pages of 200 slots" in line


# --- the real TPU compiler, inside its default VMEM limits

MODELS = {  # rows, tokens, heads of one device, slots
    "v3": (8, 1, 128, 8192),
    "v3, speculative": (8, 4, 128, 8192),
    "v2, heads over 8": (3, 1, 16, 163_840),
    "v2-lite": (64, 2, 16, 4224),
    "heads over 8": (2, 3, 2, 1152),
}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SOME = [("v5p:2x2x1", "v3", "bfloat16"), ("v6e:2x2", "v3, speculative", "float32")]
ALL = [
    (topology, model, dtype)
    for topology in TOPOLOGIES
    for model in MODELS
    for dtype in ("bfloat16", "float32")
]


def shapes(model, dtype, *, layers=3):
    B, T, N, S = MODELS[model]
    sizes = [(B, T, N, 512), (B, T, N, 64), (layers, B, S, 512), (layers, B, 64, S)]
    arrays = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
    return *arrays, jax.ShapeDtypeStruct((B,), jnp.int32)


def compiles(topology, model, dtype):
    call = lambda *arrays: mla_decode(*arrays, layer=1, scale=SCALE)  # noqa: E731
    compiled = compile_for_tpu(topology, call, *shapes(model, dtype))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 16 << 20


@pytest.mark.parametrize(("topology", "model", "dtype"), SOME)
def test_compiles_for_a_tpu(topology, model, dtype):
    compiles(topology, model, dtype)


@pytest.mark.aot
@pytest.mark.parametrize(("topology", "model", "dtype"), ALL)
def test_compiles_for_every_tpu(topology, model, dtype):
    compiles(topology, model, dtype)


def decode_loop(latent, rope, lengths, q_latent, q_rope):
    """A hundred steps of 16 layers, each of which writes its entries, then attends."""
    rows, tokens = jnp.arange(len(lengths))[:, None], jnp.arange(q_latent.shape[1])

    def layer(carry, number):
        latent, rope, lengths, q_latent, q_rope = carry
        c, k = q_latent[:, :, 0], q_rope[:, :, 0]
        latent = latent.at[number, rows, lengths[:, None] + tokens].set(c, mode="drop")
        rope = append(rope, k, lengths, layer=number)
        out, _ = mla_decode(
            q_latent,
            q_rope,
            latent,
            rope,
            lengths + len(tokens),
            layer=number,
            scale=1.0,
        )
        return (latent, rope, lengths, q_latent + out, q_rope), None

    def step(_, carry):
        latent, rope, lengths, q_latent, q_rope = lax.scan(
            layer, carry, jnp.arange(latent_layers)
        )[0]
        return latent, rope, lengths + len(tokens), q_latent, q_rope

    latent_layers = latent.shape[0]
    carry = latent, rope, lengths, q_latent, q_rope
    return lax.fori_loop(0, 100, step, carry)


def copies_nothing(topology, tokens):
    """A cache of 2.4 GB: nothing of the kind may lie beside it."""
    Y, B, S, N = 16, 16, 8192, 128
    latent, rope, lengths, q_latent, q_rope = (
        jax.ShapeDtypeStruct(size, dtype)
        for size, dtype in [
            ((Y, B, S, 512), jnp.bfloat16),
            ((Y, B, 64, S), jnp.bfloat16),
            ((B,), jnp.int32),
            ((B, tokens, N, 512), jnp.bfloat16),
            ((B, tokens, N, 64), jnp.bfloat16),
        ]
    )
    arguments = latent, rope, lengths, q_latent, q_rope
    compiled = compile_for_tpu(topology, decode_loop, *arguments, donate_argnums=(0, 1))
    memory, cache = compiled.memory_analysis(), Y * B * S * 576 * 2
    assert memory.alias_size_in_bytes >= cache
    assert memory.argument_size_in_bytes < 1.01 * cache  # no padding
    assert memory.temp_size_in_bytes < 0.02 * cache
    copies = [line for line in compiled.as_text().splitlines() if " copy" in line]
    assert not [line for line in copies if f"[{Y},{B},{S},5" in line]
    assert not [line for line in copies if f"[{Y},{B},64,{S}]" in line]


def test_a_decode_loop_copies_no_cache():
    copies_nothing("v6e:2x2", 1)


@pytest.mark.aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_no_decode_loop_copies_a_cache(topology, tokens):
    copies_nothing(topology, tokens)


def test_every_kernel_has_an_estimate():
    """Of full rows."""
    q_latent, q_rope, latent, rope, lengths = shapes("v3", jnp.bfloat16)
    traced = jax.make_jaxpr(decode_loop)(latent, rope, lengths, q_latent, q_rope)
    costs = {
        equation.params["name"]: equation.params["cost_estimate"]
        for equation in pallas_calls(traced.jaxpr)
    }
    B, T, N, S = MODELS["v3"]
    assert costs["mla_decode"].flops == 2 * B * S * T * N * (512 + 64 + 512)
    assert costs["mla_decode"].bytes_accessed > B * S * 576 * 2
    assert costs["mla_append"].bytes_accessed == 2 * B * 64 * 128 * 2
    assert pl.CostEstimate(**vars(costs["mla_decode"]))
