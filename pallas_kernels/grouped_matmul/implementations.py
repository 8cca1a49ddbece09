"""Who computes grouped products: a table, and the choice by platform.

Letters: M rows, K inner, N outer, G groups; D the model, F an expert.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import note_choice, without_kernels
from pallas_kernels.grouped_matmul import pallas_gpu, pallas_tpu, reference
from pallas_kernels.grouped_matmul.layers import Matrices, apart
from pallas_kernels.grouped_matmul.padded import fits, padded
from pallas_kernels.grouped_matmul.tiles_gpu import dense_lacks
from pallas_kernels.grouped_matmul.tiles_gpu import lacks as gpu_lacks
from pallas_kernels.grouped_matmul.tiles_tpu import lacks as tpu_lacks

KERNELS = {"tpu": "Pallas", "cuda": "Mosaic GPU"}
DENSE = "dense"  # of one group that has all rows: what the platform has for it


class Implementation(NamedTuple):
    """All take the keyword `expected_rows`; gradients the `dtype` of weights', too."""

    product: Callable  # x, w, sizes -> y
    gradients: Callable  # dy, x, w, sizes -> dx, dw
    swiglu: Callable  # x, gate, up, scale, sizes -> h
    both: Callable  # x, gate, up, sizes -> x @ gate.T, x @ up.T
    all_three: (
        Callable  # x, gate, up, scale, sizes -> both, and h of what they rounded to
    )
    swiglu_gradients: (
        Callable  # dgate, dup, x, gate, up, sizes -> dx, and both weights'
    )
    down_gradients: (
        # dy, h, down, gated, lifted, scale, sizes -> those of gated, lifted, scale, down
        Callable
    )


def dispatch(
    implementation: str | None,
    operation: str,
    x: Array,
    w: Matrices,
    *operands: Array | Matrices,
    **options,
):
    """Runs an operation of the implementation named, or of the one for the platform that
    is compiled for: a process without that platform may do so, too. Only the kernels
    read a layer's matrices out of the stack.
    """

    def run(name: str) -> Callable:
        found = (IMPLEMENTATIONS | FOR_ONE_GROUP)[name]
        call = functools.partial(getattr(found, operation), **options)
        reads = name in ("tpu", "hopper")
        return call if reads else lambda *operands: call(*map(apart, operands))

    if implementation == DENSE and not operation.endswith("gradients"):
        implementation = "xla_dense"  # on all platforms
    if implementation not in (None, DENSE):
        return run(implementation)(*operands)
    choose = _of_one_group if implementation == DENSE else _of_groups
    platforms = choose(x, w)
    return jax.lax.platform_dependent(
        *operands, **{platform: run(name) for platform, name in platforms.items()}
    )


def _of_groups(x: Array, w: Matrices) -> dict[str, str]:
    """Who computes it on which platform."""
    asked = "is not asked for" if without_kernels() else ""
    lacking = {
        "tpu": asked or tpu_lacks(x.shape[0], w.shape, x.dtype),
        "cuda": asked or gpu_lacks(x.shape[0], w.shape, x.dtype),
    }
    note_choice("grouped_matmul", KERNELS, lacking)
    copies = "padded" if fits(x.shape[0], w) else "blocked"
    return {
        "tpu": "ragged_dot" if lacking["tpu"] else "tpu",
        "cuda": copies if lacking["cuda"] else "hopper",
        "default": "blocked",
    }


def _of_one_group(x: Array, w: Matrices) -> dict[str, str]:
    """The same of a gradient, if there is one group that has all rows."""
    asked = "is not asked for" if without_kernels() else ""
    lacking = {"cuda": asked or dense_lacks(x.shape[0], w.shape, x.dtype)}
    note_choice("feed_forward", {"cuda": KERNELS["cuda"]}, lacking)
    return {
        "cuda": "xla_dense" if lacking["cuda"] else "hopper_dense",
        "default": "xla_dense",
    }


def combine(
    gated_MF: Float[Array, "M F"],
    lifted_MF: Float[Array, "M F"],
    scale_M: Float[Array, " M"],
) -> Float[Array, "M F"]:
    """silu(gated) * lifted * scale, in float32."""
    gated_MF, lifted_MF, scale_M = (
        a.astype(jnp.float32) for a in (gated_MF, lifted_MF, scale_M)
    )
    return jax.nn.silu(gated_MF) * lifted_MF * scale_M[:, None]


def ragged_dot(
    x_MK: Float[Array, "M K"], w_GNK: Float[Array, "G N K"], sizes_G: Int[Array, " G"]
) -> Float[Array, "M N"]:
    """XLA's ragged product, with the surplus rows zeroed."""
    y_MN = jax.lax.ragged_dot(
        x_MK, w_GNK.swapaxes(1, 2), sizes_G, preferred_element_type=jnp.float32
    )
    real_M = jnp.arange(x_MK.shape[0]) < sizes_G.sum()
    return jnp.where(real_M[:, None], y_MN, 0).astype(x_MK.dtype)


def dense(
    x_MK: Float[Array, "M K"], w_GNK: Float[Array, "1 N K"], sizes_G: Int[Array, " 1"]
) -> Float[Array, "M N"]:
    """The product of a single group that has all rows."""
    return jnp.einsum("MK,NK->MN", x_MK, w_GNK[0])


def _plain(product: Callable, gradients: Callable | None = None) -> Implementation:
    """From a product of x, w and sizes; without `gradients`, JAX's of it."""

    def derived(dy, x, w, sizes, *, dtype):
        _, back = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        dx, dw = back(dy)
        return dx, dw.astype(dtype)

    def forward(x, w, sizes, *, expected_rows):
        return product(x, w, sizes)

    def backward(dy, x, w, sizes, *, dtype, expected_rows):
        return (gradients or derived)(dy, x, w, sizes, dtype=dtype)

    return _composed(forward, backward)


def _composed(product: Callable, gradients: Callable) -> Implementation:
    """SwiGLU from two products, one after the other."""

    def both(x, gate, up, sizes, **rows):
        return product(x, gate, sizes, **rows), product(x, up, sizes, **rows)

    def swiglu(x, gate, up, scale, sizes, **rows):
        gate, up = both(x, gate, up, sizes, **rows)
        return combine(gate, up, scale).astype(x.dtype)

    def swiglu_gradients(dgate, dup, x, gate, up, sizes, **options):
        through_gate, dgate = gradients(dgate, x, gate, sizes, **options)
        through_up, dup = gradients(dup, x, up, sizes, **options)
        return through_gate + through_up, dgate, dup

    three, through = _and_result(both), _through_swiglu(gradients)
    return Implementation(
        product, gradients, swiglu, both, three, swiglu_gradients, through
    )


def _and_result(both: Callable) -> Callable:
    """From a function that makes both products, one that makes all three."""

    def all_three(x, gate, up, scale, sizes, **rows):
        products = both(x, gate, up, sizes, **rows)
        return *products, combine(*products, scale).astype(x.dtype)

    return all_three


def _through_swiglu(gradients: Callable) -> Callable:
    """From the gradients of a product, those of one of SwiGLU's result."""

    def down_gradients(dy, h, down, gated, lifted, scale, sizes, **options):
        dh, ddown = gradients(dy, h, down, sizes, **options)
        _, back = jax.vjp(combine, gated, lifted, scale)
        return *back(dh.astype(jnp.float32)), ddown

    return down_gradients


def _tpu_gradients(dy, x, w, sizes, *, dtype, **rows):
    dx = pallas_tpu.row_gradient(dy, w, sizes, **rows)
    return dx, pallas_tpu.weight_gradient(dy, x, sizes, dtype=dtype, **rows)


def _tpu_swiglu(x, gate, *operands, **rows):
    apart = tpu_lacks(x.shape[0], gate.shape, x.dtype, gated=True)
    run = _TPU_COMPOSED.swiglu if apart else pallas_tpu.swiglu
    return run(x, gate, *operands, **rows)


def _tpu_both(x, gate, *operands, **rows):
    apart = tpu_lacks(x.shape[0], gate.shape, x.dtype, gated=True)
    run = _TPU_COMPOSED.both if apart else pallas_tpu.both
    return run(x, gate, *operands, **rows)


def _tpu_swiglu_gradients(dgate, dup, x, gate, up, sizes, *, dtype, **rows):
    operands = (dgate, dup, x, gate, up, sizes)
    if tpu_lacks(x.shape[0], gate.shape, x.dtype, gated=True):
        return _TPU_COMPOSED.swiglu_gradients(*operands, dtype=dtype, **rows)
    dx = pallas_tpu.swiglu_row_gradient(dgate, dup, gate, up, sizes, **rows)
    by_weights = [
        pallas_tpu.weight_gradient(dy, x, sizes, dtype=dtype, **rows)
        for dy in (dgate, dup)
    ]
    return dx, *by_weights


def _gpu(operation: Callable) -> Callable:
    """The same for how many rows soever are expected: no cost is reported."""

    def run(*operands, expected_rows, **options):
        return operation(*operands, **options)

    return run


def _gpu_gradients(dy, x, w, sizes, *, dtype):
    dx = pallas_gpu.row_gradient(dy, w, sizes)
    return dx, *pallas_gpu.weight_gradients([dy], x, sizes, dtype=dtype)


def _gpu_swiglu_gradients(dgate, dup, x, gate, up, sizes, *, dtype):
    dx = pallas_gpu.swiglu_row_gradient(dgate, dup, gate, up, sizes)
    return dx, *pallas_gpu.weight_gradients([dgate, dup], x, sizes, dtype=dtype)


def _gpu_down_gradients(dy, h, down, gated, lifted, scale, sizes, *, dtype):
    operands = (dy, down, gated, lifted, scale, sizes)
    through = pallas_gpu.swiglu_gradient(*operands)
    return *through, *pallas_gpu.weight_gradients([dy], h, sizes, dtype=dtype)


def _dense_weights(dy, x):
    """One group's are few tiles, each a long sum: XLA cuts the sum, too."""
    return jnp.einsum("MN,MK->NK", dy, x)[None]


def _dense_swiglu_gradients(dgate, dup, x, gate, up, sizes, *, dtype):
    dx = pallas_gpu.swiglu_row_gradient(dgate, dup, gate, up, sizes)
    return dx, *(_dense_weights(dy, x).astype(dtype) for dy in (dgate, dup))


def _dense_down_gradients(dy, h, down, gated, lifted, scale, sizes, *, dtype):
    through = pallas_gpu.swiglu_gradient(dy, down, gated, lifted, scale, sizes)
    return *through, _dense_weights(dy, h).astype(dtype)


_XLA_DENSE = _plain(dense)
# For one group that has all rows. XLA's products are as quick as the kernels': what these
# save is what passes between them.
FOR_ONE_GROUP = {
    "xla_dense": _XLA_DENSE,
    "hopper_dense": _XLA_DENSE._replace(
        swiglu_gradients=_gpu(_dense_swiglu_gradients),
        down_gradients=_gpu(_dense_down_gradients),
    ),
}
_TPU_COMPOSED = _composed(pallas_tpu.product, _tpu_gradients)

IMPLEMENTATIONS = {
    "blocked": _plain(reference.blocked, reference.gradients),
    "hopper": Implementation(
        *map(
            _gpu,
            (
                pallas_gpu.product,
                _gpu_gradients,
                pallas_gpu.swiglu,
                pallas_gpu.both,
                pallas_gpu.all_three,
                _gpu_swiglu_gradients,
                _gpu_down_gradients,
            ),
        )
    ),
    "padded": _plain(padded),
    "ragged_dot": _plain(ragged_dot),
    "tpu": Implementation(
        pallas_tpu.product,
        _tpu_gradients,
        _tpu_swiglu,
        _tpu_both,
        _and_result(_tpu_both),
        _tpu_swiglu_gradients,
        _through_swiglu(_tpu_gradients),
    ),
}
