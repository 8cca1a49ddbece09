"""The benchmark's table, on cases of our own and with a clock of our own."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import bench, measure
from pallas_kernels.measure import Case, Clocks, kernels_ms, relative_error

CEILINGS = bench.Ceilings(bfloat16=8e14, float8=16e14, read=4e12)


def square(x):
    return (x.astype(jnp.float32) ** 2).astype(x.dtype)


def broken(x):
    raise NotImplementedError("no such shape")


CASE = Case(
    operation="square",
    name="a vector of 1000",
    inputs=lambda key: (jax.random.normal(key, (1000,), jnp.bfloat16),),
    contestants={"ours": square, "half": lambda x: square(x) / 2, "broken": broken},
    exact=lambda x: x.astype(jnp.float32) ** 2,
    flops=8_000_000,
    bytes=4000,
    target=">= 1x half",
)


def test_rows_have_errors_rates_and_what_failed(monkeypatch):
    """Two contestants take turns, another one first each time; a round in which all is
    twice as slow changes nothing.
    """
    times = iter([3.0, 2.0, 4.0, 6.0, 3.0, 2.0])
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "device_ms", lambda run, *operands, clocks: next(times))
    ours, half, failed = bench.run_case(
        bench.prepare(CASE), CEILINGS, jax.random.key(0), Clocks.SETTLED
    )
    assert ours.error < 4e-3 and half.error == pytest.approx(0.5, abs=1e-3)
    assert (ours.ms, ours.ratio, half.ratio) == (2.0, 1.0, 1.5)
    assert ours.flops_per_second == pytest.approx(4e9)
    assert ours.share == pytest.approx(1e-8 / 2e-3)  # compute binds: 8e6 / 8e14 s
    assert ours.note == ">= 1x half" and not half.note
    assert failed.ms is None and "no such shape" in failed.note
    lines = [bench.heading(CEILINGS).splitlines()[-2], *map(bench.line, (ours, failed))]
    assert len({line.count("|") for line in lines}) == 1
    assert "no such shape" in lines[-1]


class Cupti:
    """Two kernels a call, of 1 and 2 ms, and quicker ones before the clocks have settled."""

    def __init__(self):
        self.calls, self.on = 0, False

    def once(self):
        self.calls += self.on

    def _cupti_init(self):
        self.on = True

    def _cupti_get_timings(self, finalize):
        settled = [call >= self.calls - 3 for call in range(self.calls)]
        return [(name, ms / (1 if s else 2)) for s in settled for name, ms in KERNELS]


KERNELS = [("one", 1.0), ("other", 2.0)]


@pytest.fixture
def cupti(monkeypatch):
    cupti = Cupti()
    library = SimpleNamespace(_mosaic_gpu_ext=cupti)
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", library)
    return cupti


def test_a_time_is_that_of_the_last_calls_kernels(cupti):
    found = kernels_ms(cupti.once, lambda: None, Clocks.SETTLED, repeats=3)
    assert found == 3.0
    assert cupti.calls > 3


def test_after_a_rest_there_are_no_other_calls(cupti, monkeypatch):
    rests = []
    monkeypatch.setattr(measure.time, "sleep", rests.append)
    found = kernels_ms(cupti.once, lambda: None, Clocks.RESTED, repeats=4)
    assert (found, cupti.calls, rests) == (3.0, 4, [measure.REST])


def test_kernels_that_are_not_the_same_each_time_are_an_error(cupti, monkeypatch):
    monkeypatch.setattr(cupti, "_cupti_get_timings", lambda _: [("one", 1.0)])
    with pytest.raises(RuntimeError, match="1 kernels of"):
        kernels_ms(cupti.once, lambda: None, Clocks.SETTLED)


def test_relative_error():
    exact = jnp.array([3.0, 4.0])
    found = jnp.array([3.0, 4.5], jnp.bfloat16)
    assert relative_error(found, exact) == pytest.approx(0.1)
    assert jnp.isnan(relative_error(jnp.array([jnp.nan, 4.0]), exact))


def test_cases_are_chosen_by_words_of_their_names():
    names = [case.name for case in bench.chosen(["mla_decode"], "2 tokens")]
    assert names == ["128 rows of 4096, 128 heads, 2 tokens"]
    operations = [case.operation for case in bench.chosen([], "")]
    assert list(dict.fromkeys(operations)) == list(bench.OPERATIONS)


@pytest.fixture
def rows(monkeypatch):
    """What a GPU that is not there measures."""
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="H")
    monkeypatch.setattr(bench.jax, "devices", lambda: [gpu])
    monkeypatch.setattr(bench, "chosen", lambda *_: [CASE])
    monkeypatch.setattr(bench, "measure_ceilings", lambda _: CEILINGS)
    monkeypatch.setattr(bench, "prepare", lambda case: case)
    rows = [bench.Row("square", "a vector", who, note="none") for who in ("a", "b")]
    monkeypatch.setattr(bench, "run_case", lambda *_: iter(rows))
    return rows


def test_a_gpus_table_is_printed_row_by_row(rows, monkeypatch, capsys):
    printed = []

    def run_case(*_):
        for row in rows:
            printed.append(capsys.readouterr().out)
            yield row

    monkeypatch.setattr(bench, "run_case", run_case)
    assert bench.main(["mla_decode"]) == 0
    assert printed[0].startswith("H, jax") and printed[0].count("\n") == 6
    assert printed[1] == bench.line(rows[0]) + "\n"
    assert capsys.readouterr().out == bench.line(rows[1]) + "\n"


def test_no_row_follows_the_bar_on_its_line(rows, monkeypatch, capsys):
    """On a terminal both are seen."""
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert bench.main(["mla_decode"]) == 0
    shown = capsys.readouterr().out.replace("\r", "\n").splitlines()
    assert [bench.line(row) for row in rows] == [x for x in shown if "a vector" in x]


@pytest.mark.parametrize("arguments", [["no_such"], [], ["--case", "no_such"]])
def test_what_cannot_run_is_one_line_and_exit_code_2(arguments, capsys):
    assert bench.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert "no_such" in err or "Hopper" in err
