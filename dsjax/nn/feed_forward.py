"""The SwiGLU feed-forward: silu(gate x) * up x, projected down."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dsjax.nn.groups import groups, in_groups
from dsjax.nn.options import Build, keep
from dsjax.nn.weights import batch_axes, facing, spec_of, use
from dsjax.sharding import is_cut, platform
from pallas_kernels.grouped_matmul.api import feed_forward as dense_feed_forward

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
        rested = self.gate_FD[...], self.down_DF[...]
        # Weights that rest whole have gradients that are summed whole.
        here = platform() == "gpu" and not any(is_cut(spec_of(w)) for w in rested)
        few = not self.gate_FD.get_metadata("looped")  # layers, and memory for results

        def feed_forward(x_BTD):
            rows = P(batch_axes(x_BTD), None, None)
            if here:
                return _of_own_rows(x_BTD, *weights, keep_result=few)
            return swiglu(facing(x_BTD, weights[0]), *weights, out_sharding=rows)

        token_bytes = 3 * weights[0].shape[0] * x_BTD.dtype.itemsize
        number = groups(x_BTD, token_bytes, at_once=HIDDEN_BYTES)
        return in_groups(feed_forward, number, x_BTD)

    def weights(self) -> tuple[Array, Array, Array]:
        """Gate, up [F, D] and down [D, F], as they are used."""
        gate_FD, up_FD = use(self.gate_FD, self.dtype), use(self.up_FD, self.dtype)
        return gate_FD, up_FD, use(self.down_DF, self.dtype)


def _of_own_rows(
    x_BTD: Float[Array, "B T D"], *weights: Array, keep_result: bool
) -> Float[Array, "B T D"]:
    """Each device's own rows, by what is quickest for weights that are whole there."""

    def local(x_BTD, *weights):
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_MD = dense_feed_forward(x_MD, *weights, keep_result=keep_result)
        return y_MD.reshape(x_BTD.shape)

    rows, *specs = map(spec_of, (x_BTD, *weights))
    return jax.shard_map(
        local, in_specs=(rows, *specs), out_specs=rows, check_vma=False
    )(x_BTD, *weights)


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
