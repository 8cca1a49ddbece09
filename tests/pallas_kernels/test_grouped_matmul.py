"""The grouped matmul against a loop over groups, and the work it compiles to."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.reference import block_count, block_rows

SIZES = {
    "uneven": [5, 40, 0, 11],
    "one group has all": [0, 0, 56, 0],
    "surplus rows": [3, 0, 20, 8],
    "no rows": [0, 0, 0, 0],
    "single rows": [1, 1, 1, 1],
}


def loop_over_groups(x, w, sizes):
    out, start = np.zeros((x.shape[0], w.shape[1])), 0
    for group, size in enumerate(sizes):
        out[start : start + size] = x[start : start + size] @ w[group].T
        start += size
    return out


@pytest.fixture
def operands(rng):
    x = rng.standard_normal((56, 24)).astype(np.float32)
    w = rng.standard_normal((4, 32, 24)).astype(np.float32)
    return x, w


@pytest.mark.parametrize("implementation", ["blocked", "padded", "ragged_dot", None])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_loop_over_groups(operands, sizes, implementation):
    x, w = operands
    got = jax.jit(grouped_matmul, static_argnames="implementation")(
        x, w, jnp.asarray(sizes), implementation=implementation
    )
    expected = loop_over_groups(x.astype(np.float64), w.astype(np.float64), sizes)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("implementation", ["blocked", "padded"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_equal_loop_over_groups(operands, sizes, implementation, rng):
    x, w = operands
    dy = rng.standard_normal((56, 32)).astype(np.float32)

    def value(x, w):
        y = grouped_matmul(x, w, jnp.asarray(sizes), implementation=implementation)
        return (y * dy).sum()

    dx, dw = jax.jit(jax.grad(value, argnums=(0, 1)))(x, w)
    expected_dx, expected_dw, start = np.zeros(x.shape), np.zeros(w.shape), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        expected_dx[rows] = dy[rows].astype(np.float64) @ w[group]
        expected_dw[group] = dy[rows].T.astype(np.float64) @ x[rows]
        start += size
    np.testing.assert_allclose(dx, expected_dx, atol=3e-5)
    np.testing.assert_allclose(dw, expected_dw, atol=3e-5)


def test_bfloat16_accumulates_in_float32(rng):
    """256 terms of bf16 products: a bf16 running sum would be off by far more."""
    x = jnp.asarray(rng.standard_normal((16, 256)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((2, 8, 256)), jnp.bfloat16)
    got = grouped_matmul(x, w, jnp.asarray([9, 7]))
    assert got.dtype == jnp.bfloat16
    expected = loop_over_groups(np.float64(x), np.float64(w), [9, 7])
    np.testing.assert_allclose(np.float64(got), expected, rtol=2**-8, atol=1e-2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads XLA:CPU's program")
def test_compiled_work_follows_the_rows():
    """At 64 experts: FLOPs of the loop body, times its blocks, against rows alone."""
    rows, groups, inner, outer = 4096, 64, 64, 128
    sizes = np.random.default_rng(0).multinomial(rows, np.ones(groups) / groups)
    x, w = jnp.zeros((rows, inner)), jnp.zeros((groups, outer, inner))
    compiled = jax.jit(grouped_matmul).lower(x, w, jnp.asarray(sizes)).compile()
    dots = re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", compiled.as_text())
    b = block_rows(rows, groups)
    assert [tuple(map(int, dot)) for dot in dots] == [(b, outer)]
    # The body is counted once; everything outside the dot is a few integers a block.
    body = compiled.cost_analysis()["flops"]
    assert body < 1.2 * 2 * b * inner * outer
    total = 2 * b * inner * outer * int(block_count(jnp.asarray(sizes), b))
    assert total < 1.35 * 2 * rows * inner * outer


@pytest.mark.parametrize(
    ("x", "w", "sizes", "message"),
    [
        ((4, 3), (2, 5, 4), (2,), "last axes"),
        ((4, 3), (2, 5, 3), (3,), "groups"),
        ((4, 3, 1), (2, 5, 3), (2,), "ranks"),
    ],
)
def test_bad_shapes_are_named(x, w, sizes, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(grouped_matmul)(  # beneath the shape check of the tests
            jnp.zeros(x), jnp.zeros(w), jnp.zeros(sizes, jnp.int32)
        )


def test_unknown_implementation_is_named(operands):
    with pytest.raises(ValueError, match="'cuda'"):
        x, w = map(jnp.asarray, operands)
        grouped_matmul(x, w, jnp.asarray([1, 2, 3, 4]), implementation="cuda")
