"""Which kernel runs where is said once, aloud where an accelerator goes without."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch, reference_only
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
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


F32 = jnp.float32
OPERATIONS = {  # what calls it, shapes of float32 operands, those of int32 behind them
    "flash_attention": (
        lambda q, k, v, **how: flash_attention(q, k, v, scale=1.0, **how),
        [(1, 128, 1, 1, 64), (1, 128, 1, 64), (1, 128, 1, 64)],
        [],
    ),
    "grouped_matmul": (grouped_matmul, [(8, 128), (2, 128, 128)], [(2,)]),
    "grouped_swiglu": (
        grouped_swiglu,
        [(8, 128), (2, 128, 128), (2, 128, 128)],
        [(2,)],
    ),
    "mla_decode": (
        lambda *operands, **how: mla_decode(*operands, layer=0, scale=1.0, **how),
        [(1, 1, 2, 128), (1, 1, 2, 16), (1, 1, 128, 128), (1, 1, 16, 128)],
        [(1,)],
    ),
    "append": (
        lambda *operands, **how: append(*operands, layer=0, **how),
        [(1, 1, 16, 128), (1, 1, 16)],
        [(1,)],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_plain_jax_everywhere_if_asked_for(name):
    """Also where the same function was traced with kernels before."""
    call, floats, integers = OPERATIONS[name]
    shapes = [jax.ShapeDtypeStruct(shape, F32) for shape in floats]
    shapes += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in integers]
    call = jax.jit(call, static_argnames="implementation")

    def traced(**how):
        return str(call.trace(*shapes, **how).jaxpr)

    assert "pallas_call" in traced()
    with reference_only():
        assert "pallas_call" not in traced()
    assert "pallas_call" in traced()


def test_what_is_named_runs_all_the_same():
    with reference_only():
        assert dispatch.named("pallas_tpu") == "pallas_tpu"
        with reference_only(False):
            assert dispatch.named(None) is None
        assert dispatch.named(None, "blocked") == "blocked"
