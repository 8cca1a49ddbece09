"""The face of block-scaled FP8 products: what they compute, and who computes it where.

Letters: M rows, K inner, N outer, G groups; k, n blocks of 128 of them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import named, note_choice
from pallas_kernels.fp8_matmul import pallas_gpu, quantize, quantize_gpu, reference
from pallas_kernels.fp8_matmul.quantize import BLOCK, E4M3

IMPLEMENTATIONS = {"hopper": pallas_gpu, "reference": reference}
QUANTIZERS = {"hopper": quantize_gpu, "reference": quantize}
DTYPES = (jnp.bfloat16, jnp.float32)  # of results


def fp8_matmul(
    x_MK: Float[Array, "M K"],
    x_scale_Mk: Float[Array, "M k"],
    w_NK: Float[Array, "N K"],
    w_scale_nk: Float[Array, "n k"],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """(x scaled) @ (w scaled).T, as DeepSeek-V3 trains and serves (report, 3.3).

    `x` and `w` are e4m3; their float32 scales multiply 1 x 128 tiles of `x` and
    128 x 128 blocks of `w`, of which the last may be cut: `quantize_rows` and
    `quantize_blocks` make both, and `w_scale` is `weight_scale_inv` of a published
    checkpoint. The products of every 128 of K are summed by the matrix unit, whose own
    sums of FP8 products have few bits, then scaled and added up in float32. The result
    is bfloat16 or float32. Not differentiable.

    `implementation`: "hopper" is a kernel for NVIDIA's H100 and H200, K and N of at
    least 128 that 16 divides; "reference" is plain JAX. None chooses by the platform
    that is compiled for, and logs its choice in one line.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: "hopper" was named and does not take these operands.
    """
    operands = (x_MK, x_scale_Mk, w_NK, w_scale_nk)
    _check(*operands, dtype)
    return _dispatch("dense", operands, implementation, dtype)


def grouped_fp8_matmul(
    x_MK: Float[Array, "M K"],
    x_scale_Mk: Float[Array, "M k"],
    w_GNK: Float[Array, "G N K"],
    w_scale_Gnk: Float[Array, "G n k"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Row m of group g becomes (x[m] scaled) @ (w[g] scaled).T.

    Rows are sorted by group, as for `grouped_matmul`: the first sizes[0] belong to group
    0, and so on. Groups may be empty or uneven; nothing is padded in memory. Rows past
    sum(sizes) give zeros; sizes that claim more rows than there are end with the rows.
    All else is as for `fp8_matmul`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: "hopper" was named and does not take these operands.
    """
    operands = (x_MK, x_scale_Mk, w_GNK, w_scale_Gnk)
    _check(*operands, dtype, sizes_G)
    ends_G = jnp.minimum(jnp.cumsum(sizes_G.astype(jnp.int32)), x_MK.shape[0])
    operands = (*operands, jnp.diff(ends_G, prepend=0))
    return _dispatch("grouped", operands, implementation, dtype)


def quantize_rows(
    x_MK: Float[Array, "*batch M K"], *, implementation: str | None = None
) -> tuple[Float[Array, "*batch M K"], Float[Array, "*batch M k"]]:
    """Activations: e4m3 and a float32 scale for each 1 x 128 tile, of which the last of
    a row may be cut. A scale brings the largest value of its tile to 448.

    Any leading axes. Not differentiable.

    `implementation`: "hopper" is a kernel for NVIDIA's H100 and H200 that reads `x` once,
    bfloat16 or float32 of 64 rows at least and columns that 128 divides; "reference" is
    plain JAX. None chooses by the platform that is compiled for, and logs its choice.

    Raises:
        ValueError: the implementation is unknown.
        NotImplementedError: "hopper" was named and does not take this operand.
    """
    lacking = quantize_gpu.lacks(x_MK)
    return _choose(
        *("quantize_rows", implementation, lacking, f"{x_MK.shape=}, {x_MK.dtype=}"),
        {name: module.quantize_rows for name, module in QUANTIZERS.items()},
        (x_MK,),
    )


def _dispatch(
    operation: str, operands: tuple[Array, ...], implementation: str | None, dtype
) -> Array:
    def run(name: str) -> Callable:
        function = getattr(IMPLEMENTATIONS[name], operation)
        return functools.partial(function, dtype=dtype)

    x, _, w, *_ = operands
    lacking = pallas_gpu.lacks(x, w)
    return _choose(
        *("fp8_matmul", implementation, lacking, f"{x.shape=}, {w.shape=}"),
        {name: run(name) for name in IMPLEMENTATIONS},
        operands,
    )


def _choose(
    operation: str,
    implementation: str | None,
    lacking: str,
    request: str,
    implementations: dict[str, Callable],
    operands: tuple[Array, ...],
):
    """The named implementation's result, else that of the platform's."""
    implementation = named(implementation)
    if implementation == "hopper" and lacking:
        raise NotImplementedError(f"hopper {lacking}: {request}")
    if implementation in implementations:
        return implementations[implementation](*operands)
    if implementation is not None:
        names = tuple(implementations)
        raise ValueError(f"{implementation=} is not one of {names}")
    note_choice(operation, {"cuda": "Mosaic GPU"}, {"cuda": lacking})
    return jax.lax.platform_dependent(
        *operands,
        cuda=implementations["reference" if lacking else "hopper"],
        default=implementations["reference"],
    )


def _check(x, x_scale, w, w_scale, dtype, sizes=None) -> None:
    if x.dtype != E4M3 or w.dtype != E4M3:
        raise ValueError(f"{x.dtype=} and {w.dtype=} are not both {jnp.dtype(E4M3)}")
    if x_scale.dtype != jnp.float32 or w_scale.dtype != jnp.float32:
        raise ValueError(f"{x_scale.dtype=} and {w_scale.dtype=} are not float32")
    if jnp.dtype(dtype) not in DTYPES:
        raise ValueError(f"{dtype=} is neither bfloat16 nor float32")
    grouped = sizes is not None
    if x.ndim != 2 or w.ndim != 2 + grouped:
        raise ValueError(f"ranks of {x.shape=} and {w.shape=}: not 2 and {2 + grouped}")
    if x.shape[1] != w.shape[-1]:
        raise ValueError(f"last axes of {x.shape=} and {w.shape=} differ")
    expected = (x.shape[0], -(-x.shape[1] // BLOCK))
    if x_scale.shape != expected:
        raise ValueError(f"{x_scale.shape=} is not {expected}, for {x.shape=}")
    *groups, N, K = w.shape
    expected = (*groups, -(-N // BLOCK), -(-K // BLOCK))
    if w_scale.shape != expected:
        raise ValueError(f"{w_scale.shape=} is not {expected}, for {w.shape=}")
    if grouped and sizes.shape != (w.shape[0],):
        raise ValueError(f"{sizes.shape=} is not one for each group of {w.shape=}")
    if grouped and not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"{sizes.dtype=} is no integer type")
