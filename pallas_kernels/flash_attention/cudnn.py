"""Causal attention by cuDNN, through JAX: what a Hopper GPU runs best today.

Letters: B batch, T length, K kv heads, G query heads of each, H size of queries and
keys, U size of values.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


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


def takes(q: Array, k: Array, v: Array) -> bool:
    """Whether cuDNN handles these dtypes and head sizes."""
    sizes = (q.shape[-1], v.shape[-1])
    halves = (jnp.bfloat16, jnp.float16)
    return q.dtype in halves and all(size % 8 == 0 and size <= 256 for size in sizes)


def cudnn(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    *,
    scale: float,
) -> Float[Array, "B T K G U"]:
    """softmax(scale * q k) v over each token's past and itself; nothing quadratic is
    kept for the gradient.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def local(q_BTKGH, k_BTKH, v_BTKU):
        B, T, K, G, H = q_BTKGH.shape
        q_BTNH = q_BTKGH.reshape(B, T, K * G, H)
        out_BTNU = fused.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKU, scale=scale, mask_type=fused.MaskType.CAUSAL
        )
        return out_BTNU.reshape(B, T, K, G, -1)

    spec = jax.typeof(q_BTKGH).sharding.spec
    if not len(spec):  # no mesh around
        return local(q_BTKGH, k_BTKH, v_BTKU)
    batch, _, heads, *_ = spec
    q, kv = P(batch, None, heads, None, None), P(batch, None, heads, None)
    return jax.shard_map(local, in_specs=(q, kv, kv), out_specs=q, check_vma=False)(
        q_BTKGH, k_BTKH, v_BTKU
    )
