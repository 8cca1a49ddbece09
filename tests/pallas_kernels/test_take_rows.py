"""Taking rows: plain JAX anywhere, the kernel compiled anywhere and run on a GPU."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.take_rows import take_rows
from tests.pallas_kernels.h200 import compile_for_h200

bf16, f32 = jnp.bfloat16, jnp.float32
SHAPES = [  # N, M, D: many steps a block, few, none for most; several lines and halves
    (32768, 229376, 1280, bf16),
    (100, 6001, 128, f32),
    (7, 5, 256, bf16),
    (300, 4000, 7168, bf16),
]


def operands(N, M, D, dtype):
    """Some of the indices are past the end, by one and by many."""
    rng = np.random.default_rng(N)
    index = rng.integers(0, N + N // 5 + 2, M).astype(np.int32)
    x = jnp.asarray(rng.standard_normal((N, D)), dtype)
    return x, jnp.asarray(index)


def by_hand(x, index):
    x, index = np.asarray(x), np.asarray(index)
    return np.where((index < len(x))[:, None], x[index % len(x)], 0)


@pytest.mark.parametrize("implementation", ["reference", "pairs", None])
@pytest.mark.parametrize("shape", [(50, 70, 24, bf16), (50, 70, 24, f32)], ids=str)
def test_equals_numpy(shape, implementation):
    x, index = operands(*shape)
    found = take_rows(x, index, implementation=implementation)
    np.testing.assert_array_equal(found, by_hand(x, index))


COMPILE = """
from pallas_kernels.take_rows import take_rows

N, M, D = {sizes}
operands = shape(N, D, dtype=jnp.{dtype}), shape(M, dtype=jnp.int32)
compiled = jax.jit(take_rows).lower(*operands).compile()
print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
"""


@pytest.mark.parametrize(
    ("N", "M", "D", "dtype"),
    [SHAPES[0], *(pytest.param(*s, marks=pytest.mark.aot) for s in SHAPES[1:])],
    ids=str,
)
def test_compiles_for_an_h200_without_spills(N, M, D, dtype):
    program = COMPILE.format(sizes=(N, M, D), dtype=jnp.dtype(dtype).name)
    assert "kernels: 1" in compile_for_h200(program).printed


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "M", "D", "dtype"), SHAPES, ids=str)
def test_equals_numpy_on_the_gpu(N, M, D, dtype):
    x, index = operands(N, M, D, dtype)
    run = jax.jit(take_rows, static_argnames="implementation")
    for _ in range(3):
        found = run(x, index, implementation="hopper")
        np.testing.assert_array_equal(found, by_hand(x, index))


@pytest.mark.parametrize(
    ("x", "index", "message"),
    [
        ((4, 2, 128), (3,), r"ranks of x_ND.shape=\(4, 2, 128\)"),
        ((4, 128), (3, 1), r"index_M.shape=\(3, 1\)"),
    ],
)
def test_bad_shapes_are_named(x, index, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(take_rows)(jnp.ones(x), jnp.ones(index, int))


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'other' is not one of"):
        take_rows(jnp.ones((4, 128)), jnp.arange(3), implementation="other")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((4, 100), f32, r"128 divides \(\(4, 100\)\)"),
        ((4, 128), jnp.float8_e4m3fn, "16 or 32 bits"),
        ((4, 2**16), bf16, "shorter rows"),
        ((0, 128), bf16, "no empty operands"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(shape, dtype, message):
    index = jnp.arange(3)
    with pytest.raises(NotImplementedError, match=message):
        take_rows(jnp.ones(shape, dtype), index, implementation="hopper")
