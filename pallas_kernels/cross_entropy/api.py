"""The face of the cross-entropy: what it computes, and who computes it where.

Letters: R rows, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.cross_entropy import pallas_gpu, reference
from pallas_kernels.dispatch import named, note_choice

IMPLEMENTATIONS = ("hopper", "reference")


def cross_entropy(
    logits_RV: Float[Array, "R V"],
    targets_R: Int[Array, " R"],
    weights_R: Float[Array, " R"],
    *,
    dtype: DTypeLike,
    statistics: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[Float[Array, " R"], Float[Array, "R V"]]:
    """-log softmax(logits)[target] of each row, and the gradient of each row's with
    respect to its logits, times its weight, in `dtype`. Targets are from 0 to V - 1.

    Both at once, for a caller that differentiates by hand: of large logits, the gradient
    is made where they are at hand. Arithmetic and losses are `statistics`, whatever the
    dtype of the logits.

    `implementation`: "hopper" is a kernel for NVIDIA's H100 and H200, float32 arithmetic, V
    that 256 divides; it reads the logits from memory once, if the rows at work fit its L2
    cache (V up to about 90,000). "reference" is plain JAX. None takes the best of the
    platform that is compiled for, and logs its choice in one line.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: the implementation was named and does not take this.
    """
    if logits_RV.ndim != 2 or not targets_R.shape == weights_R.shape == (
        len(logits_RV),
    ):
        raise ValueError(
            f"{targets_R.shape=} and {weights_R.shape=} are not one for each row of "
            f"{logits_RV.shape=}"
        )
    if not jnp.issubdtype(targets_R.dtype, jnp.integer):
        raise ValueError(f"{targets_R.dtype=} is no integer type")
    operands, dtype = (logits_RV, targets_R, weights_R), jnp.dtype(dtype)
    statistics = jnp.dtype(statistics)
    options = {"dtype": dtype, "statistics": statistics}
    plain = functools.partial(reference.cross_entropy, **options)
    kernel = functools.partial(pallas_gpu.cross_entropy, dtype=dtype)
    lacking = pallas_gpu.lacks(logits_RV.shape, logits_RV.dtype, **options)
    match implementation := named(implementation):
        case None:
            note_choice("cross_entropy", {"cuda": "Mosaic GPU"}, {"cuda": lacking})
            on_gpu = plain if lacking else kernel
            return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=plain)
        case "reference":
            return plain(*operands)
        case "hopper":
            if lacking:
                raise NotImplementedError(
                    f"the Hopper kernel {lacking}: {logits_RV.shape=}, {dtype=}, "
                    f"{statistics=}"
                )
            return kernel(*operands)
    raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}")
