"""Multi-head latent attention (DeepSeek-V2, section 2.1), plain and absorbed.

Letters: B batch, T length, S cache slots, D model, N heads, H the head part at hand, U
value size, Q query latent, L latent, R rotary part, C latent + rotary part.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, Int

from dsjax.config import Mla, Yarn
from dsjax.nn import cache as kv
from dsjax.nn.attention import attend
from dsjax.nn.groups import groups, in_groups
from dsjax.nn.norm import RmsNorm
from dsjax.nn.options import Build, keep
from dsjax.nn.rope import rotate, rotate_end
from dsjax.nn.weights import batch_axes, facing, spec_of, use, whole
from dsjax.sharding import axes_of
from pallas_kernels.mla_decode.api import mla_decode

EXPANDED_BYTES = 2**29  # of all heads' keys and values that exist on a device at once


class MultiHeadLatentAttention(nnx.Module):
    """Keys and values of all heads come from one latent vector a token.

    `expanded` builds them (training, prefill); `absorbed` never does: the up-projections
    move to the query and the output, and attention runs on the cached latents (decode).
    """

    def __init__(self, config: Mla, d_model: int, *, build: Build):
        self.config, self.precision = config, build.precision
        self.dtype, sharding = build.precision.compute, build.sharding
        D, N, L, Q = d_model, config.num_heads, config.kv_rank, config.q_rank
        if Q is None:
            self.q_NHD = build.weight((N, config.query_dim, D), sharding.q_NHD)
        else:
            self.q_down_QD = build.weight((Q, D), sharding.q_down_QD)
            self.q_norm = RmsNorm(Q, build=build)
            self.q_up_NHQ = build.weight((N, config.query_dim, Q), sharding.q_up_NHQ)
        self.kv_down_CD = build.weight((L + config.rope_dim, D), sharding.kv_down_CD)
        self.kv_norm = RmsNorm(L, build=build)
        shape = (N, config.nope_dim + config.value_dim, L)
        self.kv_up_NHL = build.weight(shape, sharding.kv_up_NHL)
        self.o_DNH = build.weight((D, N, config.value_dim), sharding.o_DNH)

    @property
    def scale(self) -> float:
        """1 / sqrt(query size), times YaRN's mscale squared; the same when absorbed."""
        scaling = self.config.rope.scaling
        mscale = scaling.softmax_scale if isinstance(scaling, Yarn) else 1.0
        return self.config.query_dim**-0.5 * mscale

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: kv.Context,
        cache: kv.LatentCache | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], kv.LatentCache | None]:
        """The layer's contribution to the residual stream, and the cache it wrote."""
        rows = P(batch_axes(x_BTD), None, None)
        q_BTQ = self.query_latents(x_BTD)
        c_BTL, k_BTR = self.latents(x_BTD, context)
        if cache is not None:
            cache = cache.written(c_BTL, k_BTR, layer, context)
        if context.phase is kv.Phase.DECODE:
            out_BTNH = self.absorbed(self.queries(q_BTQ), cache, layer, context)
        else:
            out_BTNH = self._expanded_in_groups(q_BTQ, c_BTL, k_BTR, context)
        y_BTD = jnp.einsum(
            "BTNH,DNH->BTD", out_BTNH, use(self.o_DNH, self.dtype), out_sharding=rows
        )
        return y_BTD, cache

    def query_latents(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T Q"]:
        """What the queries are made of: their latent, before its norm, or `x` itself."""
        if self.config.q_rank is None:
            return x_BTD
        down_QD = use(self.q_down_QD, self.dtype)
        return whole(keep(jnp.einsum("BTD,QD->BTQ", facing(x_BTD, down_QD), down_QD)))

    def queries(self, q_BTQ: Float[Array, "B T Q"]) -> Float[Array, "B T N H"]:
        """Each head's query: the part without position, then the part to be rotated. Cut
        as the heads are.
        """
        if self.config.q_rank is None:
            q_NHD = use(self.q_NHD, self.dtype)
            return keep(jnp.einsum("BTD,NHD->BTNH", facing(q_BTQ, q_NHD), q_NHD))
        up_NHQ = use(self.q_up_NHQ, self.dtype)
        return jnp.einsum("BTQ,NHQ->BTNH", self.q_norm(q_BTQ), up_NHQ)

    def latents(
        self, x_BTD: Float[Array, "B T D"], context: kv.Context
    ) -> tuple[Float[Array, "B T L"], Float[Array, "B T R"]]:
        """What is cached: the normed latent and the rotated key all heads share."""
        down_CD = use(self.kv_down_CD, self.dtype)
        c_BTC = jnp.einsum("BTD,CD->BTC", facing(x_BTD, down_CD), down_CD)
        c_BTC = keep(reshard(c_BTC, P(batch_axes(x_BTD), None, None)))
        latent, rope = jnp.split(c_BTC, [self.config.kv_rank], axis=-1)
        positions = context.positions_BT
        return self.kv_norm(latent), rotate(rope, positions, self.config.rope)

    def _expanded_in_groups(
        self, q_BTQ: Array, c_BTL: Array, k_BTR: Array, context: kv.Context
    ) -> Float[Array, "B T N U"]:
        """`expanded`, with the keys and values of some rows at a time: all of a long
        batch, for all heads, would be many times its latents.
        """

        def attention(q_BTQ, c_BTL, k_BTR, positions_BT, segments_BT):
            own = replace(context, positions_BT=positions_BT, segments_BT=segments_BT)
            return self.expanded(self.queries(q_BTQ), c_BTL, k_BTR, own)

        size = self.config.nope_dim + self.config.value_dim
        token_bytes = self.config.num_heads * size * c_BTL.dtype.itemsize
        return in_groups(
            attention,
            groups(c_BTL, token_bytes, at_once=EXPANDED_BYTES),
            *(q_BTQ, c_BTL, k_BTR, context.positions_BT, context.segments_BT),
        )

    def expanded(
        self,
        q_BTNH: Float[Array, "B T N H"],
        c_BSL: Float[Array, "B S L"],
        k_BSR: Float[Array, "B S R"],
        context: kv.Context,
    ) -> Float[Array, "B T N U"]:
        """Attention on every head's own keys and values, built from the latents."""
        up_NHL = use(self.kv_up_NHL, self.dtype)
        rows = P(batch_axes(q_BTNH))
        c_BSL, k_BSR = reshard(c_BSL, rows), reshard(k_BSR, rows)
        positions_BT = reshard(context.positions_BT, rows)
        q_BTNH = rotate_end(q_BTNH, positions_BT, self.config.rope, k_BSR.shape[-1])
        k_up_NHL, v_up_NUL = jnp.split(up_NHL, [self.config.nope_dim], axis=1)
        k_BSNH = jnp.einsum("BSL,NHL->BSNH", c_BSL, k_up_NHL)
        v_BSNU = jnp.einsum("BSL,NUL->BSNU", c_BSL, v_up_NUL)
        k_BSNR = jnp.broadcast_to(
            k_BSR[:, :, None],
            (*k_BSNH.shape[:3], k_BSR.shape[-1]),
            out_sharding=jax.typeof(k_BSNH).sharding,
        )
        k = jnp.concatenate([k_BSNH, k_BSNR], axis=-1)
        dtype, sight = self.precision.softmax, context.sight()
        q_BTN1H = q_BTNH[:, :, :, None]
        return attend(q_BTN1H, k, v_BSNU, sight, self.scale, dtype)[:, :, :, 0]

    def absorbed(
        self,
        q_BTNH: Float[Array, "B T N H"],
        cache: kv.LatentCache,
        layer: Int[Array, ""] | int,
        context: kv.Context,
    ) -> Float[Array, "B T N U"]:
        """The same attention on the latents themselves: nothing per head and slot.

        Projections are done where the heads are, attention where the rows' caches are.
        """
        up_NHL = use(self.kv_up_NHL, self.dtype)
        k_up_NHL, v_up_NHL = jnp.split(up_NHL, [self.config.nope_dim], axis=1)
        q_BTNH, q_BTNR = jnp.split(q_BTNH, [self.config.nope_dim], axis=-1)
        q_BTNL = jnp.einsum("BTNH,NHL->BTNL", q_BTNH, k_up_NHL)
        heads, rows = spec_of(q_BTNL), _rows(q_BTNL, batch_axes(context.positions_BT))
        q_BTNL, q_BTNR = reshard(q_BTNL, rows), reshard(q_BTNR, rows)
        mix_BTNL, _ = mla_decode(
            q_BTNL,
            rotate(q_BTNR, context.positions_BT, self.config.rope),
            cache.latent_YBSL,
            cache.rope_YBRS,
            context.positions_BT[:, -1] + 1,
            layer=layer,
            scale=self.scale,
            latent_scale_YXZ=cache.scale_YBS,
            softmax_dtype=self.precision.softmax,
        )
        return jnp.einsum("BTNL,NHL->BTNH", reshard(mix_BTNL, heads), v_up_NHL)


def _rows(x_BTNL: Array, batch: str | tuple[str, ...] | None) -> P:
    """The layout of heads' vectors whose rows are where `batch` cuts them."""
    heads = [a for a in axes_of(spec_of(x_BTNL)[2]) if a not in axes_of(batch)]
    return P(batch, None, tuple(heads) or None, None)
