"""One layer: attention and feed-forward, each normed before and added after."""

from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import Dense, Gqa, Mla, ModelConfig, Moe
from dsjax.nn import cache as kv
from dsjax.nn.feed_forward import SwiGlu
from dsjax.nn.gqa import GroupedQueryAttention
from dsjax.nn.mla import MultiHeadLatentAttention
from dsjax.nn.moe import MixtureOfExperts
from dsjax.nn.norm import RmsNorm
from dsjax.nn.options import Build, keep
from dsjax.nn.router import Routing


class Block(nnx.Module):
    """A pre-norm decoder layer with the feed-forward of its segment."""

    def __init__(self, config: ModelConfig, feed_forward: Dense | Moe, *, build: Build):
        D = config.d_model
        self.attention_norm = RmsNorm(D, eps=config.norm_eps, build=build)
        match config.attention:
            case Gqa() as gqa:
                self.attention = GroupedQueryAttention(gqa, D, build=build)
            case Mla() as mla:
                self.attention = MultiHeadLatentAttention(mla, D, build=build)
        self.feed_forward_norm = RmsNorm(D, eps=config.norm_eps, build=build)
        match feed_forward:
            case Dense(width=width):
                self.feed_forward = SwiGlu(D, width, build=build)
            case Moe() as moe:
                self.feed_forward = MixtureOfExperts(moe, D, build=build)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: kv.Context,
        cache: kv.LayerCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], kv.LayerCache | None, Routing | None]:
        """The residual stream after this layer, the cache, and a MoE's routing."""
        normed_BTD = self.attention_norm(x_BTD)
        y_BTD, cache = self.attention(normed_BTD, context, cache, layer)
        x_BTD = keep(x_BTD + y_BTD)
        normed_BTD, routing = self.feed_forward_norm(x_BTD), None
        if isinstance(self.feed_forward, MixtureOfExperts):
            y_BTD, routing = self.feed_forward(normed_BTD, context, layer)
        else:
            y_BTD = self.feed_forward(normed_BTD)
        return x_BTD + y_BTD, cache, routing
