"""Causal attention by cuDNN, through JAX: what a Hopper GPU runs best today.

Letters: B batch, T length, K kv heads, G query heads of each, N = K G query heads, H size
of queries and keys, U size of values.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.reference import Visible


@functools.cache
def available() -> bool:
    """Whether this process runs on a GPU of Hopper's generation or later, with cuDNN.

    JAX asks the device at hand while it traces a call of cuDNN: compiling for a GPU that
    is not here has to do without.
    """
    from jax._src.lib import cuda_versions

    if cuda_versions is None or jax.default_backend() != "gpu":
        return False
    return float(jax.devices()[0].compute_capability) >= 9.0


def lacks(q: Array, k: Array, v: Array, visible: Visible) -> str:
    """Why cuDNN is not for these operands, here; empty where it is."""
    sizes = (q.shape[-1], v.shape[-1])
    if not available():
        return "no Hopper GPU with cuDNN at hand"
    if visible.segments_BT is not None:
        return "segments"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype=} is not of 16 bits"
    if any(size % 8 or size > 256 for size in sizes):
        return f"heads of {sizes}: not multiples of 8 up to 256"
    return ""


def forward(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    visible: Visible,
    *,
    scale: float,
) -> tuple[Float[Array, "B T K G U"], Float[Array, "B T K G"]]:
    """softmax(scale * q k) v, and its log-sum-exp in float32."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    out_BTNU, lse_BNT = fused.dot_product_attention(
        _merged(q_BTKGH),
        k_BTKH,
        v_BTKU,
        scale=scale,
        mask_type=fused.MaskType.CAUSAL,
        return_residual=True,
    )
    heads = q_BTKGH.shape[:4]
    return out_BTNU.reshape(*heads, -1), lse_BNT.swapaxes(1, 2).reshape(heads)


def backward(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    visible: Visible,
    out_BTKGU: Float[Array, "B T K G U"],
    lse_BTKG: Float[Array, "B T K G"],
    dout_BTKGU: Float[Array, "B T K G U"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K U"]]:
    """The gradients of q, k and v, from what `forward` gave."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    rule = fused._dot_product_attention_bwd_rule
    none = jnp.zeros(0, q_BTKGH.dtype)  # bias, lengths, offsets, page tables
    lse_BNT = lse_BTKG.reshape(*lse_BTKG.shape[:2], -1).swapaxes(1, 2)
    # Since JAX 0.12 a function may change the scores: here none, of no arguments.
    change, of = (), ()
    if "score_mod" in inspect.signature(rule).parameters:
        change, of = (None,), ((),)
    operands = (_merged(q_BTKGH), k_BTKH, v_BTKU, *[none] * 7, *of)
    dq_BTNH, dk_BTKH, dv_BTKU, *_ = rule(
        scale,
        42,  # the default seed, of no dropout
        0.0,
        (False, False),
        fused.MaskType.CAUSAL,
        fused.AttentionLayout.BTNH.value,
        None,
        *change,
        fused.check_cudnn_version(),
        False,
        (*operands, lse_BNT, _merged(out_BTKGU)),
        _merged(dout_BTKGU),
    )
    return dq_BTNH.reshape(q_BTKGH.shape), dk_BTKH, dv_BTKU


def _merged(x_BTKGH: Array) -> Array:
    """K kv heads of G query heads each as N heads."""
    B, T, K, G, H = x_BTKGH.shape
    return x_BTKGH.reshape(B, T, K * G, H)
