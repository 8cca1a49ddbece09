"""Multi-token prediction: V3's extra module for the token after the next (V3, 2.2)."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dsjax.config import ModelConfig
from dsjax.nn import cache as kv
from dsjax.nn.block import Block
from dsjax.nn.norm import RmsNorm
from dsjax.nn.options import Build, Remat, keep
from dsjax.nn.router import Routing
from dsjax.nn.weights import batch_axes, use


class MultiTokenPrediction(nnx.Module):
    """Merges a token's hidden state with the next token's embedding, then one layer.

    The embedding and the head are the main model's. In the checkpoints the merged
    vector is [embedding, hidden], the reverse of the paper's equation 21.
    """

    def __init__(self, config: ModelConfig, *, build: Build, remat: Remat):
        self.dtype, self.remat = build.precision.compute, remat
        D, norm = config.d_model, {"eps": config.norm_eps, "build": build}
        self.embedding_norm = RmsNorm(D, **norm)
        self.hidden_norm = RmsNorm(D, **norm)
        self.merge_DM = build.weight((D, 2 * D), build.sharding.mtp_DM)
        feed_forward = config.segments[-1].feed_forward
        self.block = Block(config, feed_forward, build=build)
        self.final_norm = RmsNorm(D, **norm)

    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        next_BTD: Float[Array, "B T D"],
        context: kv.Context,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """What the head turns into logits of the token two ahead, and the routing.

        `hidden` is the main model's state after its final norm: the paper leaves open
        whether before or after, the engines that draft with the published weights feed
        it after. `next` is the embedding of each position's next token.
        """
        graph, weights = nnx.split(self)

        def layer(weights, hidden_BTD, next_BTD):
            return nnx.merge(graph, weights)._layer(hidden_BTD, next_BTD, context)

        return self.remat.wrap(layer)(weights, hidden_BTD, next_BTD)

    def _layer(
        self, hidden_BTD: Array, next_BTD: Array, context: kv.Context
    ) -> tuple[Array, Routing | None]:
        parts = [self.embedding_norm(next_BTD), self.hidden_norm(hidden_BTD)]
        x_BTD = jnp.einsum(
            "BTM,DM->BTD",
            jnp.concatenate(parts, axis=-1),
            use(self.merge_DM, self.dtype),
            out_sharding=P(batch_axes(hidden_BTD), None, None),
        )
        x_BTD, _, routing = self.block(keep(x_BTD), context)
        return self.final_norm(keep(x_BTD)), routing
