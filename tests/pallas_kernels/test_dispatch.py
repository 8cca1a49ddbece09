"""Which kernel runs where is said once, aloud where an accelerator goes without."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, reference_only
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.grouped_matmul import (
    grouped_feed_forward,
    grouped_matmul,
    grouped_swiglu,
)
from pallas_kernels.mla_decode import append, mla_decode

KERNELS = {"tpu": "one", "cuda": "other"}


@pytest.fixture(autouse=True)
def forget():
    dispatch._say_once.cache_clear()
    yield
    dispatch._say_once.cache_clear()


@pytest.mark.parametrize(
    ("backend", "level"),
    [("gpu", logging.WARNING), ("cpu", logging.INFO), ("tpu", logging.INFO)],
)
def test_said_once(monkeypatch, caplog, backend, level):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(2):
            lacking = {"tpu": "", "cuda": "takes no 7"}
            dispatch.note_choice("some_product", KERNELS, lacking)
    (record,) = caplog.records
    assert record.levelno == level
    expected = "some_product: one on tpu, plain JAX elsewhere (other: takes no 7)"
    assert record.getMessage() == expected


def test_nothing_taken(caplog):
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        dispatch.note_choice("x", KERNELS, dict.fromkeys(KERNELS, "is missing"))
    assert "plain JAX everywhere" in caplog.text


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


E4M3, ONE, TWO = jnp.float8_e4m3fn, spec(1, dtype=jnp.int32), spec(2, dtype=jnp.int32)
OPERATIONS = {  # what calls it, operands
    "flash_attention": (
        lambda q, k, v, **how: flash_attention(q, k, v, scale=1.0, **how),
        [spec(1, 128, 1, 1, 64), spec(1, 128, 1, 64), spec(1, 128, 1, 64)],
    ),
    "grouped_matmul": (grouped_matmul, [spec(8, 128), spec(2, 128, 128), TWO]),
    "grouped_swiglu": (
        grouped_swiglu,
        [spec(8, 128), spec(2, 128, 128), spec(2, 128, 128), TWO],
    ),
    "grouped_feed_forward": (
        grouped_feed_forward,
        [spec(8, 128), *[spec(2, 128, 128)] * 3, TWO],
    ),
    "mla_decode": (
        lambda *operands, **how: mla_decode(*operands, layer=0, scale=1.0, **how),
        [
            *(spec(1, 1, 2, 128), spec(1, 1, 2, 16)),
            *(spec(1, 1, 128, 128), spec(1, 1, 16, 128), ONE),
        ],
    ),
    "append": (
        lambda *operands, **how: append(*operands, layer=0, **how),
        [spec(1, 1, 16, 128), spec(1, 1, 16), ONE],
    ),
    "fp8_matmul": (
        fp8_matmul,
        [
            *(spec(128, 128, dtype=E4M3), spec(128, 1)),
            *(spec(128, 128, dtype=E4M3), spec(1, 1)),
        ],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_plain_jax_everywhere_if_asked_for(name):
    """Also where the same function was traced with kernels before."""
    call, shapes = OPERATIONS[name]
    call = jax.jit(call)

    def traced():
        return str(call.trace(*shapes).jaxpr)

    kernels = ("pallas_call", "mpmd_map", "core_map")

    def found():
        return [kernel for kernel in kernels if kernel in traced()]

    assert found()
    with reference_only():
        assert not found()
    assert found()


def test_what_is_named_runs_all_the_same():
    with reference_only():
        assert dispatch.named("pallas_tpu") == "pallas_tpu"
        with reference_only(False):
            assert dispatch.named(None) is None
        assert dispatch.named(None) == "reference"


def test_grouped_products_are_then_the_platforms_own():
    """On a TPU XLA's ragged product: what the kernels have to beat."""
    with reference_only():
        program = jax.jit(grouped_matmul).trace(*OPERATIONS["grouped_matmul"][1])
    assert "ragged_dot" in str(program.jaxpr)
