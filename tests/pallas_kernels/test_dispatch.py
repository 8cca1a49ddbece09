"""Plain JAX in a kernel's place is said once, where a kernel belongs."""

import logging

import jax
import pytest

from pallas_kernels import dispatch


@pytest.fixture(autouse=True)
def forget():
    dispatch.note_reference.cache_clear()
    yield
    dispatch.note_reference.cache_clear()


@pytest.mark.parametrize(("backend", "lines"), [("gpu", 1), ("cpu", 0), ("tpu", 0)])
def test_said_once(monkeypatch, caplog, backend, lines):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        dispatch.note_reference("some_product", "gpu")
        dispatch.note_reference("some_product", "gpu")
    assert len(caplog.records) == lines
    assert all("some_product" in record.getMessage() for record in caplog.records)
