"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsjax.nn.weights import filled, use
from dsjax.sharding import Sharding


class RmsNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; statistics in float32."""

    def __init__(
        self,
        size: int,
        *,
        sharding: Sharding,
        param_dtype: DTypeLike,
        eps: float = 1e-6,
    ):
        self.eps = eps
        self.scale = filled((size,), 1.0, spec=sharding.norm, dtype=param_dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Same shape and dtype as `x`."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * use(self.scale, jnp.float32)).astype(x.dtype)
