"""Compiling for an H200 that is not here, in a process of its own, and what ptxas says."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest

# What programs begin with: `shape` makes an operand on the GPU.
PROLOGUE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from dsjax.plan.topology import topology

place = NamedSharding(Mesh(np.array(topology("h200").devices), ("x",)), P())


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
"""


class Report(NamedTuple):
    """What a program printed, and the lines of ptxas on what kernels spilled."""

    printed: str
    spills: list[str]


def compile_for_h200(program: str) -> Report:
    """Runs a program that compiles kernels; the test fails if the program does, or if a
    kernel spills registers, and is skipped without the compiler.
    """
    pytest.importorskip("jax_plugins.xla_cuda13")
    environment = {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-2000:]
    lines = (done.stdout + done.stderr).splitlines()
    spills = [line for line in lines if "spill stores" in line and "frame" in line]
    assert spills, lines[-20:]
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
    assert not [line for line in lines if "serialized" in line]
    return Report(done.stdout, spills)
