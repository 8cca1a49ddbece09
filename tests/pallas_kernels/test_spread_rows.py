"""Spreading rows: plain JAX anywhere, the kernel compiled anywhere and run on a GPU."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.spread_rows import pallas_gpu, spread_rows
from tests.pallas_kernels.h200 import compile_for_h200
from tests.pallas_kernels.interpret_gpu import interpreted

bf16, f32 = jnp.bfloat16, jnp.float32
SHAPES = [  # N, R, M, D: many steps a block, few, none for most; several lines and halves
    (32768, 7, 229376, 1280, bf16),
    (1001, 3, 6001, 128, f32),
    (7, 1, 5, 256, bf16),
    (300, 8, 4000, 7168, bf16),
]


def operands(N, R, M, D, dtype):
    """Rows with all, some and none of their places; places with a row and without."""
    rng = np.random.default_rng(N)
    places = rng.permutation(N * R + M // 5 + 2)[: N * R].astype(np.int32)
    places = np.where(rng.random(N * R) < 0.9, places, M + places).reshape(N, R)
    row = np.full(M, N, np.int32)
    n, r = np.nonzero(places < M)
    row[places[n, r]] = n
    row = np.where(row < N, row, N + rng.integers(0, 3, M)).astype(np.int32)
    x = jnp.asarray(rng.standard_normal((N, D)), dtype)
    return x, jnp.asarray(places), jnp.asarray(row)


def by_hand(x, places, row):
    """Row after row, by `places` alone."""
    x, spread = np.asarray(x), np.zeros((len(row), x.shape[1]), x.dtype)
    for here in np.asarray(places).T:
        inside = here < len(row)
        spread[here[inside]] = x[inside]
    return spread


SMALL = (50, 3, 140, 24)


@pytest.mark.parametrize("implementation", ["reference", "pairs", None])
@pytest.mark.parametrize("dtype", [bf16, f32])
def test_equals_numpy(dtype, implementation):
    x, places, row = operands(*SMALL, dtype)
    expected = by_hand(x, places, row)
    assert (np.asarray(row) >= 50).sum() > 5 and np.count_nonzero(expected) > 90 * 24
    found = spread_rows(x, places, row, implementation=implementation)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [bf16, f32])
def test_interpreted(monkeypatch, dtype):
    """Barriers and copies in any order, without a GPU; blocks have more steps than slots."""
    monkeypatch.setattr(pallas_gpu, "SMS", 1)
    x, places, row = operands(150, 2, 330, 128, dtype)
    with interpreted():
        found = jax.block_until_ready(pallas_gpu.spread_rows(x, places, row))
    np.testing.assert_array_equal(found, by_hand(x, places, row))


COMPILE = """
from pallas_kernels.spread_rows import spread_rows

N, R, M, D = {sizes}
operands = (
    shape(N, D, dtype=jnp.{dtype}),
    shape(N, R, dtype=jnp.int32),
    shape(M, dtype=jnp.int32),
)
compiled = jax.jit(spread_rows).lower(*operands).compile()
print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
"""


@pytest.mark.parametrize(
    "shape",
    [SHAPES[0], *(pytest.param(s, marks=pytest.mark.aot) for s in SHAPES[1:])],
    ids=str,
)
def test_compiles_for_an_h200_without_spills(shape):
    *sizes, dtype = shape
    program = COMPILE.format(sizes=sizes, dtype=jnp.dtype(dtype).name)
    assert "kernels: 1" in compile_for_h200(program).printed


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_numpy_on_the_gpu(shape):
    """Where outputs come to lie, there were NaNs before."""
    x, places, row = operands(*shape)
    run = jax.jit(spread_rows, static_argnames="implementation")
    expected = by_hand(x, places, row)
    for _ in range(3):
        jnp.full(expected.shape, jnp.nan, x.dtype).block_until_ready()
        found = run(x, places, row, implementation="hopper")
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("x", "places", "row", "message"),
    [
        ((4, 2, 128), (4, 1), (3,), r"ranks of x_ND.shape=\(4, 2, 128\)"),
        ((4, 128), (4,), (3,), r"places_NR.shape=\(4,\)"),
        ((4, 128), (3, 1), (3,), r"places_NR.shape=\(3, 1\) has not the rows"),
    ],
)
def test_bad_shapes_are_named(x, places, row, message):
    operand = jnp.ones(x), jnp.ones(places, int), jnp.ones(row, int)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(spread_rows)(*operand)


def test_an_index_that_is_no_integer_is_named():
    operand = jnp.ones((4, 128)), jnp.ones((4, 1)), jnp.arange(3)
    with pytest.raises(ValueError, match=r"float32 of \(4, 1\) is no integer type"):
        inspect.unwrap(spread_rows)(*operand)


def test_unknown_implementation_is_named():
    operand = jnp.ones((4, 128)), jnp.ones((4, 1), int), jnp.arange(3)
    with pytest.raises(ValueError, match="'other' is not one of"):
        spread_rows(*operand, implementation="other")


@pytest.mark.parametrize(
    ("shape", "most", "dtype", "message"),
    [
        ((4, 100), 1, f32, r"128 divides \(\(4, 100\)\)"),
        ((4, 128), 1, jnp.float8_e4m3fn, "16 or 32 bits"),
        ((4, 2**16), 1, bf16, "shorter rows"),
        ((4, 128), 80, bf16, "fewer places of each"),
        ((0, 128), 1, bf16, "no empty operands"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(shape, most, dtype, message):
    operand = jnp.ones(shape, dtype), jnp.ones((shape[0], most), int), jnp.arange(3)
    with pytest.raises(NotImplementedError, match=message):
        spread_rows(*operand, implementation="hopper")
