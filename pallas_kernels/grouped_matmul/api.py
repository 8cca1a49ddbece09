"""The face of the grouped matmul: what it computes, and who computes it where."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import note_reference
from pallas_kernels.grouped_matmul.padded import fits, padded
from pallas_kernels.grouped_matmul.pallas_gpu import hopper, supports
from pallas_kernels.grouped_matmul.reference import blocked

IMPLEMENTATIONS = ("blocked", "hopper", "padded", "ragged_dot")


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_GNK: Float[Array, "G N K"],
    sizes_G: Int[Array, " G"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Row m of group g becomes x[m] @ w[g].T, with float32 accumulation.

    Rows are sorted by group: the first sizes[0] belong to group 0, and so on. Groups may
    be empty or uneven; nothing is padded in memory. Rows past sum(sizes) give zeros and
    cost nothing. Differentiable in `x` and `w`. The result has the dtype of `x`.

    `implementation`: "hopper" is a kernel for NVIDIA's H100 and H200, bfloat16, sizes
    that 128 divides; "blocked" is portable and does the work of the rows there are;
    "padded" copies rows and matrices into one batched product, quicker than "blocked"
    on a GPU where the copies fit; "ragged_dot" is XLA's, native on TPU but dense (all
    groups times all rows) elsewhere. None chooses by the platform that is compiled for,
    and says in one line when that leaves a GPU to plain JAX.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
    """
    _check(x_MK, w_GNK, sizes_G)
    match implementation:
        case None:
            on_gpu = _on_gpu(x_MK, w_GNK)
            return jax.lax.platform_dependent(
                x_MK, w_GNK, sizes_G, tpu=ragged_dot, cuda=on_gpu, default=blocked
            )
        case "blocked":
            return blocked(x_MK, w_GNK, sizes_G)
        case "hopper":
            return hopper(x_MK, w_GNK, sizes_G)
        case "padded":
            return padded(x_MK, w_GNK, sizes_G)
        case "ragged_dot":
            return ragged_dot(x_MK, w_GNK, sizes_G)
        case _:
            raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}")


def _on_gpu(x: Array, w: Array) -> Callable:
    """The quickest that takes these operands."""
    if supports(x, w):
        return hopper
    note_reference("grouped_matmul")
    return padded if fits(x.shape[0], w) else blocked


def ragged_dot(
    x_MK: Float[Array, "M K"], w_GNK: Float[Array, "G N K"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """XLA's ragged product, with the surplus rows zeroed."""
    y_MN = jax.lax.ragged_dot(
        x_MK, w_GNK.swapaxes(1, 2), sizes_G, preferred_element_type=jnp.float32
    )
    real_M = jnp.arange(x_MK.shape[0]) < sizes_G.sum()
    return jnp.where(real_M[:, None], y_MN, 0).astype(x_MK.dtype)


def _check(x: Array, w: Array, sizes: Array) -> None:
    if x.ndim != 2 or w.ndim != 3 or sizes.ndim != 1:
        raise ValueError(
            f"ranks of {x.shape=}, {w.shape=}, {sizes.shape=}: not 2, 3, 1"
        )
    if x.shape[1] != w.shape[2]:
        raise ValueError(f"last axes of {x.shape=} and {w.shape=} differ")
    if w.shape[0] != sizes.shape[0]:
        raise ValueError(f"groups of {w.shape=} and {sizes.shape=} differ")
    if x.dtype != w.dtype:
        raise ValueError(f"{x.dtype=} and {w.dtype=} differ")
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"{sizes.dtype=} is no integer type")
