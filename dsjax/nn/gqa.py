"""Grouped-query attention, multi-head included (LLM, MoE and the R1 distills).

Letters: B batch, T length, S cache slots, D model, K kv heads, G query heads of one kv
head, H head size.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsjax.config import Gqa
from dsjax.nn import cache as kv
from dsjax.nn.attention import attend
from dsjax.nn.options import Build, keep
from dsjax.nn.rope import rotate
from dsjax.nn.weights import batch_axes, use


class GroupedQueryAttention(nnx.Module):
    """Rotary attention in which G query heads share one key-value head."""

    def __init__(self, config: Gqa, d_model: int, *, build: Build):
        self.config, self.precision = config, build.precision
        self.dtype, sharding = build.precision.compute, build.sharding
        D, K, H = d_model, config.num_kv_heads, config.head_dim
        G = config.num_heads // K
        self.q_KGHD = build.weight((K, G, H, D), sharding.q_KGHD)
        self.k_KHD = build.weight((K, H, D), sharding.kv_KHD)
        self.v_KHD = build.weight((K, H, D), sharding.kv_KHD)
        self.o_DKGH = build.weight((D, K, G, H), sharding.o_DKGH)
        if config.qkv_bias:
            self.q_bias_KGH = build.filled((K, G, H), 0.0, sharding.q_bias_KGH)
            self.k_bias_KH = build.filled((K, H), 0.0, sharding.kv_bias_KH)
            self.v_bias_KH = build.filled((K, H), 0.0, sharding.kv_bias_KH)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: kv.Context,
        cache: kv.KeyValueCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], kv.KeyValueCache | None]:
        """The layer's contribution to the residual stream, and the cache it wrote."""
        q, k, v = self._project(x_BTD, context)
        if cache is not None:
            cache = replace(
                cache,
                k_YBSKH=kv.write(cache.k_YBSKH, k, layer, context),
                v_YBSKH=kv.write(cache.v_YBSKH, v, layer, context),
            )
        if context.phase is kv.Phase.DECODE:
            k = kv.read(cache.k_YBSKH, layer).astype(self.dtype)
            v = kv.read(cache.v_YBSKH, layer).astype(self.dtype)
        scale, dtype = self.config.head_dim**-0.5, self.precision.softmax
        out_BTKGH = attend(q, k, v, context.sight(), scale, dtype)
        y_BTD = jnp.einsum(
            "BTKGH,DKGH->BTD",
            out_BTKGH,
            use(self.o_DKGH, self.dtype),
            out_sharding=P(batch_axes(x_BTD), None, None),
        )
        return y_BTD, cache

    def _project(self, x_BTD, context):
        q = jnp.einsum("BTD,KGHD->BTKGH", x_BTD, use(self.q_KGHD, self.dtype))
        k = jnp.einsum("BTD,KHD->BTKH", x_BTD, use(self.k_KHD, self.dtype))
        v = jnp.einsum("BTD,KHD->BTKH", x_BTD, use(self.v_KHD, self.dtype))
        if self.config.qkv_bias:
            q += use(self.q_bias_KGH, self.dtype)
            k += use(self.k_bias_KH, self.dtype)
            v += use(self.v_bias_KH, self.dtype)
        q, k, v = keep(q), keep(k), keep(v)
        rope, positions = self.config.rope, context.positions_BT
        return rotate(q, positions, rope), rotate(k, positions, rope), v
