"""The record of a kernel's work, and the tables made of it."""

import importlib

import pytest

from pallas_kernels.work import Work

WORK = Work(
    moved={"x": 300, "w": 100},
    needed={"x": 100, "w": 100},
    flops=8,
    flops_needed=4,
    exponentials=3,
)


def test_ratios_are_of_bytes_not_of_operands():
    assert WORK.ratio() == 2
    assert WORK.ratio("x") == 3
    assert WORK.ratio("w", "x") == 2


def test_the_estimate_is_of_what_is_done():
    estimate = WORK.estimate()
    assert (estimate.flops, estimate.bytes_accessed) == (8, 400)
    assert estimate.transcendentals == 3


@pytest.mark.parametrize("operation", ["flash_attention", "mla_decode"])
def test_the_tables_are_whole(capsys, operation):
    table = importlib.import_module(f"pallas_kernels.{operation}.traffic")
    table.main()
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert set(rule) == {"|", "-"}
    assert {row.count("|") for row in rows} == {head.count("|")}
    for name in table.CASES:
        assert sum(f"| {name} |" in row for row in rows) >= 2
