"""Grouped matmuls for Hopper GPUs, in Pallas Mosaic GPU: the products there are.

`rows_gpu` multiplies rows with their group's matrices or the transposes: the forward
products and the gradients by rows; `swiglu_gradient_gpu` goes on from such a gradient
through the SwiGLU before. `weights_gpu` sums outer products over a group's rows:
the gradients by weights. Both are made of what is in `ring_gpu`.

Letters: M rows, I inner, O outer, G groups.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.layers import Matrices
from pallas_kernels.grouped_matmul.rows_gpu import multiply_rows
from pallas_kernels.grouped_matmul.swiglu_gradient_gpu import swiglu_gradient
from pallas_kernels.grouped_matmul.weights_gpu import weight_gradients

__all__ = [
    "all_three",
    "both",
    "product",
    "row_gradient",
    "swiglu",
    "swiglu_gradient",
    "swiglu_row_gradient",
    "weight_gradients",
]


def product(
    x_MI: Float[Array, "M I"], w_GOI: Matrices, sizes_G: Int[Array, " G"]
) -> Float[Array, "M O"]:
    """x[m] @ w[group of m].T; zeros for rows of no group. bfloat16. Here and below,
    matrices may be those of a layer among all layers.
    """
    return multiply_rows([x_MI], [w_GOI], sizes_G, turned=True)[0]


def row_gradient(
    dy_MO: Float[Array, "M O"], w_GOI: Matrices, sizes_G: Int[Array, " G"]
) -> Float[Array, "M I"]:
    """dy[m] @ w[group of m]."""
    return multiply_rows([dy_MO], [w_GOI], sizes_G, turned=False)[0]


def both(
    x_MI: Float[Array, "M I"],
    gate_GOI: Matrices,
    up_GOI: Matrices,
    sizes_G: Int[Array, " G"],
) -> tuple[Float[Array, "M O"], Float[Array, "M O"]]:
    """The products of x with gate and with up; x is read once."""
    return multiply_rows([x_MI], [gate_GOI, up_GOI], sizes_G, turned=True)


def swiglu(
    x_MI: Float[Array, "M I"],
    gate_GOI: Matrices,
    up_GOI: Matrices,
    scale_M: Float[Array, " M"],
    sizes_G: Int[Array, " G"],
) -> Float[Array, "M O"]:
    """silu(x @ gate.T) * (x @ up.T) * scale, rounded once."""
    weights, options = [gate_GOI, up_GOI], {"turned": True, "products": False}
    return multiply_rows([x_MI], weights, sizes_G, scale_M=scale_M, **options)[0]


def all_three(
    x_MI: Float[Array, "M I"],
    gate_GOI: Matrices,
    up_GOI: Matrices,
    scale_M: Float[Array, " M"],
    sizes_G: Int[Array, " G"],
) -> tuple[Float[Array, "M O"], Float[Array, "M O"], Float[Array, "M O"]]:
    """Both products, and SwiGLU of what is rounded."""
    weights = [gate_GOI, up_GOI]
    return multiply_rows([x_MI], weights, sizes_G, turned=True, scale_M=scale_M)


def swiglu_row_gradient(
    dgate_MO: Float[Array, "M O"],
    dup_MO: Float[Array, "M O"],
    gate_GOI: Matrices,
    up_GOI: Matrices,
    sizes_G: Int[Array, " G"],
) -> Float[Array, "M I"]:
    """dgate[m] @ gate + dup[m] @ up, summed before it is rounded."""
    return multiply_rows([dgate_MO, dup_MO], [gate_GOI, up_GOI], sizes_G, turned=False)[
        0
    ]
