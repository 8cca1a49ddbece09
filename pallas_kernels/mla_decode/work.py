"""What the TPU kernel of MLA decoding moves and computes, from its blocks and copies."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.work import Work

PIECE = 128  # slots of the smallest copy: a TPU's tile has as many lanes


def block_slots(dtype: DTypeLike) -> int:
    """Slots of a block: 512 KiB of latents of 512, a few of which the VMEM holds."""
    return 512 if jnp.dtype(dtype).itemsize == 2 else 256


def count(
    lengths: Sequence[int],
    *,
    tokens: int,
    heads: int,
    sizes: tuple[int, int],
    dtype: DTypeLike,
) -> Work:
    """The work on rows of these lengths; `sizes` are those of latent and rotary part.

    Of the cache, the slots that are seen are needed; FLOPs are of the blocks visited.
    """
    (latent, rope), width = sizes, jnp.dtype(dtype).itemsize
    queries, block = tokens * heads, block_slots(dtype)
    copied = sum(-(-length // PIECE) * PIECE for length in lengths)
    visited = sum(-(-length // block) * block for length in lengths)
    seen = sum(max(length - token, 0) for length in lengths for token in range(tokens))
    products = 2 * latent + rope
    rows = len(lengths) * queries
    others = {
        "q": rows * latent * width,
        "q_rope": rows * rope * width,
        "out": rows * latent * width,
        "lse": rows * 4,
    }

    def cache(slots: int) -> dict[str, int]:
        return {"latent": slots * latent * width, "rope": slots * rope * width}

    return Work(
        moved=cache(copied) | others,
        needed=cache(sum(lengths)) | others,
        flops=2 * visited * queries * products,
        flops_needed=2 * seen * heads * products,
        exponentials=visited * queries,
    )
