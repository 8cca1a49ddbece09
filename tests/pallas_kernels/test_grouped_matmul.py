"""The grouped matmul against a loop over groups, and the work it compiles to."""

import contextlib
import functools
import inspect
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import (
    feed_forward,
    grouped_feed_forward,
    grouped_matmul,
    grouped_swiglu,
)
from pallas_kernels.grouped_matmul.api import KEPT
from pallas_kernels.grouped_matmul.reference import block_count, block_rows
from tests.pallas_kernels.interpret import interpreted

IMPLEMENTATIONS = ["blocked", "padded", "ragged_dot", "tpu", None]
F32 = jnp.float32
M, N, K = 300, 640, 256  # for the TPU: two tiles of rows, two unequal ones of columns
SIZES = {
    "uneven": [5, 230, 0, 65],
    "one group has all": [0, 0, 300, 0],
    "surplus rows": [3, 0, 270, 8],
    "surplus tile": [3, 0, 0, 9],
    "no rows": [0, 0, 0, 0],
    "single rows": [1, 1, 1, 1],
    "exact tile": [0, 256, 0, 44],
    "one more": [257, 1, 42, 0],
    "exact chunks": [64, 128, 0, 64],
    "more than there are": [200, 150, 7, 0],
}
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def groups(sizes, rows=M):
    """Each group with its rows, cut where there are no more."""
    ends = np.minimum(np.cumsum(sizes), rows)
    return enumerate(map(slice, [0, *ends[:-1]], ends))


def loop_over_groups(x, w, dy, sizes):
    """The product and both gradients in float64."""
    x, w, dy = wide(x, w, dy)
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, rows in groups(sizes, len(x)):
        y[rows] = x[rows] @ w[group].T
        dx[rows] = dy[rows] @ w[group]
        dw[group] = dy[rows].T @ x[rows]
    return y, dx, dw


@functools.cache
def product_and_gradients(implementation):
    """Compiled once for all sizes."""

    @jax.jit
    def call(x, w, dy, sizes):
        y, back = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation),
            x,
            w,
        )
        return y, *back(dy)

    return call


def run(call, implementation, *operands):
    """On a CPU; TPU kernels are interpreted, and races and stray reads fail."""
    with interpreted() if implementation == "tpu" else contextlib.nullcontext():
        return jax.block_until_ready(call(*operands))


def operands(rng, dtype=jnp.float32, w_dtype=None):
    shapes = (M, K), (4, N, K), (M, N)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, w.astype(w_dtype or dtype), dy


@each_implementation
@each_sizes
def test_equals_loop_over_groups(rng, sizes, implementation):
    x, w, dy = operands(rng)
    call = product_and_gradients(implementation)
    got = run(call, implementation, x, w, dy, jnp.asarray(sizes))
    for array, expected in zip(got, loop_over_groups(x, w, dy, sizes)):
        np.testing.assert_allclose(array, expected, atol=2e-4)
    assert (np.asarray(got[0])[sum(sizes) :] == 0).all()


@pytest.mark.parametrize("implementation", ["blocked", "padded", "tpu"])
def test_surplus_rows_may_hold_anything(rng, implementation):
    sizes = SIZES["surplus rows"]
    x, w, dy = operands(rng)
    nan_x, nan_dy = (a.at[sum(sizes) :].set(jnp.nan) for a in (x, dy))
    call = product_and_gradients(implementation)
    got = run(call, implementation, nan_x, w, nan_dy, jnp.asarray(sizes))
    for array, expected in zip(got, loop_over_groups(x, w, dy, sizes)):
        np.testing.assert_allclose(array, expected, atol=2e-4)


@pytest.mark.parametrize(("N", "K"), [(256, 2304), (2304, 256)])
def test_a_deep_product(rng, N, K):
    """Sums of more than one part of the contracted axis, and of a rest of it."""
    shapes, sizes = [(70, K), (2, N, K), (70, N)], [6, 64]
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), F32) for shape in shapes)
    got = run(product_and_gradients("tpu"), "tpu", x, w, dy, jnp.asarray(sizes))
    for array, expected in zip(got, loop_over_groups(x, w, dy, sizes)):
        np.testing.assert_allclose(array, expected, atol=2e-4)


@each_implementation
def test_bfloat16_is_rounded_once(rng, implementation):
    """Sums of hundreds of terms: a bfloat16 running sum would be off by far more."""
    x, w, dy = operands(rng, jnp.bfloat16)
    sizes = SIZES["uneven"]
    call = product_and_gradients(implementation)
    got = run(call, implementation, x, w, dy, jnp.asarray(sizes))
    for array, expected in zip(got, loop_over_groups(x, w, dy, sizes)):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_allclose(*wide(array, expected), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("implementation", ["blocked", "tpu", None])
def test_gradient_of_float32_weights_is_not_rounded(rng, implementation):
    x, w, dy = operands(rng, jnp.bfloat16, jnp.float32)
    sizes = SIZES["exact chunks"]
    call = product_and_gradients(implementation)
    y, _, dw = run(call, implementation, x, w, dy, jnp.asarray(sizes))
    assert (y.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    *_, expected = loop_over_groups(x, w, dy, sizes)
    np.testing.assert_allclose(dw, expected, atol=1e-4)


def swiglu_by_hand(x, gate, up, scale, dh, sizes):
    """h, dx, dgate, dup, dscale in float64."""
    x, gate, up, scale, dh = wide(x, gate, up, scale, dh)
    h, dx, dgate, dup = map(np.zeros_like, (dh, x, gate, up))
    dscale = np.zeros(len(x))
    for group, rows in groups(sizes, len(x)):
        g, u, s = x[rows] @ gate[group].T, x[rows] @ up[group].T, scale[rows, None]
        sigmoid = 1 / (1 + np.exp(-g))
        h[rows] = g * sigmoid * u * s
        dg = dh[rows] * s * u * sigmoid * (1 + g * (1 - sigmoid))
        du = dh[rows] * s * g * sigmoid
        dx[rows] = dg @ gate[group] + du @ up[group]
        dgate[group], dup[group] = dg.T @ x[rows], du.T @ x[rows]
        dscale[rows] = (dh[rows] * g * sigmoid * u).sum(axis=1)
    return h, dx, dgate, dup, dscale


@functools.cache
def swiglu_and_gradients(implementation):
    @jax.jit
    def call(x, gate, up, scale, dh, sizes):
        def product(x, gate, up, scale):
            return grouped_swiglu(
                x, gate, up, sizes, scale_M=scale, implementation=implementation
            )

        h, back = jax.vjp(product, x, gate, up, scale)
        return h, *back(dh)

    return call


def swiglu_operands(rng, dtype=jnp.float32):
    D, F = 256, 384
    shapes = {(M, D): 1, (4, F, D): D**-0.5, (M,): 1, (M, F): 1}
    x, gate, scale, dh = (
        jnp.asarray(rng.standard_normal(shape) * size, dtype)
        for shape, size in shapes.items()
    )
    up = jnp.asarray(rng.standard_normal(gate.shape) * D**-0.5, dtype)
    return x, gate, up, scale.astype(jnp.float32), dh


@each_implementation
@pytest.mark.parametrize("case", ["uneven", "surplus tile", "more than there are"])
def test_swiglu_equals_its_definition(rng, case, implementation):
    arrays, sizes = swiglu_operands(rng), SIZES[case]
    call = swiglu_and_gradients(implementation)
    got = run(call, implementation, *arrays, jnp.asarray(sizes))
    for array, expected in zip(got, swiglu_by_hand(*arrays, sizes)):
        np.testing.assert_allclose(array, expected, atol=1e-4)


@pytest.mark.parametrize("implementation", ["blocked", "tpu"])
def test_swiglu_in_bfloat16(rng, implementation):
    arrays, sizes = swiglu_operands(rng, jnp.bfloat16), SIZES["uneven"]
    call = swiglu_and_gradients(implementation)
    got = run(call, implementation, *arrays, jnp.asarray(sizes))
    for array, expected in zip(got, swiglu_by_hand(*arrays, sizes)):
        error = np.linalg.norm(np.float64(array) - expected)
        assert error <= 4e-3 * np.linalg.norm(expected)


def test_swiglu_in_one_kernel(rng):
    """Without a gradient to come: the result is rounded once."""
    arrays, sizes = swiglu_operands(rng, jnp.bfloat16), SIZES["uneven"]

    @jax.jit
    def call(x, gate, up, scale, sizes):
        return grouped_swiglu(x, gate, up, sizes, scale_M=scale, implementation="tpu")

    got = run(call, "tpu", *arrays[:4], jnp.asarray(sizes))
    expected, *_ = swiglu_by_hand(*arrays, sizes)
    np.testing.assert_allclose(np.float64(got), expected, rtol=2**-8, atol=1e-3)


def test_a_result_that_is_kept_is_the_same_and_is_not_made_again(rng):
    x, gate, up, scale, dh = swiglu_operands(rng)
    sizes = jnp.asarray(SIZES["uneven"])

    def product(keep_result, x, gate, up, scale):
        return grouped_swiglu(
            *(x, gate, up, sizes), scale_M=scale, keep_result=keep_result
        )

    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    calls, found = [], []
    for keep_result in (False, True):
        run = jax.checkpoint(functools.partial(product, keep_result), policy=policy)
        h, back = jax.vjp(run, x, gate, up, scale)
        found.append((h, *back(dh)))
        calls.append(str(jax.make_jaxpr(back)(dh)).count("platform_index"))
    for plain, kept in zip(*found, strict=True):
        np.testing.assert_array_equal(plain, kept)
    assert calls == [1, 1]  # what the backward pass itself needs


@functools.cache
def feed_forward_and_gradients(implementation, keep_result=False):
    @jax.jit
    def call(x, gate, up, down, scale, dy, sizes):
        def feed_forward(x, gate, up, down, scale):
            options = {"implementation": implementation, "keep_result": keep_result}
            return grouped_feed_forward(
                *(x, gate, up, down, sizes), scale_M=scale, **options
            )

        y, back = jax.vjp(feed_forward, x, gate, up, down, scale)
        return y, *back(dy)

    return call


@each_implementation
@pytest.mark.parametrize("case", ["uneven", "surplus tile", "more than there are"])
def test_feed_forward_equals_its_definition(rng, case, implementation):
    x, gate, up, scale, h = swiglu_operands(rng)
    down = jnp.asarray(rng.standard_normal((4, 256, 384)) * 384**-0.5, F32)
    dy, sizes = jnp.asarray(rng.standard_normal(x.shape), F32), SIZES[case]
    call = feed_forward_and_gradients(implementation)
    got = run(call, implementation, x, gate, up, down, scale, dy, jnp.asarray(sizes))
    h, *_ = swiglu_by_hand(x, gate, up, scale, h, sizes)
    y, dh, ddown = loop_over_groups(h, down, dy, sizes)
    _, dx, dgate, dup, dscale = swiglu_by_hand(x, gate, up, scale, dh, sizes)
    for array, expected in zip(got, (y, dx, dgate, dup, ddown, dscale), strict=True):
        np.testing.assert_allclose(array, expected, atol=1e-4)


def test_feed_forward_is_swiglu_and_product(rng):
    """Of bfloat16 to the bit, gradients too, whether the result is kept or not."""
    x, gate, up, scale, _ = swiglu_operands(rng, jnp.bfloat16)
    down = jnp.asarray(rng.standard_normal((4, 256, 384)), jnp.bfloat16)
    dy, sizes = jnp.asarray(rng.standard_normal(x.shape), x.dtype), SIZES["uneven"]
    arrays, sizes = (x, gate, up, down, scale), jnp.asarray(sizes)

    @jax.jit
    def apart(x, gate, up, down, scale, dy, sizes):
        def call(x, gate, up, down, scale):
            h = grouped_swiglu(x, gate, up, sizes, scale_M=scale)
            return grouped_matmul(h, down, sizes)

        y, back = jax.vjp(call, x, gate, up, down, scale)
        return y, *back(dy)

    expected = apart(*arrays, dy, sizes)
    for keep_result in (False, True):
        got = feed_forward_and_gradients(None, keep_result)(*arrays, dy, sizes)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_swiglu_without_a_scale(rng):
    x, gate, up, scale, _ = swiglu_operands(rng)
    sizes = jnp.asarray(SIZES["uneven"])
    got = grouped_swiglu(x, gate, up, sizes)
    expected = grouped_swiglu(x, gate, up, sizes, scale_M=jnp.ones_like(scale))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("implementation", "w_dtype"),
    [
        pytest.param("tpu", jnp.float32, marks=pytest.mark.slow),
        *((name, jnp.bfloat16) for name in IMPLEMENTATIONS),
    ],
)
def test_one_layer_among_all(rng, implementation, w_dtype):
    """As with that layer's matrices alone; the others may hold anything."""
    x, gate, up, _, dh = swiglu_operands(rng, jnp.bfloat16)
    gate, up = gate.astype(w_dtype), up.astype(w_dtype)
    sizes = jnp.asarray(SIZES["uneven"])

    def both_ways(x, gate, up, sizes, layer):
        def call(x, gate, up):
            options = {"layer": layer, "implementation": implementation}
            h = grouped_swiglu(x, gate, up, sizes, **options)
            return h, grouped_matmul(x, gate, sizes, **options)

        y, back = jax.vjp(call, x, gate, up)
        return y, back((dh, dh))

    def among(w):
        return jnp.full((3, *w.shape), jnp.nan, w.dtype).at[1].set(w)

    call = jax.jit(both_ways)
    expected, (dx, *dw) = run(call, implementation, x, gate, up, sizes, None)
    got = run(call, implementation, x, among(gate), among(up), sizes, 1)
    dw = (jnp.zeros((3, *w.shape), w.dtype).at[1].set(w) for w in dw)
    jax.tree.map(np.testing.assert_array_equal, got, (expected, (dx, *dw)))


def test_a_layer_outside_is_the_nearest(rng):
    x, w, _ = operands(rng)
    sizes, stack = jnp.asarray(SIZES["uneven"]), jnp.stack([w, 2 * w])
    for layer, factor in [(-1, 1), (7, 2)]:
        got = grouped_matmul(x, stack, sizes, layer=jnp.int32(layer))
        np.testing.assert_allclose(got, factor * grouped_matmul(x, w, sizes))


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
    ("x", "w", "sizes", "layer", "message"),
    [
        ((4, 3), (2, 5, 4), (2,), None, r"last axes of x.shape=\(4, 3\) and w.shape"),
        ((4, 3), (2, 5, 3), (3,), None, r"groups of w.shape=\(2, 5, 3\) and sizes"),
        ((4, 3, 1), (2, 5, 3), (2,), None, r"ranks of x.shape=\(4, 3, 1\)"),
        ((4, 3), (7, 2, 5, 3), (2,), None, r"ranks of .* w.shape=\(7, 2, 5, 3\)"),
        ((4, 3), (7, 2, 5, 4), (2,), 0, r"last axes of .* w.shape=\(2, 5, 4\)"),
        ((4, 3), (2, 5, 3), (2,), 0, r"w.shape=\(2, 5, 3\) is not that of all layers"),
    ],
)
def test_bad_shapes_are_named(x, w, sizes, layer, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(grouped_matmul)(  # beneath the shape check of the tests
            jnp.zeros(x), jnp.zeros(w), jnp.zeros(sizes, jnp.int32), layer=layer
        )


@pytest.mark.parametrize(
    ("w_dtype", "sizes_dtype", "message"),
    [
        (jnp.float16, jnp.int32, "bfloat16.* and .*float16.* differ"),
        (jnp.bfloat16, jnp.float32, "float32.* is no integer type"),
    ],
)
def test_bad_dtypes_are_named(w_dtype, sizes_dtype, message):
    x, w = jnp.zeros((4, 3), jnp.bfloat16), jnp.zeros((2, 5, 3), w_dtype)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(grouped_matmul)(x, w, jnp.zeros(2, sizes_dtype))


def test_unknown_implementation_is_named(rng):
    x, w, _ = operands(rng)
    with pytest.raises(ValueError, match="'cuda'"):
        grouped_matmul(x, w, jnp.asarray(SIZES["uneven"]), implementation="cuda")


@pytest.mark.parametrize("expected_rows", [-1, M + 1])
def test_expected_rows_are_some_of_the_rows(rng, expected_rows):
    x, w, _ = operands(rng)
    with pytest.raises(ValueError, match=f"expected_rows={expected_rows} of {M} rows"):
        grouped_matmul(x, w, jnp.asarray(SIZES["uneven"]), expected_rows=expected_rows)


@pytest.mark.parametrize(
    ("x", "w", "dtype", "message"),
    [
        ((8, 128), (2, 96, 128), jnp.float32, "multiples of 128.*N=96"),
        ((8, 64), (2, 128, 64), jnp.float32, "multiples of 128.*K=64"),
        ((8, 128), (2, 128, 128), jnp.float16, "bfloat16 or float32.*float16"),
        ((0, 128), (2, 128, 128), jnp.float32, "no empty operands"),
        ((8, 65536), (2, 128, 65536), jnp.float32, "exceed its memory"),
    ],
)
def test_what_the_tpu_kernel_does_not_take_is_named(caplog, x, w, dtype, message):
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, w))
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    call = functools.partial(grouped_matmul, implementation="tpu")
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call, x, w, sizes)
    if not x.shape[0]:
        return
    # Left to plain JAX where nothing was named, with one line.
    dispatch._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            plain = jax.eval_shape(lambda *o: grouped_matmul(*o), x, w, sizes)
    assert plain.shape == (x.shape[0], w.shape[1])
    (line,) = caplog.messages
    assert re.search(f"^grouped_matmul: .*{message}", line)


def test_swiglu_names_what_differs(rng):
    x, gate, up, scale, _ = swiglu_operands(rng)
    sizes = jnp.asarray(SIZES["uneven"])
    swiglu = inspect.unwrap(grouped_swiglu)
    with pytest.raises(ValueError, match="differ"):
        swiglu(x, gate, up[:, :128], sizes)
    with pytest.raises(ValueError, match=r"scale_M.shape=\(7,\)"):
        swiglu(x, gate, up, sizes, scale_M=scale[:7])
    feed_forward, down = inspect.unwrap(grouped_feed_forward), up.swapaxes(1, 2)
    with pytest.raises(ValueError, match="differ"):
        feed_forward(x, gate, up[:, :128], down, sizes)
    with pytest.raises(ValueError, match=r"last axes of .*\(300, 384\).* differ"):
        feed_forward(x, gate, up, up, sizes)


@pytest.mark.parametrize("rows", [5, 2048])
def test_a_dense_feed_forward_and_its_gradients(rng, rows):
    D, F = 64, 192
    x, dy = rng.standard_normal((2, rows, D), np.float32)
    gate, up = rng.standard_normal((2, F, D), np.float32) / 8
    down = rng.standard_normal((D, F), np.float32) / 14

    def plain(x, gate, up, down):
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    *operands, dy = map(jnp.asarray, (x, gate, up, down, dy))
    expected, back = jax.vjp(plain, *operands)
    for implementation, keep_result in [(None, True), ("xla", False)]:
        options = {"implementation": implementation, "keep_result": keep_result}
        run = functools.partial(feed_forward, **options)
        found, backward = jax.jit(lambda *o, run=run: jax.vjp(run, *o))(*operands)
        for got, wanted in zip((found, *backward(dy)), (expected, *back(dy))):
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * scale)


def test_a_dense_feed_forward_names_what_does_not_fit(rng, caplog):
    x, w = jnp.ones((1024, 64), jnp.bfloat16), jnp.ones((128, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="implementation='tpu' is not one of"):
        feed_forward(x, w, w, w.T, implementation="tpu")
    unchecked = inspect.unwrap(feed_forward)
    with pytest.raises(ValueError, match=r"last axes of .* differ"):
        unchecked(x, w, w, w)
    with pytest.raises(ValueError, match="differ"):
        unchecked(x, w, w[:64], w.T)
    with pytest.raises(NotImplementedError, match=r"Hopper.*bfloat16.*float32"):
        wide = (a.astype(F32) for a in (x, w, w, w.T))
        feed_forward(*wide, implementation="hopper")
    # Left to XLA where nothing was named, with one line for the gradient.
    for rows, why in [(1024, ""), (1000, "1024 rows"), (1025, "multiples of 64 rows")]:
        operands = jnp.ones((rows, 64), x.dtype), w, w, w.T
        dispatch._say_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "pallas_kernels"):
            jax.eval_shape(feed_forward, *operands)
            assert not caplog.messages
            jax.eval_shape(lambda *o: jax.vjp(feed_forward, *o)[1](o[0]), *operands)
        (line,) = caplog.messages
        assert why in line and ("Mosaic GPU on cuda" in line) == (not why)
