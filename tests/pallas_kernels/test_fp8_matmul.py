"""Block-scaled FP8: the quantisers; products against float64 of what the scales and
values mean; the compiled Hopper kernel, and its results on a GPU (`pytest -m gpu`).
"""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import fp8 as published
from pallas_kernels.fp8_matmul import (
    fp8_matmul,
    grouped_fp8_matmul,
    quantize_blocks,
    quantize_rows,
)
from pallas_kernels.fp8_matmul.quantize import LEAST, dequantize
from pallas_kernels.grouped_matmul.tiles_gpu import place, schedule, tile_count
from tests.pallas_kernels.h200 import compile_for_h200

QUANTISERS = {"rows": (quantize_rows, 1), "blocks": (quantize_blocks, 128)}
# The matrix unit's own sums of 128 FP8 products have fewer bits than float32.
CASES = [  # implementation, dtype, tolerance
    ("reference", "float32", 2e-6),
    pytest.param("hopper", "float32", 3e-4, marks=pytest.mark.gpu),
    pytest.param("hopper", "bfloat16", 3e-3, marks=pytest.mark.gpu),
]
SIZES = {
    "uneven": [100, 0, 150, 31],
    "one has all": [0, 0, 300, 0],
    "tiny ones": [1, 2, 3, 7, 129, 0, 65, 50],
    "one more than tiles": [129, 0, 1, 0],
    "surplus rows": [3, 0, 120, 8],
    "none": [0, 0, 0, 0],
    "many rows": [1500, 700],  # pairs of blocks
}


def tiles(array, tall):
    """Every tile of the last two axes, by hand: index of its scale, and slices."""
    rows, columns = array.shape[-2:]
    for r in range(0, rows, tall):
        for c in range(0, columns, 128):
            here = (..., slice(r, r + tall), slice(c, c + 128))
            yield (..., r // tall, c // 128), here


def expected(x, x_scale, w, w_scale):
    """In float64, the scales spread by hand."""
    wide = []
    for q, scale, tall in ((x, x_scale, 1), (w, w_scale, 128)):
        values = np.asarray(q.astype(jnp.float32), np.float64)
        scale = np.asarray(scale, np.float64)
        for index, here in tiles(values, tall):
            values[here] *= scale[index][..., None, None]
        wide.append(values)
    return wide[0] @ np.swapaxes(wide[1], -1, -2)


def operands(rng, M, N, K, groups=()):
    """Quantised, of scales that differ by far from tile to tile."""
    x = (
        rng.standard_normal((M, K))
        * np.exp(rng.normal(size=(M, K // 128 + 1)))[:, np.arange(K) // 128]
    )
    w = rng.standard_normal((*groups, N, K))
    for index, here in tiles(w, 128):
        w[here] *= np.exp(rng.normal(size=w[index].shape))[..., None, None]
    x, w = (jnp.asarray(a, jnp.float32) for a in (x, w))
    return *quantize_rows(x), *quantize_blocks(w)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tile", [128, 256])
def test_every_row_is_in_one_tile(sizes, tile):
    surplus = 23
    M = sum(sizes) + surplus
    tiles, owner = schedule(jnp.asarray(sizes), M, tile), np.full(M, -1)
    for number in range(int(tile_count(tiles, M, tile))):
        group, start, count = place(tiles, number, tile)
        rows = slice(int(start), int(start + count))
        assert count > 0
        assert (owner[rows] == -1).all()
        owner[rows] = group
    groups = np.repeat(range(len(sizes) + 1), [*sizes, surplus])
    np.testing.assert_array_equal(owner, groups)


def relative_error(found, exact):
    found = np.asarray(found.astype(jnp.float32), np.float64)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("shape", [(256, 384), (129, 200), (3, 130, 70)], ids=str)
def test_quantised_values_and_scales(rng, name, shape):
    quantise, tall = QUANTISERS[name]
    a = rng.standard_normal(shape).astype(np.float32)
    a[..., :tall, :128] *= 1e4
    q, scale = quantise(jnp.asarray(a))
    rows, columns = shape[-2:]
    assert q.shape == shape and q.dtype == jnp.float8_e4m3fn
    assert scale.shape == (*shape[:-2], -(-rows // tall), -(-columns // 128))
    assert scale.dtype == jnp.float32
    back, values = np.asarray(dequantize(q, scale)), np.asarray(q.astype(jnp.float32))
    for index, here in tiles(a, tall):
        s = np.asarray(scale)[index]
        np.testing.assert_allclose(s, np.abs(a[here]).max((-2, -1)) / 448, rtol=1e-6)
        np.testing.assert_array_equal(np.abs(values[here]).max((-2, -1)), 448)
        s = s[..., None, None]
        np.testing.assert_array_equal(back[here], values[here] * s)
        # Three bits of mantissa, and below 2**-6 steps of 2**-9.
        bound = np.maximum(np.abs(a[here]) * 2**-4, s * 2**-10)
        assert (np.abs(back[here] - a[here]) <= bound * (1 + 1e-6)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(64, 128), (1001, 384), (3, 50, 1024)], ids=str)
def test_the_kernel_quantises_as_plain_jax_does(rng, shape, dtype):
    a = rng.standard_normal(shape) * np.exp(3 * rng.normal(size=(*shape[:-1], 1)))
    a[..., 0, :128] = 0
    a = jnp.asarray(a, dtype)
    q, scale = quantize_rows(a, implementation="hopper")
    _, expected_scale = quantize_rows(a, implementation="reference")
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    values = np.asarray(a.astype(jnp.float32))
    back, step = np.asarray(dequantize(q, scale)), np.repeat(scale, 128, axis=-1)
    # Half a step of three bits of mantissa, and of 2**-9 below 2**-6.
    bound = np.maximum(np.abs(values) * 2**-4, step * 2**-10) * (1 + 1e-6)
    assert (np.abs(back - values) <= bound).all()


@pytest.mark.parametrize("name", QUANTISERS)
def test_zeros_and_small_values_stay_finite(name):
    quantise, _ = QUANTISERS[name]
    a = jnp.zeros((130, 256)).at[0, 130].set(LEAST / 2)
    back = dequantize(*quantise(a))
    np.testing.assert_allclose(back, a, rtol=2**-4)


def test_blocks_are_those_of_published_checkpoints(rng):
    w = jnp.asarray(rng.standard_normal((200, 300)), jnp.float32)
    q, scale = quantize_blocks(w)
    options = {"first_row": 0, "block": (128, 128), "dtype": np.dtype(np.float32)}
    loaded = published.dequantise(np.asarray(q), np.asarray(scale), **options)
    np.testing.assert_array_equal(loaded, dequantize(q, scale))


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"), [("reference", "bfloat16", 3e-3), *CASES]
)
@pytest.mark.parametrize(
    "shape", [(256, 128, 384), (136, 272, 528), (100, 208, 144)], ids=str
)
def test_dense(rng, implementation, dtype, tolerance, shape):
    args = operands(rng, *shape)
    y = fp8_matmul(*args, dtype=dtype, implementation=implementation)
    assert y.dtype == dtype
    assert relative_error(y, expected(*args)) < tolerance


@pytest.mark.parametrize(("implementation", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped(rng, implementation, dtype, tolerance, sizes):
    M = max(300, sum(sizes) + 20)
    x, x_scale, w, w_scale = operands(rng, M, 144, 272, (len(sizes),))
    y = grouped_fp8_matmul(
        *(x, x_scale, w, w_scale, jnp.asarray(sizes)),
        dtype=dtype,
        implementation=implementation,
    )
    assert y.dtype == dtype
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        if size:
            exact = expected(x[rows], x_scale[rows], w[group], w_scale[group])
            assert relative_error(y[rows], exact) < tolerance
        start += size
    assert not np.asarray(y[start:].astype(jnp.float32)).any()


@pytest.mark.gpu
@pytest.mark.parametrize("K", [384, 1536])
def test_tiles_before_and_after_those_of_surplus_rows(rng, K):
    """17 tiles side by side are walked in two bands, each with rows of no group."""
    x, x_scale, w, w_scale = operands(rng, 4096, 17 * 256, K, (2,))
    y = grouped_fp8_matmul(
        *(x, x_scale, w, w_scale, jnp.asarray([700, 300])), implementation="hopper"
    )
    first = expected(x[:700], x_scale[:700], w[0], w_scale[0])
    assert relative_error(y[:700], first) < 3e-3
    second = expected(x[700:1000], x_scale[700:1000], w[1], w_scale[1])
    assert relative_error(y[700:1000], second) < 3e-3
    assert not np.asarray(y[1000:].astype(jnp.float32)).any()


def test_sizes_beyond_the_rows_end_with_them(rng):
    args = operands(rng, 64, 128, 128, (2,))
    cut = grouped_fp8_matmul(*args, jnp.asarray([40, 24]))
    beyond = grouped_fp8_matmul(*args, jnp.asarray([40, 1000]))
    np.testing.assert_array_equal(cut, beyond)


def test_partial_sums_are_scaled_every_128():
    """Blocks whose sums cancel only once they are scaled: 448 * 448 * 128 each."""
    x = jnp.full((1, 256), 448.0).astype(jnp.float8_e4m3fn)
    x_scale = jnp.asarray([[1.0, 2.0**-20]])
    w = jnp.concatenate([x, -x], axis=1)[:, 128:384]
    w_scale = jnp.asarray([[2.0**-20, 1.0]])
    y = fp8_matmul(x, x_scale, w, w_scale, dtype="float32")
    assert y.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((32, 256))}, "float32.*not both float8_e4m3fn"),
        ({"x_scale": jnp.ones((32, 1))}, r"\(32, 1\) is not \(32, 2\)"),
        ({"x_scale": jnp.ones((32, 2), jnp.bfloat16)}, "bfloat16.*not float32"),
        ({"w_scale": jnp.ones((2, 2, 2))}, r"\(2, 2, 2\) is not \(3, 2, 2\)"),
        ({"w": jnp.ones((3, 144, 128), jnp.float8_e4m3fn)}, "last axes.*256.*128"),
        ({"w": jnp.ones((144, 256), jnp.float8_e4m3fn)}, "ranks.*not 2 and 3"),
        ({"sizes": jnp.ones(2, jnp.int32)}, r"\(2,\) is not one for each group"),
        ({"sizes": jnp.ones(3)}, "float32.*no integer"),
        ({"dtype": jnp.float16}, "float16.*neither"),
        ({"implementation": "fast"}, "'fast' is not one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_values(change, message):
    operands = {
        "x": jnp.ones((32, 256), jnp.float8_e4m3fn),
        "x_scale": jnp.ones((32, 2)),
        "w": jnp.ones((3, 144, 256), jnp.float8_e4m3fn),
        "w_scale": jnp.ones((3, 2, 2)),
        "sizes": jnp.ones(3, jnp.int32),
    }
    options = {k: v for k, v in change.items() if k not in operands}
    with pytest.raises(ValueError, match=message):
        changed = {name: change.get(name, array) for name, array in operands.items()}
        inspect.unwrap(grouped_fp8_matmul)(*changed.values(), **options)


def test_what_the_kernel_does_not_take_is_said():
    q, scale = quantize_rows(jnp.ones((128, 200)))
    with pytest.raises(NotImplementedError, match=r"that 16 divides.*\(128, 200\)"):
        fp8_matmul(q, scale, q, scale[:1], implementation="hopper")


@pytest.mark.parametrize("shape", [(63, 128), (64, 200)], ids=str)
def test_what_the_quantiser_does_not_take_is_said(shape):
    with pytest.raises(NotImplementedError, match=r"64 rows.*128 divides.*shape="):
        quantize_rows(jnp.ones(shape), implementation="hopper")
    with pytest.raises(NotImplementedError, match=r"takes bfloat16.*float16"):
        quantize_rows(jnp.ones((64, 128), jnp.float16), implementation="hopper")
    with pytest.raises(ValueError, match="'fast' is not one of"):
        quantize_rows(jnp.ones((64, 128)), implementation="fast")


COMPILE = """
from pallas_kernels.fp8_matmul import fp8_matmul, grouped_fp8_matmul, quantize_rows

FP8 = jnp.float8_e4m3fn


def compile_quantiser(rows, columns, dtype):
    jax.jit(quantize_rows).lower(shape(rows, columns, dtype=dtype)).compile()


def compile(M, N, K, groups, dtype):
    n, k, g = -(-N // 128), -(-K // 128), () if groups is None else (groups,)
    operands = [
        shape(M, K, dtype=FP8),
        shape(M, k, dtype=jnp.float32),
        shape(*g, N, K, dtype=FP8),
        shape(*g, n, k, dtype=jnp.float32),
    ]
    if g:
        operands.append(shape(*g, dtype=jnp.int32))
    function = grouped_fp8_matmul if g else fp8_matmul
    run = jax.jit(lambda *a: function(*a, dtype=dtype))
    run.lower(*operands).compile()

for case in {shapes}:
    compile(*case)
compile_quantiser(1001, 7168, jnp.bfloat16)
compile_quantiser(1024, 384, jnp.float32)
"""
SHAPES = [  # M, N, K, groups, dtype
    (4096, 576, 7168, None, "bfloat16"),  # V3's latent and rotary part: cut blocks
    (2048, 144, 272, 3, "float32"),
]
MORE = [
    (4096, 4096, 7168, None, "bfloat16"),
    (100, 128, 144, None, "float32"),
    (32768, 4096, 7168, 8, "bfloat16"),  # pairs of blocks
]


@pytest.mark.parametrize(
    "shapes", [SHAPES, pytest.param(MORE, marks=pytest.mark.aot)], ids=["some", "more"]
)
def test_compiles_for_an_h200_without_spills(shapes):
    kernels = len(shapes) + 2
    assert len(compile_for_h200(COMPILE.format(shapes=shapes)).spills) == kernels
