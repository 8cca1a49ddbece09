"""MLA decoding on latents in FP8: their quantisation, the reference, and what is refused,
anywhere; the Hopper kernel's compiled code, on any machine; its results, on a GPU.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels.mla_decode import mla_decode, quantize_latents
from pallas_kernels.mla_decode.fp8_gpu import lacks
from tests.pallas_kernels.h200 import compile_for_h200
from tests.pallas_kernels.test_mla_decode import CASES, SCALE, L, by_hand, operands
from tests.pallas_kernels.test_mla_decode_gpu import ALL, ON_A_GPU

E4M3 = jnp.float8_e4m3fn


def test_quantised_rows_are_within_half_a_step(rng):
    """Of e4m3's 3 bits, or below its normal numbers of 2^-9 of the scale."""
    x = rng.standard_normal((4, 7, 512)) * np.exp(3 * rng.standard_normal((4, 7, 1)))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    codes, scale = quantize_latents(jnp.asarray(x, jnp.bfloat16))
    assert codes.dtype == E4M3 and scale.dtype == jnp.float32
    assert codes.shape == x.shape and scale.shape == x.shape[:2]
    scale = np.asarray(scale, np.float64)[..., None]
    error = np.abs(np.asarray(codes, np.float64) * scale - x)
    assert (error <= np.maximum(2**-4 * np.abs(x), 2**-10 * scale)).all()
    assert error.max() > 0  # else nothing was rounded


def test_scales_are_the_lowest_powers_of_two():
    largest = np.array([0.0, 1.0, 447.9, 448.0, 448.1, 1e-25, 1e30])
    x = jnp.asarray(largest)[:, None] * jnp.array([1.0, -0.5])
    codes, scale = quantize_latents(x)
    exponents = np.log2(np.asarray(scale, np.float64))
    np.testing.assert_array_equal(exponents, np.round(exponents))
    some = largest > 0
    assert (largest <= 448 * np.asarray(scale)).all()
    assert (largest > 224 * np.asarray(scale))[some].all()
    assert np.isfinite(np.asarray(codes, np.float64)).all()
    np.testing.assert_array_equal(np.asarray(codes[0], np.float64), 0)


def test_bfloat16_holds_what_comes_back(rng):
    codes, scale = quantize_latents(jnp.asarray(rng.standard_normal((64, 512))))
    exact = codes.astype(jnp.float32) * scale[:, None]
    assert (exact.astype(jnp.bfloat16).astype(jnp.float32) == exact).all()


def narrow(arrays):
    """With latents quantised: (arrays, their scales, arrays of the values they stand
    for).
    """
    q, q_rope, latent, *others = arrays
    codes, scale = quantize_latents(latent)
    meant = codes.astype(jnp.float32) * scale[..., None]
    return (q, q_rope, codes, *others), scale, (q, q_rope, meant, *others)


def call(arrays, scale, implementation=None):
    *arrays, pages = arrays

    @jax.jit
    def compiled(arrays, pages, scale):
        return mla_decode(
            *arrays,
            layer=jnp.int32(1),
            scale=SCALE,
            pages_BP=pages,
            latent_scale_YXZ=scale,
            implementation=implementation,
        )

    return compiled(arrays, pages, scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("implementation", ["reference", None])
def test_equals_the_definition(rng, implementation, case):
    arrays, scale, meant = narrow(operands(rng, case, jnp.float32))
    got = call(arrays, scale, implementation)
    for found, expected in zip(got, by_hand(*meant)):
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_cut_by_a_mesh(rng):
    """Rows and heads over four devices, scales with the rows."""
    case = (2, 4, 256, None, [200, 256])
    arrays, scale, meant = narrow(operands(rng, case, jnp.float32))
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    P = jax.P
    cut = [P("a", None, "b"), P("a", None, "b"), P(None, "a"), P(None, "a"), P("a")]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, spec) for x, spec in zip(arrays, cut)]
        out, lse = call((*placed, None), jax.device_put(scale, P(None, "a")))
        assert out.sharding.spec[:3] == lse.sharding.spec[:3] == ("a", None, "b")
    np.testing.assert_allclose(out, by_hand(*meant)[0], atol=5e-6)


@pytest.mark.parametrize(
    ("dtype", "scale", "implementation", "error", "words"),
    [
        (E4M3, None, None, ValueError, "latents of float8_e4m3fn, scales: none"),
        (jnp.float32, (2, 3, 256), None, ValueError, r"scales: \(2, 3, 256\)"),
        (E4M3, (2, 3, 128), None, ValueError, r"scales of \(2, 3, 128\), float32"),
        (E4M3, "f2", None, ValueError, r"\(2, 3, 256\), float16"),
        (E4M3, (2, 3, 256), "pallas_tpu", NotImplementedError, "float8_e4m3fn"),
        (E4M3, (2, 3, 256), "pallas_gpu", NotImplementedError, "float32"),
    ],
)
def test_bad_input_is_named(dtype, scale, implementation, error, words):
    shapes = (3, 1, 4, L), (3, 1, 4, 16), (2, 3, 256, L), (2, 3, 16, 256)
    arrays = [jnp.zeros(shape) for shape in shapes]
    arrays[2] = arrays[2].astype(dtype)
    if scale == "f2":
        scale = jnp.zeros((2, 3, 256), "f2")
    elif scale is not None:
        scale = jnp.zeros(scale)
    with pytest.raises(error, match=words):
        # beneath the shape check of the tests
        inspect.unwrap(mla_decode)(
            *(*arrays, jnp.zeros(3, jnp.int32)),
            layer=0,
            scale=1.0,
            latent_scale_YXZ=scale,
            implementation=implementation,
        )


def test_what_the_kernel_does_not_take_is_said():
    def words(*, q=(2, 1, 16, 512), cache=(1, 2, 128, 512), dtype=E4M3):
        queries = [jnp.zeros((*q[:3], size), jnp.bfloat16) for size in (q[3], 64)]
        rope = jnp.zeros((*cache[:2], 64, cache[2]), jnp.bfloat16)
        return lacks(*queries, jnp.zeros(cache, dtype), rope)

    assert words() == words(q=(2, 4, 128, 512)) == ""
    assert "bfloat16, float8_e5m2" in words(dtype=jnp.float8_e5m2)
    assert "rows or pages of 100 slots" in words(cache=(1, 2, 100, 512))
    assert "1 tokens of 12 heads" in words(q=(2, 1, 12, 512))


# --- compiled for a GPU

COMPILE = """
from pallas_kernels.mla_decode import mla_decode


def decode(q, q_rope, latent, rope, lengths, layer, scale, *pages):
    pages = pages[0] if pages else None
    return mla_decode(
        q, q_rope, latent, rope, lengths, layer=layer, scale=0.1, pages_BP=pages,
        latent_scale_YXZ=scale,
    )


for B, T, N, Z, P in {cases}:
    X = B * (P or 1)
    table = [shape(B, P, dtype=jnp.int32)] if P else []
    compiled = jax.jit(decode).lower(
        shape(B, T, N, 512), shape(B, T, N, 64),
        shape(3, X, Z, 512, dtype=jnp.float8_e4m3fn), shape(3, X, 64, Z),
        shape(B, dtype=jnp.int32), shape(dtype=jnp.int32),
        shape(3, X, Z, dtype=jnp.float32), *table,
    ).compile()
    cache = 3 * X * Z * 644
    assert compiled.memory_analysis().temp_size_in_bytes < max(0.1 * cache, 80 << 20)
    print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
"""


def compiles(*cases):
    report = compile_for_h200(COMPILE.format(cases=[ALL[case] for case in cases]))
    assert report.printed.count("kernels: 2") == len(cases)
    assert len(report.spills) > len(cases)


def test_compiles_for_an_h200_without_spills():
    compiles("v3", "v2-lite, three tokens, pages")


@pytest.mark.aot
@pytest.mark.parametrize("case", ALL)
def test_compiles_everything_for_an_h200(case):
    compiles(case)


# --- on a GPU


def as_rounded(codes, scale):
    """What the kernel multiplies: a scale that is no power of two is rounded to float16,
    and so is its product with a value.
    """
    scale = np.asarray(scale, np.float16)[..., None]
    return jnp.asarray(np.asarray(codes, np.float16) * scale, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False], ids=["powers of two", "any scales"])
@pytest.mark.parametrize("case", ON_A_GPU.values(), ids=ON_A_GPU)
def test_equals_the_definition_on_the_gpu(rng, case, exact):
    """What nobody sees is NaN: behind the lengths, and in the other layer."""
    tokens, heads, slots, pages, lengths = case
    B = len(lengths)
    X = B * (pages or 1)
    sizes = (B, tokens, heads, 512), (B, tokens, heads, 64), (2, X, slots, 512)
    arrays = [rng.standard_normal(size) for size in (*sizes, (2, X, 64, slots))]
    arrays[2] *= np.exp(0.3 * rng.standard_normal((2, X, slots, 1)))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    if pages is not None:
        pages = jnp.asarray(rng.permutation(X).reshape(B, -1), jnp.int32)
    arrays += [jnp.asarray(lengths, jnp.int32), pages]
    arrays, scale, meant = narrow(arrays)
    if not exact:
        factor = jnp.asarray(rng.uniform(0.7, 1.4, scale.shape), jnp.float32)
        scale = scale * factor
        meant = (*meant[:2], as_rounded(arrays[2], scale), *meant[3:])
    expected, expected_lse = by_hand(*meant)
    if pages is None:
        behind = jnp.arange(slots) >= jnp.asarray(lengths)[:, None]
        behind = jnp.stack([jnp.ones_like(behind), behind])
        q, q_rope, codes, rope, *others = arrays
        codes = jnp.where(behind[..., None], jnp.nan, codes.astype(jnp.bfloat16))
        rope = jnp.where(behind[:, :, None], jnp.nan, rope)
        arrays = (q, q_rope, codes.astype(E4M3), rope, *others)
        scale = jnp.where(behind, jnp.nan, scale)
    empty = np.isneginf(expected_lse)
    for _ in range(3):  # a race would differ from run to run
        out, lse = map(np.asarray, call(arrays, scale, "pallas_gpu"))
        error = np.linalg.norm(out.astype(np.float64) - expected)
        assert error <= 3e-3 * np.linalg.norm(expected)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
        assert (out[empty] == 0).all()
