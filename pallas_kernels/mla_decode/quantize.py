"""Latents to e4m3, with one scale a token.

Finer scales, as FlashMLA's of 128 columns, would gain little: e4m3 keeps its three bits of
mantissa down to a 2^13th of the largest value, and a norm keeps the parts of a latent alike.
Scales are powers of two, with which bfloat16 holds every dequantised value exactly.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # beyond it e4m3 has only NaN
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
    # largest / 448 = fraction * 2^exponent, with a fraction of 1/2 to 1.
    fraction, exponent = jnp.frexp(jnp.abs(x).max(-1) / LARGEST)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)
    exponent = jnp.clip(exponent, *EXPONENTS)
    scale = jnp.ldexp(jnp.float32(1), exponent)
    return jnp.ldexp(x, -exponent[..., None]).astype(E4M3), scale
