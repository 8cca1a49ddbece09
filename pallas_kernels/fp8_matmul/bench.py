"""Block-scaled FP8 products at V3's shapes; run by `python -m pallas_kernels.bench`.

Letters: M rows, K inner, N outer, G groups.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul import (
    fp8_matmul,
    grouped_fp8_matmul,
    quantize,
    quantize_blocks,
    quantize_rows,
)
from pallas_kernels.fp8_matmul.quantize import dequantize
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.reference import blocked
from pallas_kernels.measure import Case


def _case(M: int, N: int, K: int, target: str = "") -> Case:
    def inputs(key):
        x_key, w_key = jax.random.split(key)
        x = jax.random.normal(x_key, (M, K), jnp.bfloat16)
        w = jax.random.normal(w_key, (N, K), jnp.bfloat16)
        return *quantize_rows(x), *quantize_blocks(w)

    def exact(x, x_scale, w, w_scale):
        x, w = dequantize(x, x_scale), dequantize(w, w_scale)
        return jnp.einsum("mk,nk->mn", x, w, precision="highest")

    def dequantized(x, x_scale, w, w_scale):
        x = dequantize(x, x_scale, dtype=jnp.bfloat16)
        w = dequantize(w, w_scale, dtype=jnp.bfloat16)
        return jnp.einsum("mk,nk->mn", x, w)

    return Case(
        operation="fp8_matmul",
        name=f"M {M}, N {N}, K {K}",
        inputs=inputs,
        contestants={"pallas": fp8_matmul, "dequantise + dot": dequantized},
        exact=exact,
        flops=2 * M * N * K,
        bytes=M * K + N * K + 2 * M * N,
        torch=_torch,
        target=target,
    )


def _grouped_case(G: int, M: int, N: int, K: int, target: str = "") -> Case:
    """The operands of both precisions, so that none is converted while timed."""

    def inputs(key):
        x_key, w_key, share_key = jax.random.split(key, 3)
        x = quantize_rows(jax.random.normal(x_key, (M, K), jnp.bfloat16))
        w = quantize_blocks(jax.random.normal(w_key, (G, N, K), jnp.bfloat16))
        shares = jax.random.dirichlet(share_key, jnp.full((G,), 20.0))
        ends = jnp.round(jnp.cumsum(shares) * M).astype(jnp.int32).at[-1].set(M)
        sizes = jnp.diff(ends, prepend=0)
        wide = [dequantize(*both, dtype=jnp.bfloat16) for both in (x, w)]
        return *x, *w, sizes, *wide

    def exact(x, x_scale, w, w_scale, sizes, *_):
        with jax.default_matmul_precision("highest"):
            return blocked(dequantize(x, x_scale), dequantize(w, w_scale), sizes)

    return Case(
        operation="fp8_matmul",
        name=f"{G} groups, {M} rows, K {K}, N {N}",
        inputs=inputs,
        contestants={
            "pallas": lambda *operands: grouped_fp8_matmul(*operands[:5]),
            "pallas, bfloat16": lambda *operands: grouped_matmul(
                *operands[5:], operands[4]
            ),
        },
        exact=exact,
        flops=2 * M * N * K,
        bytes=M * K + G * N * K + 2 * M * N,
        target=target,
    )


def _quantize_case(M: int, K: int) -> Case:
    """Errors are those of three bits of mantissa."""

    def inputs(key):
        return (jax.random.normal(key, (M, K), jnp.bfloat16),)

    def exact(x):
        _, scale = quantize.quantize_rows(x)
        return x / jnp.repeat(scale, quantize.BLOCK, axis=1)

    return Case(
        operation="fp8_matmul",
        name=f"quantize_rows, {M} rows of {K}",
        inputs=inputs,
        contestants={"pallas": quantize_rows, "XLA": quantize.quantize_rows},
        exact=exact,
        flops=M * K,
        bytes=3 * M * K + 4 * M * K // quantize.BLOCK,
    )


def _torch() -> dict:
    from torch import bfloat16
    from torch.nn.functional import ScalingType, scaled_mm

    @functools.lru_cache(maxsize=1)
    def turned(x_scale):
        """PyTorch wants one column of tiles after the other: not timed."""
        return x_scale.t().contiguous().t()

    def blockwise(x, x_scale, w, w_scale):
        return scaled_mm(
            *(x, w.t(), turned(x_scale), ScalingType.BlockWise1x128),
            *(w_scale.t(), ScalingType.BlockWise128x128),
            output_dtype=bfloat16,
        )

    return {"torch scaled_mm, blockwise": blockwise}


CASES = [
    _case(4096, 4096, 7168, ">= 1.15x torch"),
    _case(8192, 8192, 8192, ">= 1.15x torch"),
    _case(4096, 7168, 2048),
    _grouped_case(8, 32768, 4096, 7168, ">= 1.7x bfloat16"),
    _quantize_case(32768, 7168),
]
