"""Compiling for TPUs that are not here, by the real compiler, without a device."""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@functools.cache
def tpu(name: str):
    """The topology of that name, "v5p:2x2x1"; skips the test without the compiler."""
    if not find_spec("libtpu"):
        pytest.skip("needs the TPU compiler")
    # libtpu asks a metadata server otherwise, and refuses a second compiling process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(topology_name=name, platform="tpu")


def compile_for_tpu(name: str, function: Callable, *shapes, **options):
    """`function` compiled for one device of a topology; `options` go to `jax.jit`."""
    mesh = Mesh(np.array(tpu(name).devices[:1]), ("x",))
    everywhere = NamedSharding(mesh, P())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
    return jax.jit(function, **options).lower(*shapes).compile()
