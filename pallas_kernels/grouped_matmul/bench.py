"""The grouped matmul's cases for `python -m pallas_kernels.bench`.

Letters: M rows, K inner, N outer, G groups.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul.api import (
    feed_forward,
    grouped_matmul,
    grouped_swiglu,
)
from pallas_kernels.grouped_matmul.implementations import combine
from pallas_kernels.grouped_matmul.pallas_gpu import weight_gradients
from pallas_kernels.grouped_matmul.tiles_gpu import place, schedule
from pallas_kernels.measure import Case

EXACT_ROWS = 128  # rows of a group that the float32 product takes at once


def uneven(key: Array, groups: int, rows: int) -> Int[Array, " G"]:
    """Sizes that sum to `rows`, from about a sixth of the mean to three times it."""
    shares = jnp.cumsum(jax.random.gamma(key, 5.0, (groups,)))
    ends = jnp.round(shares / shares[-1] * rows).astype(jnp.int32)
    return jnp.diff(ends, prepend=0)


def normal(key: Array, *shape: int) -> Array:
    """bfloat16 with deviation 1; a large array group by group, to save memory."""
    if len(shape) < 3:
        return jax.random.normal(key, shape, jnp.bfloat16)
    keys = jax.random.split(key, shape[0])
    return lax.map(lambda key: normal(key, *shape[1:]), keys)


def draw(key: Array, groups: int, rows: int, *shapes: tuple[int, ...]) -> tuple:
    """Operands of these shapes, and sizes."""
    keys = jax.random.split(key, len(shapes) + 1)
    arrays = [normal(key, *shape) for key, shape in zip(keys, shapes)]
    return (*arrays, uneven(keys[-1], groups, rows))


def product(x, w, sizes, implementation=None):
    """Forward."""
    return grouped_matmul(x, w, sizes, implementation=implementation)


def by_rows(dy, w, sizes, implementation=None):
    """The gradient of x; what else the backward pass makes is dropped by XLA."""
    x = jnp.zeros((dy.shape[0], w.shape[2]), dy.dtype)
    _, back = jax.vjp(lambda x: product(x, w, sizes, implementation), x)
    return back(dy)[0]


def by_weights(dy, x, sizes, implementation=None):
    """The gradient of w."""
    w = jnp.zeros((len(sizes), dy.shape[1], x.shape[1]), dy.dtype)
    _, back = jax.vjp(lambda w: product(x, w, sizes, implementation), w)
    return back(dy)[0]


def swiglu(x, gate, up, sizes, implementation=None):
    """Both products and what is made of them, as for inference."""
    return grouped_swiglu(x, gate, up, sizes, implementation=implementation)


def both_by_weights(dgate, dup, x, sizes):
    """The gradients of gate and up, in one kernel."""
    return weight_gradients([dgate, dup], x, sizes, dtype=x.dtype)


def by_weights_apart(dgate, dup, x, sizes):
    """The same, one after the other."""
    return by_weights(dgate, x, sizes), by_weights(dup, x, sizes)


def dense(x, gate, up, down, dy, implementation=None):
    """A dense feed-forward and its gradients, that of x first."""
    options = {"implementation": implementation, "keep_result": True}
    run = functools.partial(feed_forward, **options)
    y, back = jax.vjp(run, x, gate, up, down)
    return *back(dy), y


def exact_dense(x, gate, up, down, dy):
    """The gradient of x in float32."""
    x, gate, up, down, dy = (a.astype(jnp.float32) for a in (x, gate, up, down, dy))

    def plain(x):
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    return jax.vjp(plain, x)[1](dy)[0]


def _tile_by_tile(step: Callable, result: Array, rows: int, sizes: Array) -> Array:
    """step(result, group, first row, which rows of the tile count) for every tile."""
    tiles = schedule(sizes, rows, EXACT_ROWS)

    def one(result, number):
        group, start, count = place(tiles, number, EXACT_ROWS)
        first = jnp.minimum(start, rows - EXACT_ROWS)
        row = first + jnp.arange(EXACT_ROWS)
        mine = (row >= start) & (row < start + count) & (group < sizes.shape[0])
        return step(result, group, first, mine[:, None]), None

    return lax.scan(one, result, jnp.arange(len(tiles.group)))[0]


def exact_product(x, w, sizes, *, turned=True):
    """The product, or by rows where not `turned`, in float32."""

    def step(y, group, first, mine):
        x_tile = lax.dynamic_slice_in_dim(x, first, EXACT_ROWS).astype(jnp.float32)
        matrix = w[group].astype(jnp.float32)
        tile = jnp.dot(x_tile, matrix.T if turned else matrix)
        before = lax.dynamic_slice_in_dim(y, first, EXACT_ROWS)
        tile = jnp.where(mine, tile, before)
        return lax.dynamic_update_slice_in_dim(y, tile, first, 0)

    y = jnp.zeros((x.shape[0], w.shape[1 if turned else 2]), jnp.float32)
    return _tile_by_tile(step, y, x.shape[0], sizes)


def exact_by_weights(dy, x, sizes):
    """By weights, in float32."""

    def step(dw, group, first, mine):
        dy_tile, x_tile = (
            lax.dynamic_slice_in_dim(a, first, EXACT_ROWS).astype(jnp.float32)
            for a in (dy, x)
        )
        return dw.at[group].add(jnp.dot(jnp.where(mine, dy_tile, 0).T, x_tile))

    dw = jnp.zeros((len(sizes), dy.shape[1], x.shape[1]), jnp.float32)
    return _tile_by_tile(step, dw, x.shape[0], sizes)


def exact_swiglu(x, gate, up, sizes):
    """SwiGLU in float32."""
    one = jnp.ones(x.shape[0], jnp.float32)
    return combine(exact_product(x, gate, sizes), exact_product(x, up, sizes), one)


def in_torch(function: Callable) -> Callable:
    """What PyTorch has: a product of sorted rows, in any layout."""

    def make() -> dict[str, Callable]:
        import torch

        def run(*operands):
            *arrays, sizes = operands
            ends = sizes.cumsum(0, dtype=torch.int32)
            multiply = functools.partial(torch._grouped_mm, offs=ends)
            return function(torch, multiply, *arrays)

        return {"torch._grouped_mm": run}

    return make


def _torch_swiglu(torch, multiply, x, gate, up):
    gated, lifted = (multiply(x, w.transpose(1, 2)) for w in (gate, up))
    return torch.nn.functional.silu(gated) * lifted


def shipped(x, w, sizes):
    """JAX's own kernel for Hopper, which unrolls its groups."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    blocks = dict(block_m=128, block_n=128, block_k=64, grid_block_n=8)
    return ragged_dot(
        x,
        w,
        group_sizes=sizes,
        transpose_rhs=True,
        max_concurrent_steps=4,
        load_group_sizes_to_register=False,
        **blocks,
    )


OPERATIONS = {  # ours, exact, PyTorch's, and the operands' shapes
    "product": (
        product,
        exact_product,
        lambda _, multiply, x, w: multiply(x, w.transpose(1, 2)),
        lambda G, M, K, N: ((M, K), (G, N, K)),
    ),
    "by rows": (
        by_rows,
        functools.partial(exact_product, turned=False),
        lambda _, multiply, dy, w: multiply(dy, w),
        lambda G, M, K, N: ((M, N), (G, N, K)),
    ),
    "by weights": (
        by_weights,
        exact_by_weights,
        lambda _, multiply, dy, x: multiply(dy.T, x),
        lambda G, M, K, N: ((M, N), (M, K)),
    ),
    "SwiGLU": (
        swiglu,
        exact_swiglu,
        _torch_swiglu,
        lambda G, M, K, N: ((M, K), (G, N, K), (G, N, K)),
    ),
}


def case(
    operation: str, G: int, M: int, K: int, N: int, target: str = "", xla: bool = True
) -> Case:
    """One operation at one shape."""
    ours, exact, torchs, shapes = OPERATIONS[operation]
    products = 2 if operation == "SwiGLU" else 1
    contestants = {"pallas": ours}
    if xla:
        contestants["xla"] = functools.partial(ours, implementation="padded")
    if operation == "product" and G <= 64:
        contestants["jax ragged_dot_mgpu"] = shipped
    return Case(
        operation="grouped_matmul",
        name=f"{operation}, {G} groups, {M} rows, K {K}, N {N}",
        inputs=lambda key: draw(key, G, M, *shapes(G, M, K, N)),
        contestants=contestants,
        exact=exact,
        flops=2 * M * K * N * products,
        bytes=2 * (M * K + M * N + products * G * N * K),
        torch=in_torch(torchs),
        target=target,
    )


def both_case(G: int, M: int, K: int, N: int) -> Case:
    """Gradients of gate and up, which share x."""
    return Case(
        operation="grouped_matmul",
        name=f"both by weights, {G} groups, {M} rows, K {K}, N {N}",
        inputs=lambda key: draw(key, G, M, (M, N), (M, N), (M, K)),
        contestants={"pallas": both_by_weights, "apart": by_weights_apart},
        exact=lambda dgate, _, x, sizes: exact_by_weights(dgate, x, sizes),
        flops=4 * M * K * N,
        bytes=2 * (M * K + 2 * M * N + 2 * G * N * K),
        target="apart > 1x",
    )


def dense_case(M: int, D: int, F: int) -> Case:
    """A dense feed-forward, forward and back."""

    def inputs(key):
        shapes = (M, D), (F, D), (F, D), (D, F), (M, D)
        arrays = zip(jax.random.split(key, 5), shapes)
        x, *weights, dy = (normal(key, *shape) for key, shape in arrays)
        return x, *(w / w.shape[1] ** 0.5 for w in weights), dy

    return Case(
        operation="grouped_matmul",
        name=f"dense feed-forward and gradients, {M} rows, {D} to {F}",
        inputs=inputs,
        contestants={
            "pallas": dense,
            "xla": functools.partial(dense, implementation="xla"),
        },
        exact=exact_dense,
        flops=18 * M * D * F,
        bytes=2 * (4 * M * D + 6 * D * F),
        target="xla > 1x",
    )


V3_SLICE, V3, V2_LITE = (
    (8, 32768, 7168, 4096),
    (256, 32768, 7168, 4096),
    (64, 24576, 2048, 2816),
)
SMALL_UP, SMALL_DOWN = (64, 229376, 1280, 896), (64, 229376, 896, 1280)
NEAR = "within 10% of the product's TFLOP/s"
CASES = [
    case("product", *V3_SLICE, target=">= 1.05x torch, 88% of bf16"),
    case("by rows", *V3_SLICE, target=NEAR),
    case("by weights", *V3_SLICE, target=NEAR),
    case("product", *V3, target=">= 1.37x torch, <= 4.7 ms", xla=False),
    case("product", *V2_LITE, target=">= 1.25x torch"),
    case("by rows", *V2_LITE, target=NEAR),
    case("by weights", *V2_LITE, target=NEAR),
    case("product", *SMALL_UP, target="> torch"),
    case("by rows", *SMALL_UP, target="> torch"),
    case("by weights", *SMALL_UP, target="> torch"),
    case("SwiGLU", *SMALL_UP, target="> torch"),
    case("product", *SMALL_DOWN, target="> torch"),
    case("by rows", *SMALL_DOWN, target="> torch"),
    case("by weights", *SMALL_DOWN, target="> torch"),
    both_case(*SMALL_UP),
    dense_case(32768, 1280, 896),
    dense_case(32768, 1280, 3584),
]
