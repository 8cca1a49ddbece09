"""FLOPs and traffic: by hand on toys, against XLA's own count on whole models."""

import os
from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax import models
from dsjax.nn.options import Remat
from dsjax.plan.costs import Routed, cost
from dsjax.plan.graph import graph
from dsjax.plan.plan import routed
from dsjax.plan.programs import Mode, Work, trace
from dsjax.sharding import make_mesh

ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def of(function, *arguments, platform="tpu", **options):
    closed = jax.jit(function).trace(*arguments).jaxpr
    return cost(graph(closed, platform=platform), ONE, **options)


def test_products():
    found = of(lambda x, w: x @ w, shaped(64, 32), shaped(32, 128))
    assert found.flops == found.products == 2 * 64 * 32 * 128
    assert found.traffic == 4 * (64 * 32 + 32 * 128 + 64 * 128)


def test_products_with_batch_dimensions():
    product = lambda x, y: jnp.einsum("btnh,bsnh->bnts", x, y)  # noqa: E731
    found = of(product, shaped(3, 8, 2, 16), shaped(3, 10, 2, 16))
    assert found.products == 2 * 3 * 2 * 8 * 10 * 16


def test_loops_multiply():
    def program(x, w):
        step = lambda x, w: (x @ w, None)  # noqa: E731
        return jax.lax.scan(step, x, w)[0]

    found = of(program, shaped(8, 16), shaped(5, 16, 16))
    assert found.products == 5 * 2 * 8 * 16 * 16
    assert found.traffic == 5 * 4 * (8 * 16 + 16 * 16 + 8 * 16)


def test_a_loop_that_data_decide_is_not_entered():
    def program(x, w, n):
        less = lambda state: state[0] < n  # noqa: E731
        return jax.lax.while_loop(less, lambda s: (s[0] + 1, s[1] @ w), (0, x @ w))

    found = of(program, shaped(8, 8), shaped(8, 8), shaped(dtype=jnp.int32))
    assert found.products == 2 * 8 * 8 * 8
    assert found.skipped_loops == 1


def test_of_branches_the_dearest_counts():
    def program(x, w, flag):
        return jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w)

    found = of(program, shaped(8, 8), shaped(8, 8), shaped(dtype=jnp.bool_))
    assert found.products == 2 * 2 * 8 * 8 * 8


def test_devices_share_the_work():
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        x, w = (
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for shape, spec in [((16, 8), P("fsdp")), ((8, 32), P(None, "tensor"))]
        )
        closed = jax.jit(jnp.dot).trace(x, w).jaxpr
    found = cost(graph(closed, platform="tpu"), dict(mesh.shape))
    assert found.products == 2 * 16 * 8 * 32 / 8


def grouped(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes)


@pytest.mark.parametrize(("rows", "filled"), [(10, 10), (1000, 64)])
def test_grouped_products_count_the_rows_that_are_there(rows, filled):
    arguments = shaped(64, 16), shaped(4, 16, 32), shaped(4, dtype=jnp.int32)
    found = of(grouped, *arguments, routed=Routed(rows=rows))
    assert found.products == pytest.approx(2 * filled * 16 * 32)


def test_the_gradients_of_a_grouped_product_are_as_dear_as_it():
    def program(x, w, sizes, dy):
        return jax.vjp(lambda x, w: grouped(x, w, sizes), x, w)[1](dy)

    arguments = shaped(64, 16), shaped(4, 16, 32), shaped(4, dtype=jnp.int32)
    found = of(program, *arguments, shaped(64, 32))
    assert found.products == 2 * 2 * 64 * 16 * 32


def test_chunks_of_a_layer_share_its_rows():
    """3 layers, each in 2 chunks, with 20 rows a layer of a device."""

    def program(x, w, sizes):
        chunk = lambda _, x: (None, grouped(x, w, sizes))  # noqa: E731
        layer = lambda x, _: (jax.lax.scan(chunk, None, x)[1] @ w[0].T, None)  # noqa: E731
        return jax.lax.scan(layer, x, length=3)[0]

    arguments = shaped(2, 64, 16), shaped(4, 16, 32), shaped(4, dtype=jnp.int32)
    found = of(program, *arguments, routed=Routed(rows=20, layers=frozenset([3])))
    plain = 3 * 2 * (2 * 64) * 32 * 16
    assert found.products == pytest.approx(3 * 2 * 20 * 16 * 32 + plain)


def test_elementwise_chains_are_fused():
    """Read once, written once, however long the chain."""
    found = of(lambda x: jnp.sin(x) * jnp.cos(x) + 1.0, shaped(256))
    assert found.traffic == 2 * 4 * 256


def test_a_norm_takes_two_passes():
    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))

    found = of(norm, shaped(64, 256))
    once = 4 * 64 * 256
    assert 3 * once <= found.traffic <= 3.05 * once


def test_a_product_hands_its_result_to_the_chain_behind_it():
    found = of(lambda x, w: jnp.sin(x @ w), shaped(64, 64), shaped(64, 64))
    assert found.traffic == 3 * 4 * 64 * 64


def test_updates_in_place_move_the_update_alone():
    def program(cache, new):
        return jax.lax.dynamic_update_slice(cache, new, (5, 0))

    found = of(program, shaped(1000, 128), shaped(1, 128))
    assert found.traffic == 2 * 4 * 128


def test_slices_are_read_where_they_lie():
    def program(x, w):
        return x @ jax.lax.dynamic_index_in_dim(w, 1, keepdims=False)

    found = of(program, shaped(8, 64), shaped(100, 64, 64))
    assert found.traffic == 4 * (8 * 64 + 64 * 64 + 8 * 64)


def test_kernels_say_what_they_cost():
    from jax.experimental import pallas as pl

    estimate = pl.CostEstimate(flops=1000, bytes_accessed=2000, transcendentals=0)
    kernel = pl.pallas_call(
        lambda x, y: None, out_shape=shaped(8, 128), cost_estimate=estimate
    )
    found = of(kernel, shaped(8, 128))
    assert (found.products, found.traffic) == (1000, 2000)
    silent = pl.pallas_call(lambda x, y: None, out_shape=shaped(8, 128), name="silent")
    assert of(silent, shaped(8, 128)).uncounted == {"silent"}
    assert found.uncounted == frozenset()


@pytest.mark.parametrize(("sequences", "rows"), [("1", 64 * 4), ("1/8", 64 * 4 / 4)])
def test_rows_of_a_device_if_routing_is_even(sequences, rows):
    """4 of the experts for each of 64 tokens. A single sequence lies on all devices, and
    4 devices along `expert` share its rows.
    """
    config = models.tiny_v3()
    found = routed(
        Work(
            config=config,
            mode=Mode.PREFILL,
            batch_per_device=Fraction(sequences),
            length=64,
        ),
        make_mesh(data=2, expert=4),
    )
    assert found.rows == rows
    assert found.layers == {2}


# --- whole models, one layer a segment so that XLA unrolls all loops

MODELS = {"dense": models.llm_67b, "mla": models.v3, "experts": models.v3}


def work(name: str, mode: Mode) -> Work:
    config = models.shrink(MODELS[name](), d_model=256, width=512)
    segments = config.segments if name == "experts" else config.segments[:1]
    config = replace(config, segments=tuple(replace(s, count=1) for s in segments))
    if name == "mla":
        config = replace(config, mtp=False)
    return Work(
        config=config,
        mode=mode,
        batch_per_device=Fraction(2),
        length=512 if name == "experts" else 256,
        remat=Remat.NONE,
    )


def batched(x_MK, w_GNK, sizes_G):
    """As many products as a grouped matmul does, in a form that XLA counts."""
    x_GMK = x_MK.reshape(len(w_GNK), -1, x_MK.shape[1])
    y_GMN = jnp.einsum("gmk,gnk->gmn", x_GMK, w_GNK)
    return y_GMN.reshape(len(x_MK), -1) + 0 * sizes_G.sum().astype(x_MK.dtype)


def batched_feed_forward(x_MK, *weights, layer=None, **_):
    *weights, sizes_G = weights
    if layer is not None:  # of all layers: with a cache
        weights = [w_YGNK[layer] for w_YGNK in weights]
    gate_GNK, up_GNK, down_GKN = weights
    gate_MN, up_MN = (batched(x_MK, w_GNK, sizes_G) for w_GNK in (gate_GNK, up_GNK))
    return batched(jax.nn.silu(gate_MN) * up_MN, down_GKN, sizes_G)


@pytest.fixture
def countable(monkeypatch):
    """Grouped products that XLA counts, and no rounds for what is over."""
    feed_forward = "dsjax.nn.experts.grouped_feed_forward"
    monkeypatch.setattr(feed_forward, batched_feed_forward)
    monkeypatch.setattr("dsjax.nn.dispatch.SLACK", 1.0)
    monkeypatch.setattr(jax.lax, "while_loop", lambda condition, body, start: start)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("dense", Mode.TRAIN),
        ("mla", Mode.PREFILL),
        pytest.param("mla", Mode.TRAIN, marks=pytest.mark.slow),
        pytest.param("experts", Mode.PREFILL, marks=pytest.mark.slow),
        pytest.param("experts", Mode.TRAIN, marks=pytest.mark.slow),
    ],
)
def test_flops_are_those_that_xla_counts(countable, name, mode):
    mesh = make_mesh()
    program = trace(work(name, mode), mesh)
    # With the older fusions of JAX 0.10, which tests compile with, a scatter is a loop.
    flag = "xla_cpu_use_fusion_emitters"
    options = {flag: True} if flag in os.environ["XLA_FLAGS"] else {}
    compiled = program.traced.lower().compile(compiler_options=options)
    assert " while(" not in compiled.as_text()
    found = cost(graph(program.traced.jaxpr, platform="cpu"), dict(mesh.shape))
    assert found.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)
