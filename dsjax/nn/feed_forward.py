"""The SwiGLU feed-forward: silu(gate x) * up x, projected down."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dsjax.nn.options import Build, keep
from dsjax.nn.weights import batch_axes, use


class SwiGlu(nnx.Module):
    """A dense feed-forward of `width` F; also the shared experts, fused into one."""

    def __init__(self, d_model: int, width: int, *, build: Build):
        self.dtype, sharding = build.precision.compute, build.sharding
        self.gate_FD = build.weight((width, d_model), sharding.in_FD)
        self.up_FD = build.weight((width, d_model), sharding.in_FD)
        self.down_DF = build.weight((d_model, width), sharding.out_DF)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Same shape and dtype as `x`."""
        gate_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, use(self.gate_FD, self.dtype))
        up_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, use(self.up_FD, self.dtype))
        gate_BTF, up_BTF = keep(gate_BTF), keep(up_BTF)
        return jnp.einsum(
            "BTF,DF->BTD",
            jax.nn.silu(gate_BTF) * up_BTF,
            use(self.down_DF, self.dtype),
            out_sharding=P(batch_axes(x_BTD), None, None),
        )
