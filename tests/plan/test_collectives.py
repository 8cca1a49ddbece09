"""Collectives that a program names, and those that its layouts imply."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from dsjax.plan.costs import cost
from dsjax.plan.graph import graph
from dsjax.plan.hlo import collectives as compiled_collectives
from dsjax.sharding import make_mesh

D, F, E = "data", "fsdp", "expert"


@pytest.fixture
def mesh():
    mesh = make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        yield mesh


WHOLE = P()


def shaped(mesh, shape, spec=WHOLE, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def sent(mesh, function, *arguments):
    closed = jax.jit(function).trace(*arguments).jaxpr
    return cost(graph(closed, platform="tpu"), dict(mesh.shape)).sent


def test_a_gather_counts_its_result(mesh):
    x = shaped(mesh, (16, 8), P("fsdp"))
    found = sent(mesh, lambda x: reshard(x, P(None, None)), x)
    assert found == {("all-gather", (F,)): 16 * 8 * 4}


def test_cutting_is_free_and_comes_before_gathering(mesh):
    x = shaped(mesh, (16, 8), P("fsdp"))
    assert sent(mesh, lambda x: reshard(x, P("fsdp", "data")), x) == {}
    found = sent(mesh, lambda x: reshard(x, P(None, "data")), x)
    assert found == {("all-gather", (F,)): 16 * 4 * 4}


def test_a_moved_axis_is_an_all_to_all(mesh):
    x = shaped(mesh, (16, 8), P("fsdp"))
    found = sent(mesh, lambda x: reshard(x, P(None, "fsdp")), x)
    assert found == {("all-to-all", (F,)): 4 * 8 * 4}


def test_loops_multiply(mesh):
    x = shaped(mesh, (3, 16, 8), P(None, "fsdp"))

    def program(x):
        gathered = lambda c, w: (c + reshard(w, P(None, None)).sum(), None)  # noqa: E731
        return jax.lax.scan(gathered, 0.0, x)[0]

    assert sent(mesh, program, x) == {("all-gather", (F,)): 3 * 16 * 8 * 4}


def product(out):
    return lambda x, y: jnp.einsum("bk,bn->kn", x, y, out_sharding=out)


def test_partial_sums_are_reduced(mesh):
    x = shaped(mesh, (16, 8), P(("data", "fsdp")))
    y = shaped(mesh, (16, 4), P(("data", "fsdp")))
    found = sent(mesh, product(P(None, None)), x, y)
    assert found == {("all-reduce", (D, F)): 8 * 4 * 4}


def test_a_sum_over_one_axis_that_is_cut_next_is_scattered(mesh):
    x, y = shaped(mesh, (16, 8), P("fsdp")), shaped(mesh, (16, 4), P("fsdp"))

    def program(x, y):
        z = product(P(None, None))(x, y).astype(jnp.float32)
        return reshard(z, P("fsdp", None))

    assert sent(mesh, program, x, y) == {("reduce-scatter", (F,)): 8 * 4 * 4}


def test_a_sum_over_two_axes_is_not(mesh):
    both = P(("data", "fsdp"))
    x, y = shaped(mesh, (16, 8), both), shaped(mesh, (16, 4), both)

    def program(x, y):
        return reshard(product(P(None, None))(x, y), P("fsdp", None))

    assert sent(mesh, program, x, y) == {("all-reduce", (D, F)): 8 * 4 * 4}


def test_a_sum_that_is_used_whole_is_reduced_once(mesh):
    x, y = shaped(mesh, (16, 8), P("fsdp")), shaped(mesh, (16, 4), P("fsdp"))

    def program(x, y):
        z = product(P(None, None))(x, y)
        return jnp.sin(z), reshard(z, P("fsdp", None))

    assert sent(mesh, program, x, y) == {("all-reduce", (F,)): 8 * 4 * 4}


def test_two_sums_are_added_before_they_are_reduced(mesh):
    x, y = shaped(mesh, (16, 8), P("fsdp")), shaped(mesh, (16, 4), P("fsdp"))

    def program(x, y):
        one = product(P(None, None))
        return one(x, y) + one(2 * x, y)

    assert sent(mesh, program, x, y) == {("all-reduce", (F,)): 8 * 4 * 4}


def test_a_rounded_sum_is_sent_rounded(mesh):
    x, y = shaped(mesh, (16, 8), P("fsdp")), shaped(mesh, (16, 4), P("fsdp"))

    def program(x, y):
        return product(P(None, None))(x, y).astype(jnp.bfloat16)

    assert sent(mesh, program, x, y) == {("all-reduce", (F,)): 8 * 4 * 2}


def scattered(x):
    return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)


def exchanged(x):
    return jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)


@pytest.mark.parametrize(
    ("named_by", "kind", "bytes"),
    [
        (lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", 4 * 256 * 4),
        (lambda x: jax.lax.pmax(x, ("fsdp", "tensor")), "all-reduce", 4 * 256 * 4),
        (scattered, "reduce-scatter", 4 * 256 * 4),
        (lambda x: jax.lax.all_gather(x, "fsdp"), "all-gather", 16 * 256 * 4),
        (exchanged, "all-to-all", 4 * 256 * 4),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]),
            "collective-permute",
            4 * 256 * 4,
        ),
    ],
)
def test_named_collectives(mesh, named_by, kind, bytes):
    def program(x):
        return jax.shard_map(
            lambda x: jnp.sin(named_by(x)).sum()[None],
            in_specs=P("fsdp"),
            out_specs=P(("fsdp", "data")),
            check_vma=False,
        )(x)

    found = sent(mesh, program, shaped(mesh, (16, 256), P("fsdp")))
    assert found == {(kind, (F,)): bytes}


def test_a_ragged_exchange_counts_the_smaller_side_in_whole_lanes(mesh):
    def local(x, sizes):
        room = jnp.zeros((32, 8))
        return jax.lax.ragged_all_to_all(
            x, room, sizes, sizes, sizes, sizes, axis_name="fsdp"
        )

    def program(x, sizes):
        specs = P("fsdp"), P()
        return jax.shard_map(
            local, in_specs=specs, out_specs=P("fsdp"), check_vma=False
        )(x, sizes)

    x, sizes = shaped(mesh, (64, 8), P("fsdp")), shaped(mesh, (4,), P(), jnp.int32)
    found = sent(mesh, program, x, sizes)
    assert found == {("ragged-all-to-all", (F,)): 16 * 128 * 4}


def test_axes_of_size_one_send_nothing(mesh):
    def program(x):
        return jax.shard_map(
            lambda x: jax.lax.psum(x, ("expert", "tensor")),
            in_specs=P("fsdp"),
            out_specs=P("fsdp"),
            check_vma=False,
        )(x)

    assert sent(mesh, program, shaped(mesh, (16, 8), P("fsdp"))) == {}


def test_the_compiled_program_sends_the_same(mesh):
    """XLA for the CPU makes no reduce-scatter; all else is as planned."""

    def program(w, x):
        def layer(x, w):
            w = reshard(w, P(None, None))
            return jnp.sin(jnp.einsum("bk,kn->bn", x, w)), None

        y, _ = jax.lax.scan(layer, x, w)
        return jnp.einsum("bk,bn->kn", y, y, out_sharding=P(None, None))

    w = shaped(mesh, (3, 64, 64), P(None, "fsdp"))
    x = shaped(mesh, (16, 64), P(("data", "fsdp")))
    text = jax.jit(program).lower(w, x).compile().as_text()
    expected = {
        ("all-gather", (F,)): 3 * 64 * 64 * 4,
        ("all-reduce", (D, F)): 64 * 64 * 4,
    }
    assert compiled_collectives(text, dict(mesh.shape)) == expected
    assert sent(mesh, program, w, x) == expected
