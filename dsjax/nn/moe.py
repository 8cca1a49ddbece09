"""The mixture of experts: shared experts for all tokens, routed ones for some.

Letters: B batch, T length, D model.
"""

from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import Moe
from dsjax.nn import cache as kv
from dsjax.nn.experts import Experts
from dsjax.nn.feed_forward import SwiGlu
from dsjax.nn.options import Build
from dsjax.nn.router import Router, Routing


class MixtureOfExperts(nnx.Module):
    """h = sum of shared experts + sum of the chosen routed ones (2401.06066, eq. 9)."""

    def __init__(self, config: Moe, d_model: int, *, build: Build):
        self.config = config
        self.router = Router(config, d_model, build=build)
        self.experts = Experts(config, d_model, build=build)
        if config.num_shared:
            self.shared = SwiGlu(d_model, config.num_shared * config.width, build=build)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: kv.Context,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The layer's contribution to the residual stream, and where tokens went."""
        routing = self.router(x_BTD, context)
        shared = self.shared if self.config.num_shared else None
        return self.experts(x_BTD, routing, context.phase, shared, layer), routing
