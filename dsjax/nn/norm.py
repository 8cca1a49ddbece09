"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.nn.options import Build
from dsjax.nn.weights import use


class RmsNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; the mean in the dtype of statistics."""

    def __init__(self, size: int, *, build: Build, eps: float = 1e-6):
        self.eps, self.dtype = eps, build.precision.statistics
        self.scale = build.filled((size,), 1.0, build.sharding.norm)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Same shape and dtype as `x`."""
        wide = x.astype(self.dtype)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * use(self.scale, self.dtype)).astype(x.dtype)
