"""The face of the grouped matmul: what it computes, and who computes it where.

Letters: M rows, K inner, N outer, G groups, Y layers; D the model, F an expert.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.implementations import (
    DENSE,
    IMPLEMENTATIONS,
    combine,
    dispatch,
)
from pallas_kernels.grouped_matmul.layers import Matrices, OfLayer
from pallas_kernels.grouped_matmul.tiles_gpu import lacks as gpu_lacks
from pallas_kernels.grouped_matmul.tiles_tpu import lacks as tpu_lacks

KEPT = "grouped_matmul"  # the `checkpoint_name` of what the gradient needs


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GNK: Float[Array, "*Y G N K"],
    sizes_G: Int[Array, " G"],
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
    expected_rows: int | None = None,
) -> Float[Array, "M N"]:
    """Row m of group g becomes x[m] @ w[g].T, with float32 accumulation.

    Rows are sorted by group: the first sizes[0] belong to group 0, and so on. Groups may
    be empty or uneven; nothing is padded in memory. Rows past sum(sizes) give zeros and
    cost nothing but to write them; sizes that claim more rows than there are end with the
    rows. Differentiable in `x` and `w`. The result has the dtype of `x`.

    `w` may be float32 where `x` is bfloat16: it is rounded for the products, and its
    gradient stays as it was summed up, in float32.

    With `layer`, `w` is [Y, G, N, K], the weights of all layers, of which that one is
    used; kernels make no copy of it. A layer outside is clipped to the first or last.
    Meant for inference: the gradient of the stack is as large as the stack, mostly zeros.

    `implementation`: "tpu" is a kernel for TPUs, bfloat16 or float32, N and K that 128
    divides; "hopper" is one for NVIDIA's H100 and H200, bfloat16, quick without copies
    where 64 divides N and K and 8 divides M; "blocked" is portable and does the work of
    the rows there are; "padded" copies rows and matrices into one batched product,
    quicker than "blocked" on a GPU where the copies fit; "ragged_dot" is XLA's, native on
    TPU but dense (all groups times all rows) elsewhere. None chooses by the platform that
    is compiled for, and logs its choice in one line.

    `expected_rows`: of the M, how many belong to groups in the mean; None means all. It
    changes nothing but the cost that kernels report to the compiler.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: "tpu" or "hopper" was named and does not take these operands.
    """
    w = _of(w_GNK, layer)
    expected_rows = _check(x_MK, w, sizes_G, implementation, expected_rows)
    sizes_G = _within(sizes_G, x_MK.shape[0])
    return _product(x_MK, w, sizes_G, implementation, expected_rows)


def grouped_swiglu(
    x_MD: Float[Array, "M D"],
    gate_GFD: Float[Array, "*Y G F D"],
    up_GFD: Float[Array, "*Y G F D"],
    sizes_G: Int[Array, " G"],
    *,
    layer: Int[Array, ""] | int | None = None,
    scale_M: Float[Array, " M"] | None = None,
    implementation: str | None = None,
    expected_rows: int | None = None,
    keep_result: bool = False,
) -> Float[Array, "M F"]:
    """Row m of group g becomes silu(x[m] @ gate[g].T) * (x[m] @ up[g].T) * scale[m].

    All but the products' own rounding is float32 until the end; without `scale` it is 1.
    Rows, sizes, layers, dtypes, options and errors are those of `grouped_matmul`. On a TPU all
    is one kernel where its tiles fit, which reads `x` once and rounds the result alone.
    The gradient needs both products: then they are what one kernel makes and what is
    kept, by the name KEPT, and the result is made from them.

    `keep_result`: for gradients, the result is kept by that name, too. It costs its
    memory, and on a Hopper GPU one kernel makes all three, where otherwise both products
    are read again for the result, and once more where it is not kept.
    """
    gate, up = _of(gate_GFD, layer), _of(up_GFD, layer)
    expected_rows = _check(x_MD, gate, sizes_G, implementation, expected_rows)
    _check_swiglu(x_MD, gate_GFD, up_GFD, scale_M)
    sizes_G = _within(sizes_G, x_MD.shape[0])
    if scale_M is None:
        scale_M = jnp.ones(x_MD.shape[0], jnp.float32)
    operands = (x_MD, gate, up, scale_M, sizes_G)
    return _swiglu(*operands, implementation, expected_rows, keep_result)


def grouped_feed_forward(
    x_MD: Float[Array, "M D"],
    gate_GFD: Float[Array, "*Y G F D"],
    up_GFD: Float[Array, "*Y G F D"],
    down_GDF: Float[Array, "*Y G D F"],
    sizes_G: Int[Array, " G"],
    *,
    layer: Int[Array, ""] | int | None = None,
    scale_M: Float[Array, " M"] | None = None,
    implementation: str | None = None,
    expected_rows: int | None = None,
    keep_result: bool = False,
) -> Float[Array, "M D"]:
    """`grouped_matmul` with `down` of `grouped_swiglu`: a group's whole feed-forward.

    The two, one after the other, but for the gradient on a Hopper GPU: there the one of
    SwiGLU's result never exists. Rows, sizes, layers, dtypes, options and errors are
    theirs.
    """
    gate, up, down = (_of(w, layer) for w in (gate_GFD, up_GFD, down_GDF))
    expected_rows = _check(x_MD, gate, sizes_G, implementation, expected_rows)
    _check_swiglu(x_MD, gate_GFD, up_GFD, scale_M)
    h_MF = jax.ShapeDtypeStruct((x_MD.shape[0], gate.shape[1]), x_MD.dtype)
    _check(h_MF, down, sizes_G, implementation, expected_rows)
    sizes_G = _within(sizes_G, x_MD.shape[0])
    if scale_M is None:
        scale_M = jnp.ones(x_MD.shape[0], jnp.float32)
    operands = (x_MD, gate, up, down, scale_M, sizes_G)
    return _feed_forward(*operands, implementation, expected_rows, keep_result)


def feed_forward(
    x_MD: Float[Array, "M D"],
    gate_FD: Float[Array, "F D"],
    up_FD: Float[Array, "F D"],
    down_DF: Float[Array, "D F"],
    *,
    implementation: str | None = None,
    keep_result: bool = False,
) -> Float[Array, "M D"]:
    """`grouped_feed_forward` of a single group that has all rows: a dense feed-forward.

    All products are XLA's but, on a Hopper GPU, those of the gradient by rows: there the
    gradient of SwiGLU's result never exists, and both parts of that of `x` are summed
    before they are rounded. It is for rows that one device has, 1024 and more; what does
    not fit is computed by XLA.

    `implementation`: "xla", or "hopper" for those kernels. `keep_result`: SwiGLU's result
    is kept for gradients, not made again. Errors are those of `grouped_matmul`.
    """
    if implementation not in (None, "xla", "hopper"):
        raise ValueError(f"{implementation=} is not one of ('xla', 'hopper')")
    weights = gate, up, down = [w[None] for w in (gate_FD, up_FD, down_DF)]
    rows = x_MD.shape[0]
    sizes, scale = jnp.full(1, rows, jnp.int32), jnp.ones(rows, jnp.float32)
    h_MF = jax.ShapeDtypeStruct((rows, gate.shape[1]), x_MD.dtype)
    named = implementation if implementation == "hopper" else None
    _check(x_MD, gate, sizes, named, None)
    _check_swiglu(x_MD, gate, up, None)
    _check(h_MF, down, sizes, named, None)
    name = DENSE if implementation is None else f"{implementation}_{DENSE}"
    return _feed_forward(x_MD, *weights, scale, sizes, name, rows, keep_result)


# One gradient for all implementations: if each platform's branch had its own, all would
# keep what theirs needs.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x, w, sizes, implementation, expected_rows):
    operands = (x, w.astype(x.dtype), sizes)
    return dispatch(
        implementation, "product", x, w, *operands, expected_rows=expected_rows
    )


def _product_forward(x, w, sizes, implementation, expected_rows):
    return _product(x, w, sizes, implementation, expected_rows), (x, w, sizes)


def _product_backward(implementation, expected_rows, saved, dy):
    x, w, sizes = saved
    operands = (dy, x, w.astype(x.dtype), sizes)
    options = {"dtype": w.dtype, "expected_rows": expected_rows}
    dx, dw = dispatch(implementation, "gradients", x, w, *operands, **options)
    return dx, _among_layers(dw, w), None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _swiglu(x, gate, up, scale, sizes, implementation, expected_rows, keep_result):
    operands = (x, gate.astype(x.dtype), up.astype(x.dtype), scale, sizes)
    return dispatch(
        implementation, "swiglu", x, gate, *operands, expected_rows=expected_rows
    )


def _swiglu_forward(
    x, gate, up, scale, sizes, implementation, expected_rows, keep_result
):
    weights = gate.astype(x.dtype), up.astype(x.dtype)
    run = functools.partial(dispatch, implementation, expected_rows=expected_rows)
    if keep_result:
        made = run("all_three", x, gate, x, *weights, scale, sizes)
        *products, h = (checkpoint_name(array, KEPT) for array in made)
    else:
        made = run("both", x, gate, x, *weights, sizes)
        products = [checkpoint_name(product, KEPT) for product in made]
        # From what is kept: where that is found again, no product is computed again.
        h = combine(*products, scale).astype(x.dtype)
    return h, (x, gate, up, scale, sizes, *products)


def _swiglu_backward(implementation, expected_rows, keep_result, saved, dh):
    x, gate, up, scale, sizes, gated, lifted = saved

    _, back = jax.vjp(combine, gated, lifted, scale)
    dgated, dlifted, dscale = back(dh.astype(jnp.float32))
    operands = (dgated, dlifted, x, gate, up, sizes)
    into = _into_swiglu(implementation, expected_rows, *operands)
    return *into, dscale, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _into_swiglu(implementation, expected_rows, dgated, dlifted, x, gate, up, sizes):
    """The gradients of x, gate and up, from those of both products."""
    weights = gate.astype(x.dtype), up.astype(x.dtype)
    operands = (dgated, dlifted, x, *weights, sizes)
    options = {"dtype": gate.dtype, "expected_rows": expected_rows}
    dx, dgate, dup = dispatch(
        implementation, "swiglu_gradients", x, gate, *operands, **options
    )
    return dx, _among_layers(dgate, gate), _among_layers(dup, up)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _feed_forward(x, gate, up, down, scale, sizes, *options):
    h = _swiglu(x, gate, up, scale, sizes, *options)
    return _product(h, down, sizes, *options[:2])


def _feed_forward_forward(x, gate, up, down, scale, sizes, *options):
    h, saved = _swiglu_forward(x, gate, up, scale, sizes, *options)
    return _product(h, down, sizes, *options[:2]), (*saved, down, h)


def _feed_forward_backward(implementation, expected_rows, keep_result, saved, dy):
    x, gate, up, scale, sizes, gated, lifted, down, h = saved
    operands = (dy, h, down.astype(x.dtype), gated, lifted, scale, sizes)
    options = {"dtype": down.dtype, "expected_rows": expected_rows}
    dgated, dlifted, dscale, ddown = dispatch(
        implementation, "down_gradients", h, down, *operands, **options
    )
    operands = (dgated, dlifted, x, gate, up, sizes)
    into = _into_swiglu(implementation, expected_rows, *operands)
    return *into, _among_layers(ddown, down), dscale, None


_feed_forward.defvjp(_feed_forward_forward, _feed_forward_backward)


def _of(w: Array, layer: Array | int | None) -> Array | OfLayer:
    """The matrices meant: all that are given, or those of a layer."""
    if layer is None:
        return w
    if w.ndim != 4:
        raise ValueError(f"{w.shape=} is not that of all layers, and {layer=}")
    return OfLayer(w, jnp.clip(layer, 0, w.shape[0] - 1).astype(jnp.int32))


def _among_layers(dw: Array, w: Matrices) -> Matrices:
    """The gradient of `w`: zero for the other layers."""
    if not isinstance(w, OfLayer):
        return dw
    return OfLayer(jnp.zeros_like(w.stack_YGNK).at[w.layer].set(dw), None)


def _within(sizes_G: Array, rows: int) -> Array:
    """The sizes, cut where they claim more rows than there are."""
    ends_G = jnp.minimum(jnp.cumsum(sizes_G.astype(jnp.int32)), rows)
    return jnp.diff(ends_G, prepend=0)


def _check_swiglu(x_MD, gate_GFD, up_GFD, scale_M) -> None:
    if (up_GFD.shape, up_GFD.dtype) != (gate_GFD.shape, gate_GFD.dtype):
        raise ValueError(
            f"{gate_GFD.shape=} {gate_GFD.dtype=} and {up_GFD.shape=} {up_GFD.dtype=} "
            "differ"
        )
    if scale_M is not None and scale_M.shape != x_MD.shape[:1]:
        raise ValueError(f"{scale_M.shape=} is not one for each row of {x_MD.shape=}")


def _check(x, w, sizes, implementation, expected_rows) -> int:
    """The expected rows, once the operands are seen to fit."""
    if x.ndim != 2 or len(w.shape) != 3 or sizes.ndim != 1:
        raise ValueError(
            f"ranks of {x.shape=}, {w.shape=}, {sizes.shape=}: not 2, 3, 1"
        )
    if x.shape[1] != w.shape[2]:
        raise ValueError(f"last axes of {x.shape=} and {w.shape=} differ")
    if w.shape[0] != sizes.shape[0]:
        raise ValueError(f"groups of {w.shape=} and {sizes.shape=} differ")
    if w.dtype not in (x.dtype, jnp.float32):
        raise ValueError(f"{x.dtype=} and {w.dtype=} differ")
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"{sizes.dtype=} is no integer type")
    if implementation not in (None, *IMPLEMENTATIONS):
        names = tuple(IMPLEMENTATIONS)
        raise ValueError(f"{implementation=} is not one of {names}")
    rows = x.shape[0]
    lacking = tpu_lacks(rows, w.shape, x.dtype) if implementation == "tpu" else ""
    if lacking:
        raise NotImplementedError(f"the TPU kernel {lacking}: {x.shape=}, {w.shape=}")
    lacking = gpu_lacks(rows, w.shape, x.dtype) if implementation == "hopper" else ""
    if lacking:
        raise NotImplementedError(
            f"the Hopper kernel {lacking}: {x.shape=}, {w.shape=}"
        )
    expected_rows = rows if expected_rows is None else expected_rows
    if not 0 <= expected_rows <= rows:
        raise ValueError(f"{expected_rows=} of {rows} rows")
    return expected_rows
