"""The pods' recipes: their text, and the plans that their docstrings name."""

import math
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import pytest

from dsjax import cli
from dsjax.config import Moe
from dsjax.train.experiment import Experiment, describe
from dsjax.train.override import find
from experiments.pods import PODS
from experiments.pretrain import pretrain_v2, pretrain_v2_lite, pretrain_v3

GOLDEN = Path(__file__).parent / "golden"
NAMES = [make.__name__ for make in PODS]
PAPERS = {"v3": pretrain_v3, "v2": pretrain_v2, "v2_lite": pretrain_v2_lite}
CORES = {"v5p": 2, "v6e": 1}  # of a chip, which Cloud TPU's names count
DEVICES = {"tpu7x": 2}  # of a chip, else one


def recipe(name: str) -> Experiment:
    """As `dsjax train` finds it."""
    return find(f"experiments.pods.{name}")


def words(name: str) -> str:
    (make,) = [make for make in PODS if make.__name__ == name]
    return " ".join(make.__doc__.split())


def planned(name: str):
    """The arguments of the docstring's `dsjax plan`."""
    command = re.search(
        r"Plan: dsjax (plan (?:\S+ )*?--remat \w+(?: --moments \w+)?)", words(name)
    )[1]
    return cli.parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_golden_one(name):
    """After a wanted change: python -m tests.experiments.test_pods"""
    assert describe(recipe(name)) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_only_what_the_hardware_asks_for_differs_from_the_paper(name):
    run = recipe(name)
    paper = describe(PAPERS[run.model.name]())
    changed = set(describe(run).splitlines()) - set(paper.splitlines())
    paths = {line.split(" = ")[0] for line in changed}
    assert all(re.match(r"name|microbatch|remat|mesh\.", path) for path in paths)
    assert f"Command: dsjax train experiments.pods.{name} " in words(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_of_this_recipe(name):
    run, args = recipe(name), planned(name)
    mesh = {axis: size for axis, size in vars(run.mesh).items() if size > 1}
    assert args.mode == "train"
    assert args.model.replace("-", "_") == run.model.name
    assert args.mesh == ",".join(f"{axis}={size}" for axis, size in mesh.items())
    assert args.batch_per_device * run.mesh.devices == run.microbatch
    assert args.length == run.length
    assert args.remat == run.remat.value
    assert args.moments == jnp.dtype(run.optimizer.moments).name
    assert not args.no_mtp


@pytest.mark.parametrize("name", NAMES)
def test_hardware(name):
    run, args = recipe(name), planned(name)
    kind, _, shape = args.topology.partition(":")
    chips = math.prod(map(int, shape.split("x")))
    assert f"Hardware: {args.topology} " in words(name)
    assert f"{chips} chips, {chips // 4} hosts" in words(name)
    if kind in CORES:
        assert f"{kind}-{chips * CORES[kind]} on Cloud TPU" in words(name)
    assert run.mesh.devices == chips * DEVICES.get(kind, 1)


@pytest.mark.parametrize("name", NAMES)
def test_everything_divides(name):
    """Batches into microbatches, those over the mesh, experts over their axis."""
    run = recipe(name)
    mesh = run.mesh
    assert run.microbatch % (mesh.data * mesh.fsdp * mesh.expert) == 0
    for part in range(0, 1001):
        assert run.batch.at(part * run.tokens // 1000) % run.microbatch == 0
    for segment in run.model.segments:
        if isinstance(segment.feed_forward, Moe):
            assert segment.feed_forward.num_experts % mesh.expert == 0


if __name__ == "__main__":
    for name in NAMES:
        (GOLDEN / f"{name}.txt").write_text(describe(recipe(name)))
