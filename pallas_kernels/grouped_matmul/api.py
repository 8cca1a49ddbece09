"""The face of the grouped matmul: what it computes, and who computes it where.

Letters: M rows, K inner, N outer, G groups.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import note_reference
from pallas_kernels.grouped_matmul import pallas_tpu, reference
from pallas_kernels.grouped_matmul.padded import fits, padded
from pallas_kernels.grouped_matmul.pallas_gpu import hopper
from pallas_kernels.grouped_matmul.pallas_gpu import supports as hopper_supports


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GNK: Float[Array, "G N K"],
    sizes_G: Int[Array, " G"],
    *,
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

    `implementation`: "tpu" is a kernel for TPUs, bfloat16 or float32, N and K that 128
    divides; "hopper" is one for NVIDIA's H100 and H200, bfloat16, sizes that 128 divides;
    "blocked" is portable and does the work of the rows there are; "padded" copies rows
    and matrices into one batched product, quicker than "blocked" on a GPU where the
    copies fit; "ragged_dot" is XLA's, native on TPU but dense (all groups times all rows)
    elsewhere. None chooses by the platform that is compiled for, and says in one line
    when that leaves an accelerator without a kernel.

    `expected_rows`: of the M, how many belong to groups in the mean; None means all. It
    changes nothing but the cost that kernels report to the compiler.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: "tpu" was named and does not take these operands.
    """
    _check(x_MK, w_GNK, sizes_G)
    rows = x_MK.shape[0]
    expected_rows = rows if expected_rows is None else expected_rows
    if not 0 <= expected_rows <= rows:
        raise ValueError(f"{expected_rows=} of {rows} rows")
    if implementation not in (None, *IMPLEMENTATIONS):
        names = tuple(IMPLEMENTATIONS)
        raise ValueError(f"{implementation=} is not one of {names}")
    if implementation == "tpu" and not _tpu_supports(x_MK, w_GNK):
        raise NotImplementedError(
            f"no TPU kernel for {x_MK.shape=}, {w_GNK.shape=}, {x_MK.dtype=}: bfloat16 or "
            "float32, K and N multiples of 128 whose tiles fit its memory"
        )
    return _product(x_MK, w_GNK, sizes_G, implementation, expected_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_MK, w_GNK, sizes_G, implementation, expected_rows):
    """One gradient for all: each platform's branch would keep what its own needs."""

    def on(one: Implementation) -> Callable:
        return functools.partial(one.product, expected_rows=expected_rows)

    w_GNK = w_GNK.astype(x_MK.dtype)
    return _dispatch(implementation, x_MK, w_GNK, on, x_MK, w_GNK, sizes_G)


def _product_forward(x_MK, w_GNK, sizes_G, implementation, expected_rows):
    y_MN = _product(x_MK, w_GNK, sizes_G, implementation, expected_rows)
    return y_MN, (x_MK, w_GNK, sizes_G)


def _product_backward(implementation, expected_rows, saved, dy_MN):
    x_MK, w_GNK, sizes_G = saved
    dtype, w_GNK = w_GNK.dtype, w_GNK.astype(x_MK.dtype)

    def on(one: Implementation) -> Callable:
        return functools.partial(
            one.gradients, dtype=dtype, expected_rows=expected_rows
        )

    operands = (dy_MN, x_MK, w_GNK, sizes_G)
    dx_MK, dw_GNK = _dispatch(implementation, x_MK, w_GNK, on, *operands)
    return dx_MK, dw_GNK, None


_product.defvjp(_product_forward, _product_backward)


class Implementation(NamedTuple):
    """Both take the keyword `expected_rows`, the second one `dtype` of dw, too."""

    product: Callable  # x, w, sizes -> y
    gradients: Callable  # dy, x, w, sizes -> dx, dw


def _derived(product: Callable) -> Implementation:
    """From a function of x, w and sizes that JAX differentiates."""

    def gradients(dy, x, w, sizes, *, dtype, expected_rows):
        _, back = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        dx, dw = back(dy)
        return dx, dw.astype(dtype)

    def forward(x, w, sizes, *, expected_rows):
        return product(x, w, sizes)

    return Implementation(forward, gradients)


def _tpu_gradients(dy, x, w, sizes, *, dtype, expected_rows):
    dx = pallas_tpu.row_gradient(dy, w, sizes, expected_rows=expected_rows)
    dw = pallas_tpu.weight_gradient(
        dy, x, sizes, dtype=dtype, expected_rows=expected_rows
    )
    return dx, dw


def _blocked_gradients(dy, x, w, sizes, *, dtype, expected_rows):
    return reference.gradients(dy, x, w, sizes, dtype=dtype)


def ragged_dot(
    x_MK: Float[Array, "M K"], w_GNK: Float[Array, "G N K"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """XLA's ragged product, with the surplus rows zeroed."""
    y_MN = jax.lax.ragged_dot(
        x_MK, w_GNK.swapaxes(1, 2), sizes_G, preferred_element_type=jnp.float32
    )
    real_M = jnp.arange(x_MK.shape[0]) < sizes_G.sum()
    return jnp.where(real_M[:, None], y_MN, 0).astype(x_MK.dtype)


IMPLEMENTATIONS = {
    "blocked": Implementation(_derived(reference.blocked).product, _blocked_gradients),
    "hopper": _derived(hopper),
    "padded": _derived(padded),
    "ragged_dot": _derived(ragged_dot),
    "tpu": Implementation(pallas_tpu.product, _tpu_gradients),
}


def _dispatch(
    implementation: str | None,
    x: Array,
    w: Array,
    on: Callable[[Implementation], Callable],
    *operands: Array,
):
    """Runs `on` of the implementation named, or of the one for the platform that is
    compiled for, which a process without that platform may do, too.
    """
    if implementation is not None:
        return on(IMPLEMENTATIONS[implementation])(*operands)
    return jax.lax.platform_dependent(
        *operands,
        tpu=on(IMPLEMENTATIONS[_on_tpu(x, w)]),
        cuda=on(IMPLEMENTATIONS[_on_gpu(x, w)]),
        default=on(IMPLEMENTATIONS["blocked"]),
    )


def _on_tpu(x: Array, w: Array) -> str:
    if _tpu_supports(x, w):
        return "tpu"
    note_reference("grouped_matmul", "tpu")
    return "ragged_dot"


def _on_gpu(x: Array, w: Array) -> str:
    if hopper_supports(x, w):
        return "hopper"
    note_reference("grouped_matmul", "gpu")
    return "padded" if fits(x.shape[0], w) else "blocked"


def _tpu_supports(x: Array, w: Array) -> bool:
    return pallas_tpu.supports(x.shape[0], w.shape, x.dtype)


def _check(x: Array, w: Array, sizes: Array) -> None:
    if x.ndim != 2 or w.ndim != 3 or sizes.ndim != 1:
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
