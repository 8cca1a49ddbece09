"""The Hopper kernels of the grouped matmul: the schedule anywhere, the kernels
interpreted and the compiled code on any machine, the results on a GPU (`pytest -m gpu`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import (
    grouped_feed_forward,
    grouped_matmul,
    grouped_swiglu,
    ring_gpu,
    rows_gpu,
    swiglu_gradient_gpu,
    weights_gpu,
)
from pallas_kernels.grouped_matmul.api import feed_forward as dense_feed_forward
from pallas_kernels.grouped_matmul.items_gpu import Grid, Items, schedule_items
from pallas_kernels.grouped_matmul.pallas_gpu import weight_gradients
from pallas_kernels.grouped_matmul.ring_gpu import BackAndForth
from pallas_kernels.grouped_matmul.rows_gpu import multiply_rows
from pallas_kernels.grouped_matmul.swiglu_gradient_gpu import swiglu_gradient
from pallas_kernels.grouped_matmul.tiles_gpu import (
    LARGE,
    LINE,
    LONG,
    Tiles,
    by_size,
    place,
    place_by_group,
    row_tiles,
    schedule,
    tile_count,
    walk,
    weight_tiles,
)
from tests.pallas_kernels.h200 import compile_for_h200
from tests.pallas_kernels.interpret_gpu import copy_rows, interpreted

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
@pytest.mark.parametrize(("across", "band"), [(1, 16), (7, 16), (7, 2)])
def test_walked_by_group_every_row_is_in_one_tile_of_each_column(sizes, across, band):
    tile = 128
    tiles = schedule(jnp.asarray(sizes), M, tile)
    owner, groups = np.full((M, across), -1), []
    for index in range(int(tile_count(tiles, M, tile)) * across):
        found = place_by_group(tiles, index, across, tile, band)
        group, start, count, column = map(int, found)
        rows = slice(start, start + count)
        assert count > 0
        assert (owner[rows, column] == -1).all()
        owner[rows, column] = group
        groups.append(group)
    surplus = len(sizes), M - sum(sizes)
    expected = np.repeat(range(len(sizes) + 1), [*sizes, surplus[1]])
    np.testing.assert_array_equal(owner, np.stack([expected] * across, 1))
    assert groups == sorted(groups)


CLUSTERS = 5


@functools.partial(jax.jit, static_argnums=1)
def all_items(sizes, grid):
    """Groups and items in order, and further ones that are not; how many are each
    cluster's, and which.
    """
    table = schedule_items(sizes, grid)
    found = jax.vmap(Items(table, grid, 0).item)(jnp.arange(grid.most))

    def of_cluster(cluster):
        items = Items(table, grid, cluster)
        return items.count, jax.vmap(items.number)(jnp.arange(grid.waves))

    return *found, *jax.vmap(of_cluster)(jnp.arange(grid.clusters))


def random_sizes(count, groups=8):
    """As in SIZES, and many more: some groups empty, some not of whole units, and mostly
    some rows of no group.
    """
    rng = np.random.default_rng(0)
    yield from (np.pad(sizes, (0, groups - len(sizes))) for sizes in SIZES.values())
    for _ in range(count):
        shares = rng.dirichlet([rng.choice([0.2, 1, 10])] * (groups + 1))
        yield rng.multinomial(M, shares)[:groups]


@pytest.mark.parametrize("across", [1, 2, 7, 16])
@pytest.mark.parametrize(("unit", "band"), [(64, 8), (64, 2), (128, 1)])
def test_every_row_is_in_one_item_of_each_column(across, unit, band):
    for sizes in random_sizes(40):
        grid = Grid(M, len(sizes), unit, across, band, CLUSTERS)
        found = jax.tree.map(np.asarray, all_items(sizes, grid))
        groups, items, counts, _ = found
        assert counts.sum() <= grid.most
        owner = np.full((M, across), -1)
        for number in range(counts.sum()):
            group = groups[number]
            row, rows, column, wide, light, _ = (field[number] for field in items)
            here = owner[row : row + rows, column : column + 1 + wide]
            assert here.shape == (rows, 1 + wide)
            units = -(-rows // unit)
            assert 0 < units <= (2 if wide else 4)
            assert light == (units <= (1 if wide else 2))
            assert (here == -1).all()
            here[:] = group
        expected = np.repeat(range(len(sizes) + 1), [*sizes, M - sum(sizes)])
        np.testing.assert_array_equal(owner, np.stack([expected] * across, 1))


@pytest.mark.parametrize("across", [1, 2, 7, 16])
@pytest.mark.parametrize(("unit", "band"), [(64, 8), (64, 2), (128, 1)])
def test_every_item_is_done_once_and_clusters_have_as_many_of_each_kind(
    across, unit, band
):
    for sizes in random_sizes(40):
        grid = Grid(M, len(sizes), unit, across, band, CLUSTERS)
        found = jax.tree.map(np.asarray, all_items(sizes, grid))
        _, items, counts, order = found
        assert counts.max() < grid.waves
        mine = [each[:count] for each, count in zip(order, counts)]
        assert sorted(np.concatenate(mine)) == list(range(counts.sum()))
        assert all((np.diff(each) > 0).all() for each in mine)
        light = [items.light[each].sum() for each in mine]
        assert max(light) - min(light) <= 1
        assert np.ptp(counts - light) <= 1 and np.ptp(counts) <= 1


def test_items_that_share_a_matrix_or_rows_follow_each_other():
    rows, groups, across = 24576, 64, 11
    shares = np.random.default_rng(0).dirichlet([5.0] * groups)
    sizes = np.diff(np.round(np.cumsum(shares) * rows).astype(int), prepend=0)
    grid = Grid(rows, groups, 64, across, 8, 66)
    found = jax.tree.map(np.asarray, all_items(jnp.asarray(sizes), grid))
    group, item, counts, _ = found
    count = counts.sum()
    assert (np.diff(group[:count]) >= 0).all()
    for each in range(groups):
        columns = item.column[:count][group[:count] == each]
        both = columns // 2  # of whole bands one after the other: here there is one
        assert (np.diff(both) >= 0).all() and both.max() == across // 2
        assert max(np.bincount(both)) <= 2 * -(-sizes[each] // 256) + 2


@pytest.mark.parametrize("tiles", [0, 3, 5, 12, 15, 19])
def test_back_and_forth_every_tile_is_done_once(tiles):
    clusters, done = 5, []
    for cluster in range(clusters):
        order = BackAndForth(tiles, clusters, cluster)
        mine = [int(order.number(wave)) for wave in range(int(order.count))]
        assert all(number // clusters == wave for wave, number in enumerate(mine))
        done += mine
    assert sorted(done) == list(range(tiles))


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
    def sizes(outer, **options):
        return row_tiles(32768, 64, outer, 1024, **options)[:2]

    assert sizes(4096, turned=True) == (128, 256)
    assert sizes(896, turned=True) == (128, 224)
    assert sizes(896, turned=False) == (256, 128)
    assert sizes(896, turned=True, parts=2) == (128, 256)
    assert weight_tiles(32768, 64, 896, 1280)[:2] == (128, 256)
    assert weight_tiles(32768, 64, 1280, 896)[:2] == (256, 128)


def test_blocks_share_what_they_read_unless_tiles_are_tall():
    def tiles(rows, inner=1024, outer=512, **options):
        tiles = row_tiles(rows, 64, outer, inner, **{"turned": True} | options)
        return tiles.pair, tiles.by_group

    sizes = 2**13, 2**15, 2**17
    assert [tiles(rows) for rows in sizes] == [
        (True, True),
        (True, False),
        (True, False),
    ]
    tall = [tiles(rows, outer=896, turned=False) for rows in sizes]
    assert tall == [(False, True), (False, True), (False, False)]


def test_items_are_of_middling_groups_and_of_large_ones_with_long_rows():
    def items(rows, inner, outer=512, turned=True):
        return row_tiles(rows, 8, outer, inner, turned=turned).items

    assert [items(2**15, inner) for inner in (2048, 4096, 7168)] == [False, True, True]
    assert [items(rows, 7168) for rows in (2**10, 2**12, 2**13)] == [False, True, True]
    assert [items(rows, 1024) for rows in (2**10, 2**12, 2**13)] == [False, True, False]
    assert not items(2**15, 7168, outer=896, turned=False)  # tiles of 256 rows
    takes = [
        row_tiles(rows_of(groups), groups, *SHAPES[groups], turned=True).items
        for groups in SHAPES
    ]
    assert takes == [groups in (3, 4, 5, 7) for groups in SHAPES]
    N, K = SHAPES[8]
    assert row_tiles(rows_of(8), 8, K, N, turned=False).items


def test_blocks_share_x_where_no_tile_is_left_over():
    assert weight_tiles(2**15, 64, 2816, 2048).pair
    assert not weight_tiles(2**15, 64, 1408, 2048).pair
    assert not weight_tiles(2**17, 64, 2816, 2048).pair


def test_blocks_share_x_where_each_has_a_gradient_of_its_own():
    for rows, outer, inner in [(2**17, 896, 1280), (2**17, 1280, 896), (8, 64, 128)]:
        two = weight_tiles(rows, 64, outer, inner, two=True)
        one = weight_tiles(rows, 64, outer, inner)
        assert two.pair and two[:2] == one[:2]


def test_what_it_does_not_take_is_said():
    x, w, sizes = jnp.ones((8, 64)), jnp.ones((2, 64, 64)), jnp.array([4, 4])
    with pytest.raises(NotImplementedError, match=r"Hopper.*bfloat16.*float32"):
        grouped_matmul(x, w, sizes, implementation="hopper")


COMPILE = """
from pallas_kernels.grouped_matmul import (
    grouped_feed_forward,
    grouped_matmul,
    grouped_swiglu,
)
from pallas_kernels.grouped_matmul.api import feed_forward as dense_feed_forward


def dense(x, w, sizes, dh):
    y, back = jax.vjp(dense_feed_forward, x, w[0], w[0], w[0].T)
    return y, *back(x)


def product(x, w, sizes, dy):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *back(dy)


def swiglu(x, w, sizes, dh):
    h = grouped_swiglu(x, w, w, sizes)

    def kept(x, gate, up):
        return grouped_swiglu(x, gate, up, sizes, keep_result=True)

    _, back = jax.vjp(lambda x, gate, up: grouped_swiglu(x, gate, up, sizes), x, w, w)
    return h, *jax.vjp(kept, x, w, w)[0:1], *back(dh)


def feed_forward(x, w, sizes, dh):
    def kept(x, gate, up, down):
        options = {{"keep_result": True}}
        return grouped_feed_forward(x, gate, up, down, sizes, **options)

    down = w.swapaxes(1, 2)
    y, back = jax.vjp(kept, x, w, w, down)
    return y, *back(x)


def decode(x, w, sizes, _):
    stack = w.reshape(2, -1, *w.shape[1:])  # two layers

    def layer(x, number):
        h = grouped_swiglu(x, stack, stack, sizes[: stack.shape[1]], layer=number)
        return x + h, None

    return jax.lax.scan(layer, x, jnp.arange(2))[0]


M, G, N, K = {shape}
operands = (
    shape(M, K),
    shape(G, N, K, dtype=jnp.{weights}),
    shape(G, dtype=jnp.int32),
    shape(M, N),
)
compiled = jax.jit({function}).lower(*operands).compile()
print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
print("temporaries:", compiled.memory_analysis().temp_size_in_bytes)
"""
UP = (229376, 64, 896, 1280)  # of a mixture of 1.9B parameters
DOWN = (229376, 64, 1280, 896)
aot = pytest.mark.aot


@pytest.mark.parametrize(
    ("function", "shape", "weights"),
    [
        ("product", DOWN, "float32"),
        ("feed_forward", UP, "bfloat16"),
        ("decode", (64, 128, 1024, 1024), "bfloat16"),
        pytest.param("product", UP, "bfloat16", marks=aot),
        pytest.param("dense", (32768, 1, 896, 1280), "bfloat16", marks=aot),
        pytest.param("swiglu", UP, "float32", marks=aot),
        pytest.param("swiglu", DOWN, "bfloat16", marks=aot),
        # an expert-parallel slice of V3, V3 on one device, V2-Lite, and sizes that no
        # tile divides
        pytest.param("product", (32768, 8, 4096, 7168), "bfloat16", marks=aot),
        pytest.param("feed_forward", (32768, 8, 4096, 7168), "bfloat16", marks=aot),
        pytest.param("swiglu", (32768, 8, 4096, 7168), "bfloat16", marks=aot),
        pytest.param("product", (32768, 256, 4096, 7168), "bfloat16", marks=aot),
        pytest.param("product", (24576, 64, 2816, 2048), "bfloat16", marks=aot),
        pytest.param("swiglu", (24576, 64, 1408, 2048), "bfloat16", marks=aot),
        pytest.param("product", (2043, 3, 192, 320), "bfloat16", marks=aot),
        pytest.param("swiglu", (100, 3, 200, 104), "bfloat16", marks=aot),
        pytest.param("product", (2048, 5, 896, 64), "bfloat16", marks=aot),
        pytest.param("feed_forward", (24576, 64, 1408, 2048), "bfloat16", marks=aot),
        pytest.param("feed_forward", (2043, 3, 200, 104), "bfloat16", marks=aot),
        pytest.param("feed_forward", (32768, 8, 2048, 7168), "float32", marks=aot),
        pytest.param("dense", (8192, 1, 18432, 7168), "bfloat16", marks=aot),
    ],
    ids=str,
)
def test_compiles_for_an_h200_without_spills(function, shape, weights):
    program = COMPILE.format(function=function, shape=shape, weights=weights)
    printed, _ = compile_for_h200(program)
    kernels = {"product": 3, "swiglu": 5, "feed_forward": 6, "dense": 2, "decode": 1}
    kernels = kernels[function]
    assert f"kernels: {kernels}" in printed
    if function == "decode":  # no layer is cut out of the stack
        assert int(printed.split("temporaries:")[1]) < 2**24


# Rows a group decide which blocks share matrices: small, medium and large groups. Two
# have sizes of one line; two large ones have long rows, of x or of dy, and an odd number
# of tiles across. Groups: N, K.
SHAPES = {
    16: (256, 384),
    4: (192, 320),
    3: (896, 128),
    2: (200, 104),
    5: (896, 64),
    6: (64, 704),
    7: (768, 4096),
    8: (4096, 768),
}


def rows_of(groups):
    """M where rows are short; where they are long, enough for groups to be large."""
    return LARGE * groups if max(SHAPES[groups]) >= LONG else M


def uneven_sizes(groups):
    """By name: what is to be right for any."""
    rng, rows = np.random.default_rng(groups), rows_of(groups)
    shares = rng.multinomial(rows, rng.dirichlet([2.0] * groups))
    return {
        "uneven": shares,
        "an empty one": np.where(np.arange(groups) == 1, 0, shares),
        "one has all": np.eye(groups, dtype=int)[-1] * rows,
        "tiny ones": np.arange(groups) % 8,
        "exact tiles": np.full(groups, 128),
        "one more": np.full(groups, 65),
        "surplus rows": shares // 2,
        "none": np.zeros(groups, int),
    }


def operands(groups, surplus_from, weights=jnp.bfloat16):
    """x, gate, up, dy, scale; what surplus rows hold is not to matter."""
    (N, K), rng = SHAPES[groups], np.random.default_rng(groups)
    rows = rows_of(groups)
    shapes = (rows, K), (groups, N, K), (groups, N, K), (rows, N)
    x, gate, up, dy = (rng.standard_normal(shape) for shape in shapes)
    x[surplus_from:], dy[surplus_from:] = np.nan, np.nan
    scale = jnp.asarray(rng.random(rows), jnp.float32)
    x, dy = (jnp.asarray(a, jnp.bfloat16) for a in (x, dy))
    gate, up = (jnp.asarray(w / 16, jnp.bfloat16).astype(weights) for w in (gate, up))
    return x, gate, up, dy, scale


def wide(*arrays):
    return [np.nan_to_num(np.asarray(array, np.float32)) for array in arrays]


def product_by_hand(x, w, dy, sizes):
    """y, dx and dw, in float32."""
    y, dx, dw, start = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows] = x[rows] @ w[group].T, dy[rows] @ w[group]
        dw[group] = dy[rows].T @ x[rows]
        start += size
    return y, dx, dw


def swiglu_by_hand(x, gate, up, dh, scale, sizes):
    """h, dx, dgate, dup and dscale, in float32."""
    gated, *_ = product_by_hand(x, gate, dh, sizes)
    lifted, *_ = product_by_hand(x, up, dh, sizes)
    h, dgated, dlifted, dscale = swiglu_of_products_by_hand(gated, lifted, dh, scale)
    _, from_gate, dgate = product_by_hand(x, gate, dgated, sizes)
    _, from_up, dup = product_by_hand(x, up, dlifted, sizes)
    return h, from_gate + from_up, dgate, dup, dscale


def swiglu_of_products_by_hand(gated, lifted, dh, scale):
    """h, dgated, dlifted and dscale, in float32."""
    sigmoid, each = 1 / (1 + np.exp(-gated)), scale[:, None]
    silu = gated * sigmoid
    slope = sigmoid * (1 + gated * (1 - sigmoid))
    gradients = (
        dh * lifted * each * slope,
        dh * silu * each,
        (dh * silu * lifted).sum(1),
    )
    return silu * lifted * each, *gradients


def check(found, expected, tolerance=3e-3):
    for got, want in zip(found, expected, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - want)
        assert error <= tolerance * np.linalg.norm(want)


def add_slices_by_hand(sums, dy, x, slices, **_):
    """What `outer_gpu.add_slices` does in assembly."""
    mine = jnp.arange(LINE)[:, None] < 16 * slices
    dy, x = (jnp.where(mine, a[...].astype(jnp.float32), 0) for a in (dy, x))
    return sums + dy.T @ x


def keep_rows_by_hand(tile, first, last, **_):
    """What `outer_gpu.keep_rows` does in assembly."""
    row = jnp.arange(LINE)[:, None]
    tile[...] = jnp.where((row >= first) & (row < last), tile[...], 0)
    plgpu.commit_smem()


@pytest.fixture
def on_eight_multiprocessors(monkeypatch):
    """As the interpreter can have it: so that blocks have several tiles each, or none."""
    monkeypatch.setattr(ring_gpu, "SMS", 8)
    monkeypatch.setattr(weights_gpu, "add_slices", add_slices_by_hand)
    monkeypatch.setattr(weights_gpu, "keep_rows", keep_rows_by_hand)
    for kernel in (rows_gpu, swiglu_gradient_gpu):
        monkeypatch.setattr(kernel, "copy_rows", copy_rows)


FEW = [5, 70, 0, 129, 64, 333]  # rows of groups; 40 more are nobody's
WAYS = {
    "rows of tiles": Tiles(128, 256),
    "tall": Tiles(256, 128),
    "by group": Tiles(128, 256, by_group=True, band=2),
    "pairs": Tiles(128, 256, pair=True),
    "items": Tiles(128, 256, pair=True, items=True),
}


def few_operands(*widths, matrices=()):
    """bfloat16, and a scale; NaN where rows are nobody's."""
    rng, rows, mine = np.random.default_rng(0), sum(FEW) + 40, sum(FEW)
    arrays = [rng.standard_normal((rows, width)) for width in widths]
    for array in arrays:
        array[mine:] = np.nan
    arrays += [rng.standard_normal((len(FEW), *shape)) / 16 for shape in matrices]
    scale = jnp.asarray(rng.random(rows), jnp.float32)
    return *(jnp.asarray(array, jnp.bfloat16) for array in arrays), scale


def by_interpreter(kernel, *operands, **options):
    with interpreted():
        return jax.block_until_ready(kernel(*operands, jnp.asarray(FEW), **options))


@pytest.mark.parametrize("tiles", WAYS.values(), ids=WAYS)
@pytest.mark.usefixtures("on_eight_multiprocessors")
def test_products_interpreted(tiles):
    """Also the sum of two by rows, as where SwiGLU's gradients come together."""
    x, dy, w, _ = few_operands(192, 384, matrices=[(384, 192)])
    y, dx, _ = product_by_hand(*wide(x, w, dy), FEW)
    found = by_interpreter(multiply_rows, [x], [w], turned=True, tiles=tiles)
    check(found, [y])
    twice = by_interpreter(multiply_rows, [dy, dy], [w, w], turned=False, tiles=tiles)
    check(twice, [2 * dx])


@pytest.mark.parametrize("way", ["rows of tiles", "pairs", "items"])
@pytest.mark.usefixtures("on_eight_multiprocessors")
def test_swiglu_interpreted(way):
    tiles = WAYS[way]
    x, dh, gate, up, scale = few_operands(128, 320, matrices=[(320, 128)] * 2)
    h, *_ = swiglu_by_hand(*wide(x, gate, up, dh, scale), FEW)
    gated, lifted = (product_by_hand(*wide(x, w, dh), FEW)[0] for w in (gate, up))
    options = {"turned": True, "scale_M": scale, "tiles": tiles}
    found = by_interpreter(multiply_rows, [x], [gate, up], products=False, **options)
    check(found, [h])
    found = by_interpreter(multiply_rows, [x], [gate, up], **options)
    check(found[:2], [gated, lifted])
    check(found[2:], [h], tolerance=4e-3)  # of products that are rounded


@pytest.mark.parametrize("way", ["rows of tiles", "pairs"])
@pytest.mark.usefixtures("on_eight_multiprocessors")
def test_gradient_of_swiglu_interpreted(way):
    dy, gated, lifted, w, scale = few_operands(128, 320, 320, matrices=[(128, 320)])
    gated, lifted = map(jnp.nan_to_num, (gated, lifted))  # as the kernels make them

    def run(sizes, **options):
        return swiglu_gradient(dy, w, gated, lifted, scale, sizes, **options)

    found = by_interpreter(run, tiles=WAYS[way])
    dy, gated, lifted, w, scale = wide(dy, gated, lifted, w, scale)
    _, dh, _ = product_by_hand(np.zeros_like(gated), w, dy, FEW)
    _, *expected = swiglu_of_products_by_hand(gated, lifted, dh, scale)
    check(found, expected)


# Blocks alone and in pairs, tall tiles and wide ones; and two gradients at once.
@pytest.mark.parametrize(
    ("outer", "inner", "count", "dtype"),
    [
        (384, 256, 1, jnp.bfloat16),
        (256, 256, 1, jnp.bfloat16),
        (256, 128, 1, jnp.bfloat16),
        (384, 256, 2, jnp.bfloat16),
        (384, 256, 1, jnp.float32),
    ],
)
@pytest.mark.usefixtures("on_eight_multiprocessors")
def test_gradient_by_weights_interpreted(outer, inner, count, dtype):
    *dys, x, _ = few_operands(*[outer] * count, inner)
    found = by_interpreter(weight_gradients, dys, x, dtype=dtype)
    w = np.zeros((len(FEW), outer, inner))
    expected = [product_by_hand(*wide(x, w, dy), FEW)[2] for dy in dys]
    check(found, expected, tolerance=3e-3 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.usefixtures("on_eight_multiprocessors")
def test_results_that_are_written_over_too_early_are_a_race(monkeypatch):
    """What the tests above rest on: of a planted mistake they say so."""
    wait = plgpu.wait_smem_to_gmem
    monkeypatch.setattr(
        plgpu, "wait_smem_to_gmem", lambda n, **options: n or wait(n, **options)
    )
    x, w, _ = few_operands(192, matrices=[(384, 192)])
    options = {"turned": True, "tiles": WAYS["rows of tiles"]}
    with pytest.raises(AssertionError, match="a race"):
        by_interpreter(multiply_rows, [x], [w], **options)


@functools.partial(jax.jit, static_argnums=0)
def and_gradients(function, sizes, *operands_and_cotangent):
    """`function` of the sizes and operands, and the gradients of the latter."""
    *operands, cotangent = operands_and_cotangent
    out, back = jax.vjp(functools.partial(function, sizes), *operands)
    return out, *back(cotangent)


def product(sizes, x, w):
    return grouped_matmul(x, w, sizes, implementation="hopper")


def swiglu(keep_result, sizes, x, gate, up, scale):
    options = {"implementation": "hopper", "keep_result": keep_result}
    return grouped_swiglu(x, gate, up, sizes, scale_M=scale, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", SHAPES)
def test_product_and_gradients_equal_float32_on_the_gpu(groups):
    for sizes in uneven_sizes(groups).values():
        x, w, _, dy, _ = operands(groups, sizes.sum())
        found = and_gradients(product, jnp.asarray(sizes), x, w, dy)
        check(found, product_by_hand(*wide(x, w, dy), sizes))


@pytest.mark.gpu
def test_gradient_of_float32_weights_is_not_rounded_on_the_gpu():
    sizes = uneven_sizes(4)["uneven"]
    x, w, _, dy, _ = operands(4, M, jnp.float32)
    *_, dw = and_gradients(product, jnp.asarray(sizes), x, w, dy)
    assert dw.dtype == jnp.float32
    check([dw], product_by_hand(*wide(x, w, dy), sizes)[2:], tolerance=1e-5)


# Blocks alone and in pairs, tall tiles and wide ones; and two gradients at once.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("outer", "inner", "count"),
    [(384, 256, 1), (256, 256, 1), (256, 128, 1), (384, 256, 2)],
)
def test_gradient_by_weights_of_any_number_of_rows_on_the_gpu(outer, inner, count):
    """Groups end after 1 to 64 of the rows that are multiplied at once, and before rows
    of others or of nobody.
    """
    rng = np.random.default_rng(384)  # finds all that there are
    sizes = rng.integers(1, 200, 320)
    ends, rows = np.cumsum(sizes), int(sizes.sum()) + 40
    assert len({*(((ends - sizes) % 8 + sizes) % 64)}) == 64
    tiles = weight_tiles(rows, len(sizes), outer, inner, two=count == 2)
    assert tiles.pair == ((outer, count) != (384, 1) and inner == 256)
    x, *dys = (
        rng.standard_normal((rows, width)) for width in (inner, *[outer] * count)
    )
    for a in (x, *dys):
        a[sizes.sum() :] = np.nan
    x, *dys = (jnp.asarray(a, jnp.bfloat16) for a in (x, *dys))
    found = jax.jit(functools.partial(weight_gradients, dtype=jnp.float32))(
        dys, x, jnp.asarray(sizes)
    )
    for got, dy in zip(found, dys, strict=True):
        of_groups = zip(*(np.split(a, ends)[:-1] for a in wide(dy, x)))
        check(got, [dy.T @ x for dy, x in of_groups], tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("groups", "keep_result"), [(16, False), (4, True), (2, True), (7, True), (8, True)]
)
def test_swiglu_equals_float32_on_the_gpu(groups, keep_result):
    run, alone = (
        functools.partial(swiglu, keep_result),
        jax.jit(swiglu, static_argnums=0),
    )
    for sizes in uneven_sizes(groups).values():
        x, gate, up, dh, scale = operands(groups, rows_of(groups))
        expected = swiglu_by_hand(*wide(x, gate, up, dh, scale), sizes)
        operand, sizes = (x, gate, up, scale), jnp.asarray(sizes)
        check([alone(False, sizes, *operand)], expected[:1])
        # The gradient's own operands are rounded, too.
        check(and_gradients(run, sizes, *operand, dh), expected, tolerance=6e-3)


def feed_forward(sizes, x, gate, up, down, scale):
    options = {"implementation": "hopper", "keep_result": True}
    return grouped_feed_forward(x, gate, up, down, sizes, scale_M=scale, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", SHAPES)
def test_feed_forward_equals_float32_on_the_gpu(groups):
    for sizes in uneven_sizes(groups).values():
        x, gate, up, h, scale = operands(groups, sizes.sum())
        dy, down = jnp.flip(x, 1), jnp.flip(up.swapaxes(1, 2), 2)
        operand = x, gate, up, down, scale
        found = and_gradients(feed_forward, jnp.asarray(sizes), *operand, dy)
        x, gate, up, down, scale, dy, h = wide(*operand, dy, h)
        h, *_ = swiglu_by_hand(x, gate, up, h, scale, sizes)
        y, dh, ddown = product_by_hand(h, down, dy, sizes)
        _, *into, dscale = swiglu_by_hand(x, gate, up, dh, scale, sizes)
        check(found, (y, *into, ddown, dscale), tolerance=8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "F"), [(256, 896), (640, 192)])
def test_dense_feed_forward_equals_float32_on_the_gpu(D, F):
    rng, whole = np.random.default_rng(D), [M]
    shapes = (M, D), (F, D), (F, D), (D, F), (M, D)
    scales = 1, 1 / 16, 1 / 16, 1 / 16, 1
    x, gate, up, down, dy = (
        jnp.asarray(scale * rng.standard_normal(shape), jnp.bfloat16)
        for shape, scale in zip(shapes, scales)
    )
    run = functools.partial(dense_feed_forward, implementation="hopper")
    y, back = jax.jit(lambda *operands: jax.vjp(run, *operands))(x, gate, up, down)
    found = y, *back(dy)
    x, gate, up, down, dy = wide(x, gate, up, down, dy)
    gate, up, down, ones = gate[None], up[None], down[None], np.ones(M, np.float32)
    h, *_ = swiglu_by_hand(x, gate, up, np.zeros((M, F)), ones, whole)
    y, dh, ddown = product_by_hand(h, down, dy, whole)
    _, dx, dgate, dup, _ = swiglu_by_hand(x, gate, up, dh, ones, whole)
    check(found, (y, dx, dgate[0], dup[0], ddown[0]), tolerance=8e-3)


@pytest.mark.gpu
def test_one_layer_among_all_on_the_gpu():
    x, gate, up, _, scale = operands(4, M)
    sizes, others = jnp.asarray(uneven_sizes(4)["uneven"]), jnp.full_like(gate, jnp.nan)
    stacks = [jnp.stack([others, w, others]) for w in (gate, up)]

    @jax.jit
    def run(gate, up, **layer):
        options = {"implementation": "hopper"} | layer
        y = grouped_matmul(x, gate, sizes, **options)
        return y, grouped_swiglu(x, gate, up, sizes, scale_M=scale, **options)

    for found, expected in zip(run(*stacks, layer=1), run(gate, up)):
        np.testing.assert_array_equal(found, expected)
