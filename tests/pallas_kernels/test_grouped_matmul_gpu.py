"""The Hopper kernels of the grouped matmul: the schedule anywhere, the compiled code on
any machine, the results on a GPU (`pytest -m gpu`).
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.tiles_gpu import (
    Tiles,
    by_size,
    place,
    row_tiles,
    schedule,
    tile_count,
    walk,
    weight_tiles,
)

M = 2048
SIZES = {
    "uneven": [100, 0, 1500, 301],
    "one has all": [0, 0, 2048, 0],
    "tiny ones": [1, 2, 3, 7, 129, 0, 65, 500],
    "exact tiles": [128, 256, 128, 512],
    "one more": [129, 257, 1, 513],
    "surplus rows": [3, 0, 200, 8],
    "none": [0, 0, 0, 0],
}
each_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@each_sizes
@pytest.mark.parametrize("tile", [128, 256])
def test_every_row_is_in_one_tile(sizes, tile):
    tiles = schedule(jnp.asarray(sizes), M, tile)
    owner = np.full(M, -1)
    for number in range(int(tile_count(tiles, M, tile))):
        group, start, count = place(tiles, number, tile)
        rows = slice(int(start), int(start + count))
        assert count > 0
        assert (owner[rows] == -1).all()
        owner[rows] = group
    surplus = len(sizes), M - sum(sizes)
    expected = np.repeat(range(len(sizes) + 1), [*sizes, surplus[1]])
    np.testing.assert_array_equal(owner, expected)


@each_sizes
def test_groups_come_by_their_sizes(sizes):
    groups = by_size(jnp.asarray(sizes))
    order = sorted(range(len(sizes)), key=lambda group: -sizes[group])
    ends = np.cumsum(sizes)
    np.testing.assert_array_equal(groups.group, order)
    np.testing.assert_array_equal(groups.end, ends[order])
    np.testing.assert_array_equal(groups.begin, (ends - sizes)[order])


@pytest.mark.parametrize("down", [1, 5, 40])
@pytest.mark.parametrize("across", [1, 7, 8, 11, 16])
def test_a_walk_meets_every_tile_once(down, across):
    index = jnp.arange(down * across)
    row, column = jax.vmap(lambda i: walk(i, jnp.int32(down), across, 8))(index)
    met = np.zeros((down, across), int)
    np.add.at(met, (np.asarray(row), np.broadcast_to(column, index.shape)), 1)
    assert (met == 1).all()


def test_tiles_multiply_few_columns_in_vain():
    assert row_tiles(4096, turned=True)[:2] == (128, 256)
    assert row_tiles(896, turned=True)[:2] == (128, 224)
    assert row_tiles(896, turned=False)[:2] == (256, 128)
    assert row_tiles(896, turned=True, apart=2)[:2] == (128, 256)
    assert weight_tiles(896, 1280)[:2] == (128, 256)
    assert weight_tiles(1280, 896)[:2] == (256, 128)
    assert Tiles(256, 128).half == 128


def test_what_it_does_not_take_is_said():
    x, w, sizes = jnp.ones((8, 64)), jnp.ones((2, 64, 64)), jnp.array([4, 4])
    with pytest.raises(NotImplementedError, match=r"Hopper.*bfloat16.*float32"):
        grouped_matmul(x, w, sizes, implementation="hopper")


COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu

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


def product(x, w, sizes, dy):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *back(dy)


def swiglu(x, w, sizes, dh):
    h = grouped_swiglu(x, w, w, sizes)

    def kept(x, gate, up):
        return grouped_swiglu(x, gate, up, sizes, keep_result=True)

    _, back = jax.vjp(lambda x, gate, up: grouped_swiglu(x, gate, up, sizes), x, w, w)
    return h, *jax.vjp(kept, x, w, w)[0:1], *back(dh)


M, G, N, K = {shape}
operands = (
    shape(M, K),
    shape(G, N, K, dtype=jnp.{weights}),
    shape(G, dtype=jnp.int32),
    shape(M, N),
)
compiled = jax.jit({function}).lower(*operands).compile()
print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
"""
UP = (229376, 64, 896, 1280)  # of a mixture of 1.9B parameters
DOWN = (229376, 64, 1280, 896)
aot = pytest.mark.aot


@pytest.mark.parametrize(
    ("function", "shape", "weights"),
    [
        ("product", DOWN, "float32"),
        ("swiglu", UP, "float32"),
        pytest.param("product", UP, "bfloat16", marks=aot),
        pytest.param("swiglu", DOWN, "bfloat16", marks=aot),
        # an expert-parallel slice of V3, V3 on one device, V2-Lite, and sizes that no
        # tile divides
        pytest.param("product", (32768, 8, 4096, 7168), "bfloat16", marks=aot),
        pytest.param("product", (32768, 256, 4096, 7168), "bfloat16", marks=aot),
        pytest.param("product", (24576, 64, 2816, 2048), "bfloat16", marks=aot),
        pytest.param("swiglu", (24576, 64, 1408, 2048), "bfloat16", marks=aot),
        pytest.param("product", (2043, 3, 192, 320), "bfloat16", marks=aot),
        pytest.param("swiglu", (100, 3, 200, 104), "bfloat16", marks=aot),
    ],
    ids=str,
)
def test_compiles_for_an_h200_without_spills(function, shape, weights):
    pytest.importorskip("jax_plugins.xla_cuda13")
    environment = {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = COMPILE.format(function=function, shape=shape, weights=weights)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    kernels = {"product": 3, "swiglu": 6}[function]
    assert f"kernels: {kernels}" in done.stdout, done.stdout + done.stderr[-2000:]
    report = done.stdout + done.stderr
    spills = [line for line in report.splitlines() if "spill stores" in line]
    assert spills, report[-2000:]
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


def operands(sizes, N, K, weights=jnp.bfloat16):
    """x, gate, up, dy, scale; what surplus rows hold is not to matter."""
    rng = np.random.default_rng(len(sizes))
    G = len(sizes)
    shapes = (M, K), (G, N, K), (G, N, K), (M, N)
    x, gate, up, dy = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes
    )
    surplus = (jnp.arange(M) >= sum(sizes))[:, None]
    x, dy = (jnp.where(surplus, jnp.nan, a) for a in (x, dy))
    gate, up = (w.astype(weights) for w in (gate, up))
    return x, gate, up, dy, jnp.asarray(rng.random(M), jnp.float32)


def dense(x, w, sizes):
    """The product in float32: all groups times all rows."""
    ends = jnp.cumsum(jnp.asarray(sizes))
    index = jnp.arange(M)[:, None]
    own_MG = (index < ends) & (index >= ends - jnp.asarray(sizes))
    y_MN = 0
    for g in range(len(sizes)):
        mine = jnp.where(own_MG[:, g : g + 1], x, 0)
        y_MN += jnp.dot(mine, w[g].T, precision="highest")
    return y_MN


def check(found, expected, tolerance=3e-3):
    for got, want in zip(found, expected, strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want)
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


each_shape = pytest.mark.parametrize(
    "shape", [(256, 384), (128, 128), (192, 320), (896, 64), (200, 104)], ids=str
)


@pytest.mark.gpu
@each_sizes
@each_shape
@pytest.mark.parametrize("weights", [jnp.bfloat16, jnp.float32])
def test_product_and_gradients_equal_float32_on_the_gpu(sizes, shape, weights):
    x, w, _, dy, _ = operands(sizes, *shape, weights)

    @functools.partial(jax.jit, static_argnums=0)
    def run(multiply, x, w, dy):
        y, back = jax.vjp(multiply, x, w)
        return y, *back(dy)

    def ours(x, w):
        return grouped_matmul(x, w, jnp.asarray(sizes), implementation="hopper")

    found = run(ours, x, w, dy)
    real = (jnp.arange(M) < sum(sizes))[:, None]
    wide = [jnp.where(real, a, 0).astype(jnp.float32) for a in (x, dy)]
    rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
    exact = run(lambda x, w: dense(x, w, sizes), wide[0], rounded, wide[1])
    check(found, exact)
    assert found[2].dtype == weights


@pytest.mark.gpu
@each_sizes
@each_shape
@pytest.mark.parametrize("keep_result", [False, True])
def test_swiglu_equals_float32_on_the_gpu(sizes, shape, keep_result):
    x, gate, up, dh, scale = operands(sizes, *shape)
    x, dh = (jnp.nan_to_num(a) for a in (x, dh))
    gate, up = gate / 16, up / 16

    @functools.partial(jax.jit, static_argnums=0)
    def run(swiglu, x, gate, up, scale, dh):
        h, back = jax.vjp(swiglu, x, gate, up, scale)
        return swiglu(x, gate, up, scale), h, *back(dh)

    def ours(x, gate, up, scale):
        return grouped_swiglu(
            *(x, gate, up, jnp.asarray(sizes)),
            scale_M=scale,
            implementation="hopper",
            keep_result=keep_result,
        )

    def exact(x, gate, up, scale):
        gated, lifted = dense(x, gate, sizes), dense(x, up, sizes)
        return jax.nn.silu(gated) * lifted * scale[:, None]

    found = run(ours, x, gate, up, scale, dh)
    wide = [a.astype(jnp.float32) for a in (x, gate, up, scale, dh)]
    # The gradient's own operands are rounded, too.
    check(found[:1], run(exact, *wide)[:1])
    check(found[1:], run(exact, *wide)[1:], tolerance=6e-3)
