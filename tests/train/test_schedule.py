"""Schedules against values worked out by hand from the papers' sections."""

import math
from itertools import pairwise

import pytest

from dsjax.errors import UserError
from dsjax.train.schedule import (
    BatchSize,
    Constant,
    Cosine,
    HoldCosine,
    MultiStep,
    Piecewise,
    Progress,
    steps,
    value,
)

B, T = 10**9, 10**12
V3_TOKENS = 14_800 * B
V3 = HoldCosine(
    peak=2.2e-4,
    hold_tokens=10 * T,
    decay_tokens=4_300 * B,
    final=2.2e-5,
    tail=((333 * B, 2.2e-5), (167 * B, 7.3e-6)),
)
V3_BATCH = BatchSize(sequences=15360, start=3072, ramp_tokens=469 * B, increment=1024)


def at(schedule, tokens, *, total, step=10**6):
    return schedule.at(Progress(step=step, tokens=tokens, total_tokens=total))


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (10 * T, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (12_150 * B, 1.21e-4),  # half of the way down: the mean of both ends
        (11_075 * B, 2.2e-5 + 1.98e-4 * (0.5 + math.sqrt(2) / 4)),  # cos 45 degrees
        (14_300 * B - 1, 2.2e-5),
        (14_300 * B, 2.2e-5),
        (14_633 * B - 1, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_800 * B, 7.3e-6),
        (20_000 * B, 7.3e-6),
    ],
)
def test_v3s_rate(tokens, rate):
    """Section 4.2: constant to 10T, cosine to 2.2e-5 over 4.3T, 333B there, 167B at
    7.3e-6."""
    assert at(V3, tokens, total=V3_TOKENS) == pytest.approx(rate, rel=1e-12)


def test_v3s_rate_falls_all_the_way():
    rates = [at(V3, n * 43 * B, total=V3_TOKENS) for n in range(233, 333)]
    assert all(one > two for one, two in pairwise(rates))


@pytest.mark.parametrize("schedule", [V3, Constant(peak=2.2e-4)])
def test_warm_up_is_linear_in_steps(schedule):
    for step, part in ((0, 1 / 2000), (999, 0.5), (1998, 1999 / 2000), (1999, 1.0)):
        rate = at(schedule, 1000 * step, total=V3_TOKENS, step=step)
        assert rate == pytest.approx(part * 2.2e-4, rel=1e-12)
    assert at(Constant(peak=1.0, warmup=0), 0, total=1, step=0) == 1.0


def test_llms_multi_step():
    """LLM, section 2.3: 31.6% from 80% of the tokens on, 10% from 90%."""
    rate, total = MultiStep(peak=4.2e-4), 2 * T
    for tokens, factor in (
        (0, 1.0),
        (1_600 * B - 1, 1.0),
        (1_600 * B, 0.316),
        (1_800 * B - 1, 0.316),
        (1_800 * B, 0.1),
        (2 * T, 0.1),
    ):
        expected = pytest.approx(4.2e-4 * factor, rel=1e-12)
        assert at(rate, tokens, total=total) == expected


def test_boundaries_are_whole_tokens():
    """0.55 * 110 is more than 60.5 in float64: no step is late for that."""
    rate = MultiStep(peak=1.0, fractions=(0.55, 0.7), factors=(0.5, 0.1))
    for thousands in (10, 30, 110, 7000):
        total, boundary = 1000 * thousands, 550 * thousands
        assert at(rate, boundary - 1, total=total) == 1.0
        assert at(rate, boundary, total=total) == 0.5


def test_v2s_multi_step():
    rate = MultiStep(peak=2.4e-4, fractions=(0.6, 0.9), factors=(0.316, 0.099856))
    assert at(rate, 4_859 * B, total=8_100 * B) == 2.4e-4
    assert at(rate, 4_860 * B, total=8_100 * B) == pytest.approx(7.584e-5, rel=1e-12)
    assert at(rate, 7_290 * B, total=8_100 * B) == pytest.approx(2.396544e-5, rel=1e-12)


def test_cosine_begins_after_warm_up_and_ends_at_its_final_rate():
    rate = Cosine(peak=1.0, warmup=10, final=0.1)
    values = [at(rate, 7 * n, total=700, step=n) for n in range(101)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.55) and values[100] == pytest.approx(0.1)
    assert all(one >= two for one, two in pairwise(values[10:]))


def test_v3s_loss_weights():
    mtp = Piecewise(values=(0.3, 0.1), boundaries=(10 * T,))
    speed = Piecewise(values=(0.001, 0.0), boundaries=(14_300 * B,))
    assert [at(mtp, n, total=V3_TOKENS) for n in (0, 10 * T - 1, 10 * T)] == [
        0.3,
        0.3,
        0.1,
    ]
    assert at(speed, 14_300 * B - 1, total=V3_TOKENS) == 0.001
    assert at(speed, 14_300 * B, total=V3_TOKENS) == 0.0
    assert value(0.25, Progress(step=0, tokens=0, total_tokens=1)) == 0.25


def test_v2s_batch_ramp():
    """2,304 to 9,216 sequences over 225B tokens, in nine equal increments."""
    batch = BatchSize(sequences=9216, start=2304, ramp_tokens=225 * B, increment=768)
    for tokens, sequences in (
        (0, 2304),
        (25 * B - 1, 2304),
        (25 * B, 3072),
        (112 * B + B // 2, 5376),
        (225 * B - 1, 8448),
        (225 * B, 9216),
        (8_100 * B, 9216),
    ):
        assert batch.at(tokens) == sequences
    smooth = BatchSize(sequences=9216, start=2304, ramp_tokens=225 * B)
    assert smooth.at(112 * B + B // 2) == 5760  # half of the way, one by one


@pytest.mark.parametrize(
    "batch",
    [
        BatchSize(sequences=7),
        BatchSize(sequences=10, start=2, ramp_tokens=1000, increment=4),
        BatchSize(sequences=9, start=2, ramp_tokens=777),
        BatchSize(sequences=9, start=2, ramp_tokens=10),
        BatchSize(sequences=9, start=9, ramp_tokens=10**6, increment=3),
    ],
)
@pytest.mark.parametrize("tokens", [0, 1, 700, 5000])
def test_steps_are_those_of_a_plain_loop(batch, tokens):
    done = count = 0
    while done < tokens:
        done, count = done + 5 * batch.at(done), count + 1
    assert steps(batch, tokens, 5) == count


def test_v3s_steps():
    """244 thousand steps: 14.331T tokens of 15,360 sequences and a ramp of 469B."""
    count = steps(V3_BATCH, V3_TOKENS, 4096)
    after = (14_800 - 469) * B / (15360 * 4096)
    ramp = sum(469 * B / 12 / (4096 * (3072 + 1024 * n)) for n in range(12))
    assert count == pytest.approx(after + ramp, abs=13)  # a step or less a size
    assert steps(BatchSize(sequences=4608), 106_449 * 4608 * 4096, 4096) == 106_449


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(peak=0.0), "peak=0.0"),
        (lambda: Constant(peak=math.nan), "peak=nan"),
        (lambda: Cosine(peak=1.0, warmup=-1), "warmup=-1"),
        (lambda: Cosine(peak=1.0, final=-0.1), "final=-0.1"),
        (lambda: MultiStep(peak=1.0, fractions=(0.6,)), "differ in length"),
        (lambda: MultiStep(peak=1.0, fractions=(0.9, 0.8)), "must rise"),
        (lambda: HoldCosine(peak=1, hold_tokens=1, decay_tokens=0, final=0), "decay"),
        (lambda: Piecewise(values=(1.0,), boundaries=(5,)), "one more than"),
        (lambda: Piecewise(values=(1.0, 2.0, 3.0), boundaries=(5, 5)), "must rise"),
        (lambda: BatchSize(sequences=0), "sequences=0"),
        (lambda: BatchSize(sequences=8, start=4), "needs both"),
        (lambda: BatchSize(sequences=8, start=9, ramp_tokens=1), "start=9"),
        (
            lambda: BatchSize(sequences=8, start=4, ramp_tokens=1, increment=3),
            "increment=3",
        ),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
