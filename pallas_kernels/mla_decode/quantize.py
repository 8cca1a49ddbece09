"""Latents to e4m3, with one scale a token.

Finer scales, as FlashMLA's of 128 columns, would gain little: e4m3 keeps its three bits of
mantissa down to a 2^13th of the largest value, and a norm keeps the parts of a latent alike.
Scales are powers of two, with which bfloat16 holds every dequantised value exactly.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # beyond it e4m3 has only NaN
MANTISSA, BIAS = 23, 127  # of a float32: bits, and what its exponent is stored with
EXPONENTS = -100, 119  # of scales: they and their inverses are no subnormals


def quantize_latents(
    x: Float[Array, "*batch L"],
) -> tuple[Float[Array, "*batch L"], Float[Array, "*batch"]]:
    """e4m3 and a float32 scale a row: the lowest power of two that brings all of a row
    within 448. A row of zeros stays one.

    Rounding is to e4m3's 3 bits of mantissa: at most 2^-4 of a value, or of its row's
    largest 2^-17, whichever is more.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1) / LARGEST
    # The exponent of the power of two that is this or the next above, from its bits.
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    exponent = (bits >> MANTISSA) - BIAS + (bits & ((1 << MANTISSA) - 1) > 0)
    exponent = jnp.where(largest > 0, jnp.clip(exponent, *EXPONENTS), 0)
    inverse = _power_of_two(-exponent)
    return (x * inverse[..., None]).astype(E4M3), _power_of_two(exponent)


def _power_of_two(exponent: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    return lax.bitcast_convert_type((exponent + BIAS) << MANTISSA, jnp.float32)
