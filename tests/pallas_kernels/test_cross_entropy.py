"""The cross-entropy and its gradient: plain JAX anywhere, the kernel compiled anywhere
and run on a GPU.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import cross_entropy, pallas_gpu
from tests.pallas_kernels.h200 import compile_for_h200
from tests.pallas_kernels.interpret_gpu import interpreted

SHAPES = [(1000, 32000), (300, 129280), (3, 256), (700, 1024)]  # rows, vocabulary


def operands(R, V, dtype=jnp.float32):
    """Logits of a standard deviation of 3, the first row's far from 0; a weight of 0."""
    rng = np.random.default_rng(V)
    logits = 3 * rng.standard_normal((R, V)).astype(np.float32)
    logits[0] -= 1000
    targets = rng.integers(0, V, R).astype(np.int32)
    weights = rng.uniform(0.5, 1.5, R).astype(np.float32)
    weights[1] = 0
    return jnp.asarray(logits, dtype), jnp.asarray(targets), jnp.asarray(weights)


def by_hand(logits, targets, weights):
    """In float64."""
    logits, weights = np.float64(logits), np.float64(weights)
    own = np.arange(len(logits)), np.asarray(targets)
    shifted = logits - logits.max(1, keepdims=True)
    total = np.exp(shifted).sum(1)
    gradient = np.exp(shifted) / total[:, None]
    gradient[own] -= 1
    return np.log(total) - shifted[own], gradient * weights[:, None]


def check(found, expected, tolerance):
    losses, gradient = (np.asarray(a, np.float64) for a in found)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    error = np.linalg.norm(gradient - expected[1])
    assert error <= tolerance * np.linalg.norm(expected[1])
    # All but the target's: small, but sums over a vocabulary of them are not.
    rest = np.abs(expected[1]).argmin(1)
    np.testing.assert_allclose(
        gradient[np.arange(len(rest)), rest],
        expected[1][np.arange(len(rest)), rest],
        rtol=10 * tolerance,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("logits", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("implementation", ["reference", None])
def test_equals_numpy(implementation, logits, dtype):
    given = operands(20, 300, logits)
    found = cross_entropy(*given, dtype=dtype, implementation=implementation)
    assert (found[0].dtype, found[1].dtype) == (jnp.float32, dtype)
    check(found, by_hand(*given), 4e-3 if dtype == jnp.bfloat16 else 1e-5)


def test_gradient_is_that_of_the_losses():
    logits, targets, weights = operands(5, 40)

    def loss(logits):
        losses, _ = cross_entropy(logits, targets, weights, dtype=jnp.float32)
        return jnp.vdot(losses, weights)

    _, gradient = cross_entropy(logits, targets, weights, dtype=jnp.float32)
    np.testing.assert_allclose(gradient, jax.grad(loss)(logits), atol=1e-6)


COMPILE = """
import functools
from pallas_kernels.cross_entropy import cross_entropy

R, V = {sizes}
for logits in (jnp.float32, jnp.float16):
    operands = (
        shape(R, V, dtype=logits),
        shape(R, dtype=jnp.int32),
        shape(R, dtype=jnp.float32),
    )
    run = functools.partial(cross_entropy, dtype=jnp.bfloat16)
    compiled = jax.jit(run).lower(*operands).compile()
    print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
"""


@pytest.mark.parametrize(
    "sizes",
    [SHAPES[0], *(pytest.param(s, marks=pytest.mark.aot) for s in SHAPES[1:])],
    ids=str,
)
def test_compiles_for_an_h200_without_spills(sizes):
    """Of float32 and of float16 logits."""
    report = compile_for_h200(COMPILE.format(sizes=sizes))
    assert report.printed.count("kernels: 1\n") == 2
    assert len(report.spills) == 2


@pytest.mark.parametrize(("R", "V"), [(5, 512), (3, 29 * 256)])
def test_interpreted(monkeypatch, R, V):
    """Barriers and copies in any order, without a GPU: a row of one chunk, and of more
    than there are slots.
    """
    monkeypatch.setattr(pallas_gpu, "BLOCKS", 2)
    given = operands(R, V, jnp.float16)
    with interpreted():
        found = pallas_gpu.cross_entropy(*given, dtype=jnp.float32)
        jax.block_until_ready(found)
    check(found, by_hand(*given), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("logits", "dtype"),
    [
        (jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16),
        (jnp.float16, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize(("R", "V"), SHAPES, ids=str)
def test_equals_numpy_on_the_gpu(R, V, logits, dtype):
    given = operands(R, V, logits)
    run = functools.partial(cross_entropy, dtype=dtype, implementation="hopper")
    expected = by_hand(*given)
    for _ in range(2):
        check(jax.jit(run)(*given), expected, 4e-3 if dtype == jnp.bfloat16 else 1e-5)


def test_bad_operands_are_named():
    logits, targets, weights = operands(4, 256)
    call = functools.partial(inspect.unwrap(cross_entropy), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"targets_R.shape=\(3,\)"):
        call(logits, targets[:3], weights)
    with pytest.raises(ValueError, match=r"weights_R.shape=\(1, 4\)"):
        call(logits, targets, weights[None])
    with pytest.raises(ValueError, match="float32"):
        call(logits, weights, weights)
    with pytest.raises(ValueError, match="'other' is not one of"):
        call(logits, targets, weights, implementation="other")


@pytest.mark.parametrize(
    ("V", "logits", "dtype", "statistics", "message"),
    [
        (300, "float32", "float32", "float32", r"256 divides \(\(4, 300\)\)"),
        (256, "float8_e4m3fn", "bfloat16", "float32", "or of 16 bits"),
        (256, "float32", "float16", "float32", "bfloat16 or float32"),
        (256, "float32", "float32", "bfloat16", "adds up in float32"),
    ],
)
def test_what_the_kernel_does_not_take_is_named(V, logits, dtype, statistics, message):
    logits, targets, weights = operands(4, V, logits)
    options = {"dtype": dtype, "statistics": statistics, "implementation": "hopper"}
    with pytest.raises(NotImplementedError, match=message):
        cross_entropy(logits, targets, weights, **options)
