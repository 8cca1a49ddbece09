"""Which kernel runs where is said once, aloud where an accelerator goes without."""

import logging

import jax
import pytest

from pallas_kernels import dispatch

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
