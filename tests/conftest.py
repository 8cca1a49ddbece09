"""Eight simulated CPU devices, the meshes tests share, and checked array shapes."""

import gc
import os
from importlib.metadata import version
from importlib.util import find_spec

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # cuda or tpu: on purpose only
FLAGS = ["--xla_force_host_platform_device_count=8"]
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Tests compile much and compute little: LLVM need not try hard.
    FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
    if version("jaxlib").startswith("0.10."):
        # XLA's older code of fusions, gone since, compiles in two thirds of the time.
        FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Annotated shapes are checked while the tests run; on a borrowed accelerator without
# the test extra they run unchecked.
if find_spec("beartype"):
    checked = ["dsjax.nn", "dsjax.decode", "pallas_kernels"]
    install_import_hook(checked, "beartype.beartype")

from dsjax.sharding import make_mesh  # noqa: E402


def pytest_collection_finish() -> None:
    """Tracing makes millions of small objects, few of them garbage: the collector looks
    less often for some, and never again at the modules that are imported by now.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    """The mesh of ones, entered."""
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """A process that has run hundreds of tests holds gigabytes of programs otherwise."""
    yield
    jax.clear_caches()
