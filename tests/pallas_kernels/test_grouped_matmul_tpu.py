"""The grouped matmul for TPUs: its schedule, what it moves and multiplies, and what the
real TPU compiler makes of it. Its results are in `test_grouped_matmul.py`.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, pallas_tpu
from pallas_kernels.grouped_matmul import tiles_tpu as tiles
from pallas_kernels.grouped_matmul.api import KEPT
from pallas_kernels.grouped_matmul.work import outer_work, rows_work
from tests.pallas_kernels.aot import compile_for_tpu, tpu
from tests.pallas_kernels.interpret import interpreted, pallas_calls

MODELS = {"v3": (7168, 2048), "v2": (5120, 1536), "v2-lite": (2048, 1408)}  # D, F
CHIPS = {
    "v5e:2x2": "TPU v5 lite",
    "v5p:2x2x1": "TPU v5",
    "v6e:2x2": "TPU v6 lite",
    "tpu7x:2x2x1": "TPU7x",
}


def routed(rng, groups, rows):
    return rng.multinomial(rows, np.ones(groups) / groups).tolist()


# --- the schedule


@pytest.mark.parametrize("rows", [1, 256, 300, 1024])
@pytest.mark.parametrize("groups", [1, 7, 300])
@pytest.mark.parametrize("empty", [False, True])
def test_every_row_meets_its_matrix_once(rng, rows, groups, empty):
    sizes = rng.multinomial(rng.integers(rows + 1), rng.dirichlet(np.ones(groups) / 4))
    visits, count = tiles.schedule(jnp.asarray(sizes), rows=rows, tile=64, empty=empty)
    assert count < len(visits.group_V)  # the kernel looks one visit ahead
    owner, seen = np.full(-(-rows // 64) * 64, -1), set()
    for v in range(int(count)):
        group, tile, first, last = (int(field[v]) for field in visits[:4])
        begin, end = tile * 64 + first, tile * 64 + last
        assert (owner[begin:end] == -1).all()
        owner[begin:end] = group
        seen.add(group)
    expected = np.repeat(np.arange(groups), sizes)
    np.testing.assert_array_equal(owner[: len(expected)], expected)
    assert (owner[len(expected) :] == -1).all()
    visited = np.asarray(visits.tile_V)[: int(count)]
    assert (np.diff(visited) >= 0).all()  # a tile's visits are in a row
    if empty:  # every group's gradient is written
        assert seen == set(range(groups))
    else:  # every tile of rows is
        assert set(visited) == set(range(-(-rows // 64)))


@pytest.mark.parametrize(
    ("contracted", "out", "has", "expected"),
    [
        (7168, 2048, tiles.ONE, (256, 256)),
        (7168, 2048, tiles.SWIGLU, (256, 128)),
        (2048, 7168, tiles.ONE, (256, 1024)),
        (5120, 1536, tiles.ONE, (256, 384)),
        (2048, 1408, tiles.ONE, (256, 768)),
    ],
)
def test_tiles_are_as_wide_as_16_mebibytes_allow(contracted, out, has, expected):
    """Each element of x read is worth as many products as its tile has columns."""
    found = tiles.row_tiles(4096, contracted, out, 2, has)
    assert (found.rows, found.columns) == expected


# --- what is moved and multiplied

SIZES = [3, 0, 290, 0, 120, 30]  # of 512 rows
ROWS, OUT, INNER = 512, 512, 256


def counted(call, *operands):
    """Bytes copied for each operand, in their order, by name of the kernel's refs."""
    with interpreted() as copies:
        jax.block_until_ready(jax.jit(call)(*operands))
    return [copies[name] for name in sorted(copies)]


def arrays(rng, *shapes):
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize("turned", [True, False])
def test_rows_move_what_the_table_says(rng, turned):
    shape = (OUT, INNER) if turned else (INNER, OUT)
    x, w = arrays(rng, (ROWS, INNER), (len(SIZES), *shape))
    run = pallas_tpu.product if turned else pallas_tpu.row_gradient
    run = functools.partial(run, expected_rows=ROWS)
    said = rows_work(SIZES, rows=ROWS, contracted=INNER, out=OUT, turned=turned)
    expected = [said.moved[name] for name in ("x", "w", "y")]
    assert counted(run, x, w, jnp.asarray(SIZES)) == expected


def test_other_layers_are_never_read(rng):
    x, w = arrays(rng, (ROWS, INNER), (3, len(SIZES), OUT, INNER))

    def call(x, w, sizes):
        return grouped_matmul(x, w, sizes, layer=1, implementation="tpu")

    said = rows_work(SIZES, rows=ROWS, contracted=INNER, out=OUT)
    expected = [said.moved[name] for name in ("x", "w", "y")]
    assert counted(call, x, w, jnp.asarray(SIZES)) == expected


@pytest.mark.parametrize(
    "sizes", [[0, 5, 0, 100, 7, 0], [0, 256, 0, 0, 0, 0], [0] * 6], ids=str
)
def test_nothing_is_read_for_surplus_rows(rng, sizes):
    """Nor for empty groups: the one tile with rows, and the matrices of groups with any."""
    x, w, dy = arrays(rng, (ROWS, INNER), (6, OUT, INNER), (ROWS, OUT))
    run = functools.partial(pallas_tpu.product, expected_rows=ROWS)
    x_bytes, w_bytes, _ = counted(run, x, w, jnp.asarray(sizes))
    assert x_bytes == tiles.ROWS * INNER * 2
    assert w_bytes == max(np.count_nonzero(sizes), 1) * OUT * INNER * 2
    run = functools.partial(
        pallas_tpu.weight_gradient, dtype=jnp.float32, expected_rows=ROWS
    )
    *read, written = sorted(counted(run, dy, x, jnp.asarray(sizes)))
    assert read == [tiles.ROWS * INNER * 2, tiles.ROWS * OUT * 2]
    assert written == 6 * OUT * INNER * 4


def test_swiglu_moves_what_the_table_says(rng):
    x, gate, up = arrays(rng, (ROWS, INNER), *[(len(SIZES), OUT, INNER)] * 2)
    run = functools.partial(pallas_tpu.swiglu, expected_rows=ROWS)
    said = rows_work(
        SIZES, rows=ROWS, contracted=INNER, out=OUT, has=tiles.SWIGLU
    ).moved
    got = counted(run, x, gate, up, jnp.ones(ROWS), jnp.asarray(SIZES))
    x_bytes, *w_bytes, scale_bytes, y_bytes = got
    assert (x_bytes, sum(w_bytes), y_bytes) == (said["x"], said["w"], said["y"])
    assert scale_bytes * tiles.LANES == said["scale"]  # a column of whole lanes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_weight_gradient_moves_what_the_table_says(rng, dtype):
    dy, x = arrays(rng, (ROWS, OUT), (ROWS, INNER))
    run = functools.partial(pallas_tpu.weight_gradient, dtype=dtype, expected_rows=ROWS)
    bytes_each = jnp.dtype(dtype).itemsize
    said = outer_work(SIZES, rows=ROWS, N=OUT, K=INNER, out_bytes=bytes_each)
    expected = [said.moved[name] for name in ("dy", "x", "dw")]
    assert sorted(counted(run, dy, x, jnp.asarray(SIZES))) == sorted(expected)


def test_rows_multiply_what_the_table_says(rng, monkeypatch):
    """Every product is of one block of x and one of w read in full depth."""
    reads = []

    def dot(a, b, axes):
        reads.append((a.shape, b.shape))
        return jnp.full((a.shape[0], b.shape[0]), a.shape[0], jnp.float32)

    monkeypatch.setattr(pallas_tpu, "_dot", dot)
    x, w = arrays(rng, (ROWS, INNER), (len(SIZES), OUT, INNER))
    with interpreted():
        y = jax.jit(functools.partial(pallas_tpu.product, expected_rows=ROWS))(
            x, w, jnp.asarray(SIZES)
        )
        y = np.asarray(y[:, 0], np.float32)
    # Each row says how many rows were multiplied together with it.
    visits, count = tiles.schedule(
        jnp.asarray(SIZES), rows=ROWS, tile=tiles.ROWS, empty=False
    )
    total = 0
    for v in range(int(count)):
        tile, first, last = (int(field[v]) for field in visits[1:4])
        if last > first:
            (together,) = set(y[tile * tiles.ROWS + first : tile * tiles.ROWS + last])
            total += together
    said = rows_work(SIZES, rows=ROWS, contracted=INNER, out=OUT)
    assert said.flops == 2 * total * INNER * OUT
    assert said.flops_needed == 2 * sum(SIZES) * INNER * OUT


@pytest.mark.parametrize(("D", "F"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", CHIPS.values())
def test_targets(rng, monkeypatch, D, F, kind):
    """At most 1.15 times the operations, 1.05 the bytes of weights."""
    monkeypatch.setattr(tiles, "scoped_vmem", lambda: tiles.SCOPED_VMEM[kind])
    sizes = routed(rng, 8, 4096)
    products = [
        rows_work(sizes, rows=4096, contracted=D, out=F),
        rows_work(sizes, rows=4096, contracted=F, out=D, turned=False),
        rows_work(sizes, rows=4096, contracted=D, out=F, has=tiles.SWIGLU),
    ]
    assert all(said.ratio("w") == 1 for said in products)
    products.append(outer_work(sizes, rows=4096, N=F, K=D))
    assert products[-1].ratio("dw") == 1
    assert all(said.flops <= 1.15 * said.flops_needed for said in products)


@pytest.mark.parametrize(("D", "F"), MODELS.values(), ids=MODELS)
def test_targets_of_decoding(rng, D, F):
    """Two rows a group: weights of groups that have rows, once; those of others never."""
    sizes = routed(rng, 256, 512)
    assert 0 in sizes
    said = rows_work(sizes, rows=512, contracted=D, out=F)
    assert said.ratio("w") == 1
    assert said.ratio() <= 1.05


# --- what the compiler is told, and what it makes of it


def test_cost_is_of_the_expected_rows():
    x = jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4, 384, 256), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def both_ways(x, w, sizes):
        multiply = functools.partial(
            grouped_matmul, implementation="tpu", expected_rows=100
        )
        y, back = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
        return back(y)

    traced = jax.make_jaxpr(both_ways)(x, w, sizes)
    costs = [kernel.params["cost_estimate"] for kernel in pallas_calls(traced.jaxpr)]
    assert [cost.flops for cost in costs] == [2 * 100 * 384 * 256] * 3
    # x may be read twice, for two tiles of columns.
    rows, weights = 2 * 100 * (384 + 256), 2 * 4 * 384 * 256
    for cost in costs:
        assert rows + weights <= cost.bytes_accessed <= 2 * rows + weights


def compiled(chip, call, *shapes):
    """The compiled program, in the knowledge of the chip."""
    with jax.set_mesh(Mesh(np.array(tpu(chip).devices[:1]), ("x",))):
        assert tiles.scoped_vmem() == tiles.SCOPED_VMEM[CHIPS[chip]]
        return compile_for_tpu(chip, call, *shapes).as_text()


def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def sizes_spec(groups):
    return spec(groups, dtype=jnp.int32)


def kernels(text):
    """How many kernels are in a program without copies of operands or results, except
    for a scale's column.
    """
    assert not re.findall(
        r"= (?:bf16|f32)\[\d+,(?!1\])[^=]* (?:copy|transpose)\(", text
    )
    return text.count('custom_call_target="tpu_custom_call"')


def product_both_ways(x, w, sizes, dy):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *back(dy)


def compile_product(chip, groups, rows, outer, inner, dtype=jnp.bfloat16):
    spec_of = functools.partial(spec, dtype=dtype)
    operands = spec_of(rows, inner), spec_of(groups, outer, inner)
    text = compiled(
        chip, product_both_ways, *operands, sizes_spec(groups), spec_of(rows, outer)
    )
    assert kernels(text) == 3


def compile_swiglu(chip, groups, rows, D, F):
    def both_ways(x, gate, up, scale, sizes, dh):
        h, back = jax.vjp(
            lambda *operands: grouped_swiglu(*operands[:3], sizes, scale_M=operands[3]),
            *(x, gate, up, scale),
        )
        return h, *back(dh)

    weights, scale = spec(groups, F, D), spec(rows, dtype=jnp.float32)
    operands = (spec(rows, D), weights, weights, scale, sizes_spec(groups))
    assert kernels(compiled(chip, both_ways, *operands, spec(rows, F))) == 4


def compile_decoding(chip, groups, rows, D, F):
    def experts(x, gate, up, down, sizes):
        return grouped_matmul(grouped_swiglu(x, gate, up, sizes), down, sizes)

    weights = spec(groups, F, D), spec(groups, F, D), spec(groups, D, F)
    text = compiled(chip, experts, spec(rows, D), *weights, sizes_spec(groups))
    assert kernels(text) == 2


def compile_layers(chip, groups, rows, D, F, layers=3):
    """A scanned decode step: no layer's weights are cut out of the stack."""

    def step(x, gate, up, down, sizes):
        def layer(x, number):
            h = grouped_swiglu(x, gate, up, sizes, layer=number)
            return x + grouped_matmul(h, down, sizes, layer=number), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    shapes = [(layers, groups, F, D), (layers, groups, F, D), (layers, groups, D, F)]
    weights = [spec(*shape) for shape in shapes]
    text = compiled(chip, step, spec(rows, D), *weights, sizes_spec(groups))
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert f"bf16[{layers},{groups},{F},{D}]" in text
    assert not re.findall(rf"\[(?:1,)?{groups},(?:{F},{D}|{D},{F})\]", text)


def test_layers_are_read_where_they_lie():
    compile_layers("v6e:2x2", 4, 4096, *MODELS["v3"])


def test_compiles_for_a_v5p():
    compile_product("v5p:2x2x1", 8, 4096, *reversed(MODELS["v3"]))


def test_compiles_for_a_v6e():
    compile_swiglu("v6e:2x2", 8, 4096, *MODELS["v2-lite"])


def test_compiles_for_a_v5e():
    compile_decoding("v5e:2x2", 32, 512, *MODELS["v3"])


def test_compiles_for_a_tpu7x():
    compile_decoding("tpu7x:2x2x1", 256, 512, *MODELS["v3"])


def test_what_is_kept_is_not_computed_again():
    def loss(x, gate, up, sizes):
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        layer = jax.checkpoint(
            lambda x: grouped_swiglu(x, gate, up, sizes), policy=policy
        )
        return (layer(x).astype(jnp.float32) ** 2).sum()

    weights = spec(4, 256, 256)
    text = compiled(
        "v5p:2x2x1", jax.grad(loss), spec(512, 256), weights, weights, sizes_spec(4)
    )
    results = re.findall(r"= (.*?) custom-call\(.*tpu_custom_call", text)
    assert sorted(result.count("bf16[") for result in results) == [1, 2]


HBM = {"v5e:2x2": 15.75, "v5p:2x2x1": 95.74, "v6e:2x2": 31.25, "tpu7x:2x2x1": 94.75}


def those_that_fit(shapes, matrices):
    """(chip, groups, rows, D, F) where so many weights of bfloat16 leave some room."""
    for chip, (D, F), (groups, rows) in itertools.product(
        CHIPS, MODELS.values(), shapes
    ):
        if 2 * matrices * groups * D * F < 0.8 * HBM[chip] * 2**30:
            yield chip, groups, rows, D, F


TRAINING = [(4, 65536), (8, 4096), (32, 8192), (64, 6000), (256, 32768)]
DECODING = [(256, 512), (256, 8), (64, 6), (32, 4096), (4, 64)]


@pytest.mark.aot
@pytest.mark.parametrize("case", list(those_that_fit(TRAINING, 4)), ids=str)
def test_compiles_for_training(case):
    chip, groups, rows, D, F = case
    for outer, inner in [(F, D), (D, F)]:
        compile_product(chip, groups, rows, outer, inner)
    compile_swiglu(chip, groups, rows, D, F)


@pytest.mark.aot
@pytest.mark.parametrize("case", list(those_that_fit(DECODING, 3)), ids=str)
def test_compiles_for_decoding(case):
    compile_decoding(*case)


@pytest.mark.aot
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("D", "F"), MODELS.values(), ids=MODELS)
def test_layers_are_read_where_they_lie_anywhere(chip, D, F):
    # A stack as small as three layers of V2-Lite's would be brought to VMEM as a whole.
    compile_layers(chip, 4, 4096, D, F, layers=12)
    compile_layers(chip, 16, 6, D, F)


@pytest.mark.aot
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("D", "F"), MODELS.values(), ids=MODELS)
def test_compiles_in_float32(chip, D, F):
    for outer, inner in itertools.permutations((D, F)):
        compile_product(chip, 8, 1024, outer, inner, jnp.float32)
