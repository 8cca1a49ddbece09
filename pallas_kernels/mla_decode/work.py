"""What the TPU kernel of MLA decoding moves and computes, from its blocks and copies."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

PIECE = 128  # slots of the smallest copy: a TPU's tile has as many lanes


class Work(NamedTuple):
    """One call's work: bytes by operand, floating-point operations.

    Of the bytes `moved`, those of the cache are `latent` and `rope`; `needed` are the
    cache's slots that are seen. `flops` are of the blocks visited.
    """

    moved: dict[str, int]
    needed: int
    flops: int
    flops_needed: int
    exponentials: int

    def estimate(self) -> pl.CostEstimate:
        """For `pallas_call`."""
        return pl.CostEstimate(
            flops=self.flops,
            transcendentals=self.exponentials,
            bytes_accessed=sum(self.moved.values()),
        )


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
    """The work on rows of these lengths; `sizes` are those of latent and rotary part."""
    (latent, rope), width = sizes, jnp.dtype(dtype).itemsize
    queries, block = tokens * heads, block_slots(dtype)
    copied = sum(-(-length // PIECE) * PIECE for length in lengths)
    visited = sum(-(-length // block) * block for length in lengths)
    seen = sum(max(length - token, 0) for length in lengths for token in range(tokens))
    products = 2 * latent + rope
    rows = len(lengths) * queries
    return Work(
        moved={
            "latent": copied * latent * width,
            "rope": copied * rope * width,
            "q": rows * latent * width,
            "q_rope": rows * rope * width,
            "out": rows * latent * width,
            "lse": rows * 4,
        },
        needed=sum(lengths) * (latent + rope) * width,
        flops=2 * visited * queries * products,
        flops_needed=2 * seen * heads * products,
        exponentials=visited * queries,
    )
