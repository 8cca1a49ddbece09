"""Block-scaled FP8 products in plain JAX, on any platform.

What the kernels do, step by step: the products of 128 of the inner axis are summed in
float32 before they are scaled, and the scaled sums are added in float32. E4m3 values and
products of two are exact in what any matrix unit is given here.

Letters: M rows, K inner, N outer, G groups; k, n blocks of 128.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.fp8_matmul.quantize import BLOCK
from pallas_kernels.grouped_matmul.reference import blocked


def dense(
    x_MK: Float[Array, "M K"],
    x_scale_Mk: Float[Array, "M k"],
    w_NK: Float[Array, "N K"],
    w_scale_nk: Float[Array, "n k"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """(x scaled) @ (w scaled).T; see `pallas_kernels.fp8_matmul.api`."""
    N = w_NK.shape[0]

    def part(x_Mb, w_Nb):
        x_Mb, w_Nb = x_Mb.astype(jnp.bfloat16), w_Nb.astype(jnp.bfloat16)
        return jnp.einsum("mb,nb->mn", x_Mb, w_Nb, preferred_element_type=jnp.float32)

    def scale(k):
        of_columns = jnp.repeat(w_scale_nk[:, k], BLOCK)[:N]
        return x_scale_Mk[:, k, None] * of_columns

    return _promoted(part, scale, x_MK, w_NK).astype(dtype)


def grouped(
    x_MK: Float[Array, "M K"],
    x_scale_Mk: Float[Array, "M k"],
    w_GNK: Float[Array, "G N K"],
    w_scale_Gnk: Float[Array, "G n k"],
    sizes_G: Int[Array, " G"],
    *,
    dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """Row m of group g times w[g].T; see `pallas_kernels.fp8_matmul.api`."""
    M, (G, N, _) = x_MK.shape[0], w_GNK.shape
    ends_G = jnp.cumsum(sizes_G)
    group_M = jnp.searchsorted(ends_G, jnp.arange(M), side="right")
    group_M = jnp.minimum(group_M, G - 1)  # rows of none: their products are zeros

    def part(x_Mb, w_GNb):
        return blocked(x_Mb.astype(jnp.float32), w_GNb.astype(jnp.float32), sizes_G)

    def scale(k):
        of_columns = jnp.repeat(w_scale_Gnk[:, :, k], BLOCK, axis=1)[:, :N]
        return x_scale_Mk[:, k, None] * of_columns[group_M]

    return _promoted(part, scale, x_MK, w_GNK).astype(dtype)


def _promoted(part, scale, x: Array, w: Array) -> Array:
    """The sum over blocks of the inner axis of `part` times `scale`, in float32."""
    K = x.shape[1]
    x, w = (jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -K % BLOCK)]) for a in (x, w))

    def add(k, sums):
        x_b, w_b = (
            jax.lax.dynamic_slice_in_dim(a, k * BLOCK, BLOCK, axis=-1) for a in (x, w)
        )
        return sums + part(x_b, w_b) * scale(k)

    sums = jnp.zeros((x.shape[0], w.shape[-2]), jnp.float32)
    return jax.lax.fori_loop(0, -(-K // BLOCK), add, sums)
