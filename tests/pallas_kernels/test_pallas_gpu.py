"""The Hopper kernels: the schedule anywhere, the compiled code on any machine, the
results on a GPU (`pytest -m gpu`).
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.pallas_gpu import ALIGN, _schedule

SIZES = {
    "uneven": [100, 0, 1500, 301],
    "one has all": [0, 0, 2048, 0],
    "tiny ones": [1, 2, 3, 7, 129, 0, 65, 500],
    "exact tiles": [128, 256, 128, 512],
    "one more": [129, 257, 1, 513],
    "surplus rows": [3, 0, 200, 8],
    "none": [0, 0, 0, 0],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tile", [64, 128])
def test_every_row_of_a_group_is_in_one_tile(sizes, tile):
    group, start, first, last = map(
        np.asarray, _schedule(jnp.asarray(sizes), 2048, tile)
    )
    owner = np.full(2048 + tile, -1)
    for g, s, begin, end in zip(group, start * ALIGN, first, last):
        if end > begin:
            assert (owner[s + begin : s + end] == -1).all()
            owner[s + begin : s + end] = g
    expected = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(owner[: len(expected)], expected)
    assert (owner[len(expected) :] == -1).all()


COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.grouped_matmul.pallas_gpu import hopper

CONFIG = '''gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 }} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "NVIDIA H200"'''
topology = topologies.get_topology_desc(
    "h200", "cuda", target_config=CONFIG, topology="1x1x1"
)
place = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), P())


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)


def product_and_gradients(x, w, sizes, dy):
    y, back = jax.vjp(lambda x, w: hopper(x, w, sizes), x, w)
    return y, *back(dy)


M, G, N, K = {shape}
sizes = shape(G, dtype=jnp.int32)
jax.jit(product_and_gradients).lower(shape(M, K), shape(G, N, K), sizes, shape(M, N)).compile()
print("compiled")
"""


@pytest.mark.parametrize(
    "shape",
    [
        (32768, 8, 4096, 7168),  # an expert-parallel slice of V3
        (32768, 256, 4096, 7168),  # V3 on one device
        (24576, 64, 2816, 2048),  # V2-Lite
        (229376, 64, 896, 1280),  # a mixture of 1.9B parameters
    ],
    ids=str,
)
def test_compiles_for_an_h200_without_spills(shape):
    pytest.importorskip("jax_plugins.xla_cuda13")
    environment = {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(shape=shape)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert "compiled" in done.stdout, done.stderr[-2000:]
    report = done.stdout + done.stderr
    spills = [line for line in report.splitlines() if "spill stores" in line]
    assert len(spills) == 3, report[-2000:]  # forward, by rows, by weights
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (512, 256)], ids=str)
def test_equals_float32_on_the_gpu(sizes, shape):
    rng, (N, K) = np.random.default_rng(len(sizes)), shape
    x, w, dy = (
        jnp.asarray(rng.standard_normal(size), jnp.bfloat16)
        for size in [(2048, K), (len(sizes), N, K), (2048, N)]
    )

    @jax.jit
    def both(x, w, dy):
        y, back = jax.vjp(
            lambda x, w: grouped_matmul(
                x, w, jnp.asarray(sizes), implementation="hopper"
            ),
            x,
            w,
        )
        return y, *back(dy)

    wide = [np.asarray(array, np.float32) for array in (x, w, dy)]
    for got, expected in zip(both(x, w, dy), _expected(*wide, sizes)):
        error = np.linalg.norm(np.asarray(got, np.float32) - expected)
        assert error <= 3e-3 * np.linalg.norm(expected)


def _expected(x, w, dy, sizes):
    y, dx, dw, start = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows] = x[rows] @ w[group].T, dy[rows] @ w[group]
        dw[group] = dy[rows].T @ x[rows]
        start += size
    return y, dx, dw
