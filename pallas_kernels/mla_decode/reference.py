"""Absorbed MLA decoding in plain JAX, on any platform.

Letters: B rows, T new tokens, N heads, L latent, R rope, Y layers, X rows or pages of the
cache, Z slots of one, P pages of a row, S slots of a row.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def decode(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
    rope_YXRZ: Float[Array, "Y X R Z"],
    lengths_B: Int[Array, " B"],
    layer: Int[Array, ""],
    pages_BP: Int[Array, "B P"] | None,
    latent_scale_YXZ: Float[Array, "Y X Z"] | None = None,
    *,
    scale: float,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T N L"], Float[Array, "B T N"]]:
    """See `pallas_kernels.mla_decode.api`; the softmax is in `dtype`."""
    caches = (latent_YXZL, rope_YXRZ, latent_scale_YXZ)
    c_BSL, k_BRS = _rows(*caches, layer, pages_BP, q_BTNL.dtype)
    wide = {"preferred_element_type": dtype}
    scores_BTNS = jnp.einsum("BTNL,BSL->BTNS", q_BTNL, c_BSL, **wide)
    scores_BTNS += jnp.einsum("BTNR,BRS->BTNS", q_BTNR, k_BRS, **wide)
    slots, tokens = c_BSL.shape[1], q_BTNL.shape[1]
    lengths_B = jnp.clip(lengths_B, 0, slots)
    seen_BT = lengths_B[:, None] - jnp.arange(tokens - 1, -1, -1)
    visible = jnp.arange(slots) < seen_BT[:, :, None]
    lowest = jnp.finfo(dtype).min
    scores_BTNS = jnp.where(visible[:, :, None], scores_BTNS * scale, lowest)
    highest = scores_BTNS.max(axis=-1, keepdims=True)
    weights_BTNS = jnp.where(visible[:, :, None], jnp.exp(scores_BTNS - highest), 0)
    total = weights_BTNS.sum(axis=-1, keepdims=True)
    some = total > 0
    weights_BTNS = weights_BTNS / jnp.where(some, total, 1)
    lse_BTN = jnp.where(some, highest + jnp.log(total), -jnp.inf)[..., 0]
    # Slots that nobody sees may hold anything.
    c_BSL = jnp.where(visible[:, -1, :, None], c_BSL, 0)
    out_BTNL = jnp.einsum("BTNS,BSL->BTNL", weights_BTNS.astype(c_BSL.dtype), c_BSL)
    return out_BTNL, lse_BTN.astype(jnp.float32)


def append(
    rope_YXRZ: Float[Array, "Y X R Z"],
    new_BTR: Float[Array, "B T R"],
    first_B: Int[Array, " B"],
    layer: Int[Array, ""],
    pages_BP: Int[Array, "B P"] | None,
) -> Float[Array, "Y X R Z"]:
    """See `pallas_kernels.mla_decode.api`."""
    (B, T, _), Z = new_BTR.shape, rope_YXRZ.shape[-1]
    slot_BT = first_B[:, None] + jnp.arange(T)
    place_BT, slots = jnp.arange(B)[:, None], Z
    if pages_BP is not None:
        slots = pages_BP.shape[1] * Z
        page_BT = jnp.clip(slot_BT // Z, 0, pages_BP.shape[1] - 1)
        place_BT = jnp.take_along_axis(pages_BP, page_BT, axis=1)
    fits = (slot_BT >= 0) & (slot_BT < slots)
    slot_BT = jnp.where(fits, slot_BT % Z, Z)  # slot Z is dropped
    new = new_BTR.astype(rope_YXRZ.dtype)
    return rope_YXRZ.at[layer, place_BT, :, slot_BT].set(new, mode="drop")


def _rows(latent_YXZL, rope_YXRZ, scale_YXZ, layer, pages_BP, dtype):
    """One layer's latents [B, S, L], times their scales, and rotary keys [B, R, S]."""

    def own(cache):
        return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)

    c_XZL, k_XRZ = own(latent_YXZL), own(rope_YXRZ).astype(dtype)
    if scale_YXZ is not None:
        c_XZL = c_XZL.astype(jnp.float32) * own(scale_YXZ)[..., None]
    c_XZL = c_XZL.astype(dtype)
    if pages_BP is None:
        return c_XZL, k_XRZ
    c_BPZL, k_BPRZ = (x.at[pages_BP].get(mode="clip") for x in (c_XZL, k_XRZ))
    c_BSL = c_BPZL.reshape(len(c_BPZL), -1, c_BPZL.shape[-1])
    k_BRPZ = k_BPRZ.swapaxes(1, 2)
    return c_BSL, k_BRPZ.reshape(*k_BRPZ.shape[:2], -1)
