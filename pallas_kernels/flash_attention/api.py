"""The face of fused causal attention: who computes it where.

Letters: B batch, T length, K kv heads, G query heads of each, H size of queries and
keys, U size of values.
"""

from jaxtyping import Array, Float

from pallas_kernels.flash_attention.cudnn import available, cudnn, takes


def supported(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
) -> bool:
    """Whether something fused runs these operands on the device at hand."""
    return available() and takes(q_BTKGH, k_BTKH, v_BTKU)


def flash_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    *,
    scale: float,
) -> Float[Array, "B T K G U"]:
    """softmax(scale * q k) v over each token's past and itself, the softmax in float32.

    Differentiable; results have the dtype of `q`. On a mesh, batch and kv heads may be
    cut.

    Raises:
        NotImplementedError: nothing fused takes these operands here; ask `supported`.
    """
    if not supported(q_BTKGH, k_BTKH, v_BTKU):
        raise NotImplementedError(
            f"no fused attention here for {q_BTKGH.shape=}, {v_BTKU.shape=}, "
            f"{q_BTKGH.dtype=}: cuDNN on a Hopper GPU, 16-bit, heads of 8 to 256"
        )
    return cudnn(q_BTKGH, k_BTKH, v_BTKU, scale=scale)
