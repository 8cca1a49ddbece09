"""The SwiGLU feed-forward: silu(gate x) * up x, projected down."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dsjax.nn.options import Build, keep
from dsjax.nn.weights import batch_axes, facing, use


class SwiGlu(nnx.Module):
    """A dense feed-forward of `width` F; also the shared experts, fused into one."""

    def __init__(self, d_model: int, width: int, *, build: Build):
        self.dtype, sharding = build.precision.compute, build.sharding
        self.gate_FD = build.weight((width, d_model), sharding.in_FD)
        self.up_FD = build.weight((width, d_model), sharding.in_FD)
        self.down_DF = build.weight((d_model, width), sharding.out_DF)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Same shape and dtype as `x`."""
        rows = P(batch_axes(x_BTD), None, None)
        gate_FD, up_FD = use(self.gate_FD, self.dtype), use(self.up_FD, self.dtype)
        x_BTD = facing(x_BTD, gate_FD)
        gate_BTF = keep(jnp.einsum("BTD,FD->BTF", x_BTD, gate_FD))
        up_BTF = keep(jnp.einsum("BTD,FD->BTF", x_BTD, up_FD))
        return jnp.einsum(
            "BTF,DF->BTD",
            jax.nn.silu(gate_BTF) * up_BTF,
            use(self.down_DF, self.dtype),
            out_sharding=rows,
        )
