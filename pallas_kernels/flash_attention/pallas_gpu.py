"""Causal attention on Hopper GPUs: cuDNN's forward pass, and a backward pass in Pallas
Mosaic GPU that is quicker than cuDNN's and gives the same bits each time.

Letters: B batch, T length, K kv heads, G query heads of each, N = K G, H size of queries
and keys, U size of values.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash_attention import cudnn
from pallas_kernels.flash_attention.gradients_gpu import OWN, Plan, gradients
from pallas_kernels.flash_attention.query_gradients_gpu import query_gradients
from pallas_kernels.flash_attention.reference import Visible
from pallas_kernels.mosaic import SMS

SIZES = ((192, 128), (128, 128), (64, 64))  # of heads: their sums fit into registers
MOST_KEPT = 5 * 2**29  # bytes of dS that are written, to be read by another kernel
ALIGN = 8  # rows that copies of swizzled tiles start at

forward = cudnn.forward


def lacks(q: Array, k: Array, v: Array, visible: Visible) -> str:
    """Why the kernels are not for these operands, here; empty where they are."""
    if lacking := cudnn.lacks(q, k, v, visible):
        return lacking
    B, T, K, G, H = q.shape
    if (H, v.shape[-1]) not in SIZES:
        return f"heads of {H} and {v.shape[-1]}"
    if T < OWN or T % ALIGN:
        return f"a length of {T}: not a multiple of {ALIGN} from {OWN} on"
    if G > 1 and (blocks := B * K * -(-T // OWN)) < SMS:
        return f"{blocks} blocks of keys: too few for all of the GPU"
    return ""


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
    """The gradients of q, k and v, from what `forward` gave.

    With P the softmax's weights, dP = dout v and delta the sum of out dout over U:
    dv = P dout, dS = P (dP - delta), dk = scale dS q and dq = scale dS k.

    One kernel makes dv, dk and dS, the last a temporary of 16 bits for each pair of a
    query and a key that it sees; another multiplies dS with keys. Where dS would take
    more than MOST_KEPT, the queries' kernel computes it again instead.
    """
    B, T, K, G, H = q_BTKGH.shape
    U = v_BTKU.shape[-1]
    q_BTNH, dout_BTNU = q_BTKGH.reshape(B, T, -1, H), dout_BTKGU.reshape(B, T, -1, U)
    products = out_BTKGU.astype(jnp.float32) * dout_BTKGU.astype(jnp.float32)
    lse_BNT = _by_head(-lse_BTKG / scale, end=-jnp.inf)
    delta_BNT = _by_head(-products.sum(-1), end=0.0)
    plan = Plan(B, T, K, G, H, U, scale, jnp.dtype(q_BTKGH.dtype), keys=True)
    keep = plan.score_bytes <= MOST_KEPT
    keys, queries = (k_BTKH, v_BTKU), (q_BTNH, dout_BTNU)
    dk, dv, *ds = gradients(plan._replace(keep=keep), keys, queries, lse_BNT, delta_BNT)
    if keep:
        dq_BTNH = query_gradients(plan, *ds, k_BTKH)
    else:
        plan = plan._replace(keys=False)
        (dq_BTNH,) = gradients(plan, queries, keys, lse_BNT, delta_BNT)
    return dq_BTNH.reshape(q_BTKGH.shape), dk, dv


def _by_head(x_BTKG: Array, end: float) -> Array:
    """[B, N, T], up to whole blocks."""
    x_BTN = x_BTKG.reshape(*x_BTKG.shape[:2], -1)
    more = -x_BTN.shape[1] % OWN
    return jnp.pad(x_BTN, ((0, 0), (0, more), (0, 0)), constant_values=end).mT
