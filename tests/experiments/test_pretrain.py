"""The recipes against the papers' tables, their text, and the costs they state."""

import re
from pathlib import Path

import pytest

import experiments
from dsjax import count
from dsjax.train.experiment import describe
from dsjax.train.schedule import Progress

GOLDEN = Path(__file__).parent / "golden"
RECIPES = {make.__name__: make for make in experiments.PUBLISHED}

# name: length, sequences a step at the end, tokens, peak rate, its fractions of it at
# 10%, 70%, 85% and 99% of the tokens. The papers' numbers, typed anew.
PAPERS = {
    "pretrain_llm_7b": (4096, 2304, 2.0e12, 4.2e-4, (1, 1, 0.316, 0.1)),
    "pretrain_llm_67b": (4096, 4608, 2.0e12, 3.2e-4, (1, 1, 0.316, 0.1)),
    "pretrain_moe_2b": (2048, 2048, 1.05e11, 1.08e-3, (1, 1, 0.316, 0.0999)),
    "pretrain_moe_16b": (4096, 4608, 2.01e12, 4.2e-4, (1, 1, 0.316, 0.0999)),
    "pretrain_moe_145b": (4096, 4608, 2.45e11, 3.0e-4, (1, 1, 1, 1)),
    "pretrain_v2_lite": (4096, 4608, 5.7e12, 4.2e-4, (1, 1, 0.316, 0.0999)),
    "pretrain_v2": (4096, 9216, 8.1e12, 2.4e-4, (1, 0.316, 0.316, 0.0999)),
    "pretrain_v3": (4096, 15360, 14.8e12, 2.2e-4, (1, 0.985, 0.411, 0.0332)),
    "v2_32k": (32768, 576, 1.89e10, 2.4e-5, (1, 1, 1, 1)),
    "v3_32k": (32768, 1920, 6.29e10, 7.3e-6, (1, 1, 1, 1)),
    "v3_128k": (131072, 480, 6.29e10, 7.3e-6, (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_of_the_paper(name):
    run = RECIPES[name]()
    length, sequences, tokens, peak, fractions = PAPERS[name]
    assert (run.length, run.batch.sequences) == (length, sequences)
    assert run.tokens == pytest.approx(tokens, rel=5e-3)
    for part, fraction in zip((0.1, 0.7, 0.85, 0.99), fractions):
        progress = Progress(
            step=10**6, tokens=int(part * run.tokens), total_tokens=run.tokens
        )
        rate = run.learning_rate.at(progress)
        assert rate == pytest.approx(fraction * peak, rel=5e-3), part


@pytest.mark.parametrize("name", RECIPES)
def test_text_is_the_golden_one(name):
    """After a wanted change: python -m tests.experiments.test_pretrain"""
    assert describe(RECIPES[name]()) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_stated_cost_and_hardware(name):
    """6 FLOPs a parameter in use and attention's, at 40% of a v5p's 459 TFLOP/s."""
    run = RECIPES[name]()
    text = " ".join(RECIPES[name].__doc__.split())
    flops, days = re.search(
        r"Cost: (\S+) FLOPs, about (\S+) days? there", text
    ).groups()
    forward = count.count(run.model, context=run.length // 2).flops
    expected = 3 * forward * run.tokens
    assert float(flops) == pytest.approx(expected, rel=0.02)
    x, y, z = map(int, re.search(r"v5p:(\d+)x(\d+)x(\d+)", text).groups())
    mesh = run.mesh
    assert x * y * z == mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    seconds = expected / (0.4 * 459e12 * x * y * z)
    assert float(days) == pytest.approx(seconds / 86400, rel=0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_batches_divide(name):
    """Every batch of a ramp is whole microbatches, and those divide over the mesh."""
    run = RECIPES[name]()
    shares = run.mesh.data * run.mesh.fsdp * run.mesh.expert
    assert run.microbatch % shares == 0
    for part in range(0, 1001):
        assert run.batch.at(part * run.tokens // 1000) % run.microbatch == 0


if __name__ == "__main__":
    for name, make in RECIPES.items():
        (GOLDEN / f"{name}.txt").write_text(describe(make()))
