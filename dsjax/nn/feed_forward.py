"""The SwiGLU feed-forward: silu(gate x) * up x, projected down."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsjax.nn.weights import batch_axes, use, weight
from dsjax.sharding import Sharding


class SwiGlu(nnx.Module):
    """A dense feed-forward of `width` F; also the shared experts, fused into one."""

    def __init__(
        self,
        d_model: int,
        width: int,
        *,
        std: float,
        sharding: Sharding,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        make = {"std": std, "dtype": param_dtype}
        self.gate_FD = weight(rngs, (width, d_model), spec=sharding.in_FD, **make)
        self.up_FD = weight(rngs, (width, d_model), spec=sharding.in_FD, **make)
        self.down_DF = weight(rngs, (d_model, width), spec=sharding.out_DF, **make)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Same shape and dtype as `x`."""
        gate_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, use(self.gate_FD, self.dtype))
        up_BTF = jnp.einsum("BTD,FD->BTF", x_BTD, use(self.up_FD, self.dtype))
        return jnp.einsum(
            "BTF,DF->BTD",
            jax.nn.silu(gate_BTF) * up_BTF,
            use(self.down_DF, self.dtype),
            out_sharding=P(batch_axes(x_BTD), None, None),
        )
