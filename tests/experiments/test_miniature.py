"""The comparisons' tables from runs written by hand, and what masking makes of a model."""

import json

import pytest

from experiments import balancing, granularity, miniature


def write(out, arm, seed, *, losses, rows):
    folder = out / f"{arm}-{seed}"
    (folder / "run").mkdir(parents=True)
    result = {"arm": arm, "seed": seed, "masked": losses}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [json.dumps(row) for row in rows]
    (folder / "run/metrics.jsonl").write_text("\n".join(lines))


def test_table_of_granularity(tmp_path):
    """Means and spreads by hand; an arm without runs has no line."""
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "held_out_loss": 2.5}]
    for seed, best in enumerate([2.0, 2.2]):
        masked = {str(n): best + n * (1 + seed) / 4 for n in miniature.MASKED}
        write(tmp_path, "gshard", seed, losses=masked, rows=rows)
        write(tmp_path, "dense", seed, losses={"0": 3.0 + seed}, rows=rows)
    table = granularity.report(tmp_path).splitlines()
    assert len(table) == 4
    assert table[2].endswith("| 2.1000 | 2.0000, 2.2000 | +1.500 (spread 1.000) |")
    assert table[3].endswith("| 3.5000 | 3.0000, 4.0000 | - |")
    assert (tmp_path / "table.md").read_text().splitlines() == table
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_table_of_balancing(tmp_path):
    """MaxVio: the mean over layers, of the last tenth of the steps."""
    rows = [
        {"step": step, "max_violation": [2.0, 4.0] if step > 18 else [9.0, 9.0]}
        for step in range(1, 21)
    ]
    rows.append({"step": 20, "held_out_loss": 2.5})
    write(tmp_path, "bias", 0, losses={"0": 2.5}, rows=rows)
    table = balancing.report(tmp_path).splitlines()
    assert table[2:] == ["| bias | 2.5000 | 2.5000 | 3.000 | 0.000 |"]


def test_masking_counts_sixteenths_of_the_routed_experts():
    fine, coarse = granularity.deepseek_moe().model, granularity.gshard().model
    for config, expected in [(fine, 16), (coarse, 4)]:
        (segment,) = miniature.without_best(config, 4).segments
        assert segment.feed_forward.mask_best == expected
        assert miniature.without_best(config, 0) == config
    assert miniature.without_best(granularity.dense().model, 1) is None


@pytest.mark.parametrize("arm", [*granularity.ARMS, *balancing.ARMS])
def test_arms_differ_only_in_what_they_compare(arm):
    one, other = arm(), granularity.deepseek_moe()
    for name in ("data", "length", "tokens", "batch", "learning_rate", "optimizer"):
        assert getattr(one, name) == getattr(other, name)
    assert one.model.attention == other.model.attention
