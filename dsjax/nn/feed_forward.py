"""The SwiGLU feed-forward: silu(gate x) * up x, projected down."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dsjax.nn.groups import groups, in_groups
from dsjax.nn.options import Build, keep
from dsjax.nn.weights import batch_axes, facing, use

HIDDEN_BYTES = 2**31  # of a feed-forward's three hidden arrays on a device at once


class SwiGlu(nnx.Module):
    """A dense feed-forward of `width` F; also the shared experts, fused into one."""

    def __init__(self, d_model: int, width: int, *, build: Build):
        self.dtype, sharding = build.precision.compute, build.sharding
        self.gate_FD = build.weight((width, d_model), sharding.in_FD)
        self.up_FD = build.weight((width, d_model), sharding.in_FD)
        self.down_DF = build.weight((d_model, width), sharding.out_DF)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Same shape and dtype as `x`."""
        weights = self.weights()

        def feed_forward(x_BTD):
            rows = P(batch_axes(x_BTD), None, None)
            return swiglu(facing(x_BTD, weights[0]), *weights, out_sharding=rows)

        token_bytes = 3 * weights[0].shape[0] * x_BTD.dtype.itemsize
        number = groups(x_BTD, token_bytes, at_once=HIDDEN_BYTES)
        return in_groups(feed_forward, number, x_BTD)

    def weights(self) -> tuple[Array, Array, Array]:
        """Gate, up [F, D] and down [D, F], as they are used."""
        gate_FD, up_FD = use(self.gate_FD, self.dtype), use(self.up_FD, self.dtype)
        return gate_FD, up_FD, use(self.down_DF, self.dtype)


def swiglu(
    x: Float[Array, "... D"],
    gate_FD: Float[Array, "F D"],
    up_FD: Float[Array, "F D"],
    down_DF: Float[Array, "D F"],
    *,
    out_sharding: P | None = None,
) -> Float[Array, "... D"]:
    """down(silu(gate x) * up x), in the dtype of `x`."""
    gate = keep(jnp.einsum("...D,FD->...F", x, gate_FD))
    up = keep(jnp.einsum("...D,FD->...F", x, up_FD))
    hidden = jax.nn.silu(gate) * up
    return jnp.einsum("...F,DF->...D", hidden, down_DF, out_sharding=out_sharding)
