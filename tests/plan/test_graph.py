"""A jaxpr as one device runs it: calls written out, dead and doubled parts left out."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from dsjax.plan.graph import Block, graph
from dsjax.sharding import make_mesh


@pytest.fixture
def mesh():
    mesh = make_mesh(data=2, fsdp=4)
    with jax.set_mesh(mesh):
        yield mesh


WHOLE = P()


def shaped(mesh, shape, spec=WHOLE, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def traced(function, *arguments, platform="tpu") -> Block:
    return graph(jax.jit(function).trace(*arguments).jaxpr, platform=platform)


def names(block: Block) -> Counter:
    """Every operation's name, bodies included."""
    found = Counter(op.name for op in block.ops)
    for op in block.ops:
        for body in op.bodies:
            found += names(body)
    return found


def test_shapes_are_those_of_one_device(mesh):
    x = shaped(mesh, (16, 12), P("data", "fsdp"))
    (value,) = traced(lambda x: 2 * x, x).inputs
    assert value.shape == (8, 3)
    assert value.whole == (16, 12)
    assert value.bytes == 8 * 3 * 4
    assert value.spec == (("data",), ("fsdp",))


def test_inside_shard_map_shapes_are_local_already(mesh):
    def program(x):
        return jax.shard_map(jnp.sin, in_specs=P("fsdp"), out_specs=P("fsdp"))(x)

    block = traced(program, shaped(mesh, (16, 12), P("fsdp")))
    (sine,) = [op for op in block.ops if op.name == "sin"]
    assert sine.outputs[0].shape == (4, 12)
    assert block.outputs[0].shape == (4, 12)


def test_calls_are_written_out():
    @jax.custom_vjp
    def cube(x):
        return jax.jit(lambda x: x * x * x)(x)

    cube.defvjp(lambda x: (cube(x), x), lambda x, dy: (3 * x * x * dy,))
    found = names(traced(jax.checkpoint(cube), jnp.ones(3)))
    assert found == {"mul": 2}


def test_dead_operations_are_left_out():
    def program(x):
        jnp.sin(x)
        jax.lax.scan(lambda c, _: (c + 1, jnp.exp(x)), x, length=3)
        kept, _ = jax.lax.scan(lambda c, _: (c * x, jnp.cos(c)), x, length=3)
        return kept

    assert names(traced(program, jnp.ones(4))) == {"scan": 1, "mul": 1}


def test_a_carry_that_feeds_another_stays():
    def body(carry, _):
        a, b, c = carry
        return (a + b, b * 2.0, jnp.sin(c)), None

    def program(x):
        return jax.lax.scan(body, (x, x, x), length=3)[0][0]

    assert names(traced(program, jnp.ones(4))) == {"scan": 1, "add": 1, "mul": 1}


def test_equal_operations_are_done_once():
    def program(x):
        return jnp.sin(x * 2.0) + jnp.cos(x * 2.0) + jnp.cos(x * 3.0)

    found = names(traced(program, jnp.ones(4)))
    assert found == {"mul": 2, "sin": 1, "cos": 2, "add": 2}


@pytest.mark.parametrize(
    ("platform", "name"), [("tpu", "sin"), ("cuda", "cos"), ("cpu", "tan")]
)
def test_the_branch_of_the_platform_is_taken(platform, name):
    def choose(x):
        return jax.lax.platform_dependent(x, tpu=jnp.sin, cuda=jnp.cos, default=jnp.tan)

    def in_loop(x):  # its gradient takes the choice along, as data
        loop = jax.lax.scan(lambda c, _: (jax.checkpoint(choose)(c), None), x, length=2)
        return loop[0].sum()

    found = names(traced(jax.grad(in_loop), jnp.ones(4), platform=platform))
    assert "cond" not in found
    derivatives = {"sin": "cos", "cos": "sin", "tan": "tan"}
    assert found.keys() & {*derivatives} <= {name, derivatives[name]}


def test_where_the_compiler_chooses_the_layout_is_taken_from_operands(mesh):
    def program(table, rows):
        got = table.at[rows].get(out_sharding=P("data", None, None))
        return reshard(got, P("data", None, None))

    table, rows = shaped(mesh, (64, 8)), shaped(mesh, (16, 3), P("data"), jnp.int32)
    (gather,) = [op for op in traced(program, table, rows).ops if op.name == "gather"]
    assert gather.outputs[0].shape == (8, 3, 8)
