"""What attention remembers: the key-value cache, and what a layer knows of the batch.

Letters: B batch, T new tokens, S cache slots, K kv heads, H head size, L latent, R rope.
A segment's caches are stacked over its layers in front (Y); a layer writes its slice in
place, so that one buffer lives through a whole decode loop.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import Gqa, Mla, ModelConfig
from dsjax.errors import UserError
from dsjax.nn.attention import Sight
from dsjax.nn.dropping import Dropping
from dsjax.nn.weights import batch_axes
from dsjax.sharding import BATCH, fit
from pallas_kernels.mla_decode.api import E4M3, append, quantize_latents


class Phase(enum.Enum):
    """Which keys a layer's queries see, and what becomes of the new keys."""

    FULL = "full"  # the tokens at hand; nothing is kept
    PREFILL = "prefill"  # the tokens at hand, kept from slot 0 on
    DECODE = "decode"  # everything kept, the new tokens included


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """What every layer knows of the tokens at hand, besides their activations.

    Positions turn queries and keys; while decoding they are also the cache slots.
    Tokens see only their own segment (document); None is one segment a row. With
    `dropping`, experts leave out rows of sequences that are not protected.
    """

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"] | None = None
    protected_B: Bool[Array, " B"] | None = None
    phase: Phase = field(metadata={"static": True}, default=Phase.FULL)
    dropping: Dropping | None = field(metadata={"static": True}, default=None)

    def sight(self) -> Sight:
        """Each token sees itself and earlier ones of its segment: of those at hand, or,
        while decoding, of the cache's slots.
        """
        if self.phase is Phase.DECODE:
            return Sight(last_BT=self.positions_BT)
        return Sight(
            last_BT=jnp.arange(self.positions_BT.shape[1])[None],
            segments_BT=self.segments_BT,
            segments_BS=self.segments_BT,
            causal=True,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """MLA's cache: the normed latent and the rotated shared key, nothing per head.

    Two arrays, since one of 512 + 64 channels would be padded to 640 on a TPU; the 64
    are not last, since they would be padded to 128. Latents in float8_e4m3fn have a scale
    a token; the rotary part, whose size is not bounded by a norm, stays wider.
    """

    latent_YBSL: Float[Array, "Y B S L"]
    rope_YBRS: Float[Array, "Y B R S"]
    scale_YBS: Float[Array, "Y B S"] | None = None

    def written(
        self,
        latent_BTL: Float[Array, "B T L"],
        rope_BTR: Float[Array, "B T R"],
        layer: Int[Array, ""] | int,
        context: Context,
    ) -> "LatentCache":
        """With the new tokens' entries of one layer, at their slots; see `write`."""
        if context.phase is Phase.PREFILL:
            rope = _write_first(self.rope_YBRS, rope_BTR.swapaxes(1, 2), layer)
        else:
            first_B = context.positions_BT[:, 0]
            rope = append(self.rope_YBRS, rope_BTR, first_B, layer=layer)
        scale = self.scale_YBS
        if scale is not None:
            latent_BTL, scale_BT = quantize_latents(latent_BTL)
            scale = write(scale, scale_BT, layer, context)
        latent = write(self.latent_YBSL, latent_BTL, layer, context)
        return LatentCache(latent_YBSL=latent, rope_YBRS=rope, scale_YBS=scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KeyValueCache:
    """The cache of grouped-query attention, keys already rotated."""

    k_YBSKH: Float[Array, "Y B S K H"]
    v_YBSKH: Float[Array, "Y B S K H"]


LayerCache = LatentCache | KeyValueCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """One stacked cache a segment, and how many slots each row has filled."""

    segments: tuple[LayerCache, ...]
    lengths_B: Int[Array, " B"]

    @property
    def slots(self) -> int:
        """Tokens that fit into a row."""
        return jax.tree.leaves(self.segments)[0].shape[2]


def empty_cache(
    config: ModelConfig, *, batch: int, slots: int, dtype: DTypeLike, mesh: Mesh
) -> Cache:
    """An empty cache on the mesh: rows cut like the batch, kv heads along `tensor`.

    In float8_e4m3fn are MLA's latents alone; the rotary part then is bfloat16. Raises
    UserError for a model without latents.
    """
    dtype = jnp.dtype(dtype)

    def zeros(shape: tuple[int, ...], spec: P, dtype=dtype) -> Array:
        placed = NamedSharding(mesh, fit(spec, shape, mesh))
        return jnp.zeros(shape, dtype, out_sharding=placed)

    def of_segment(layers: int) -> LayerCache:
        rows = (layers, batch, slots)
        match config.attention:
            case Mla(kv_rank=latent, rope_dim=rope):
                spec, fp8 = P(None, BATCH, None, None), dtype == E4M3
                wide = jnp.bfloat16 if fp8 else dtype
                return LatentCache(
                    latent_YBSL=zeros((*rows, latent), spec),
                    rope_YBRS=zeros((layers, batch, rope, slots), spec, wide),
                    scale_YBS=zeros(rows, P(*spec[:3]), jnp.float32) if fp8 else None,
                )
            case Gqa(num_kv_heads=heads, head_dim=size):
                if dtype == E4M3:
                    raise UserError(f"{config.name} has no latents to keep in {dtype}")
                spec = P(None, BATCH, None, "tensor", None)
                shape = (*rows, heads, size)
                return KeyValueCache(
                    k_YBSKH=zeros(shape, spec), v_YBSKH=zeros(shape, spec)
                )

    return Cache(
        segments=tuple(of_segment(segment.count) for segment in config.segments),
        lengths_B=zeros((batch,), P(BATCH), jnp.int32),
    )


def write(
    cache: Float[Array, "Y B S ..."],
    new: Float[Array, "B T ..."],
    layer: Int[Array, ""],
    context: Context,
) -> Float[Array, "Y B S ..."]:
    """`cache` with the new tokens' entries of one layer, at their slots.

    Slots past the end are dropped. Runs on each device's rows alone, so that no
    collective and no copy can come of it.
    """

    if context.phase is Phase.PREFILL:
        return _write_first(cache, new, layer)

    def local(cache, new, layer, slots_BT):
        rows = jnp.arange(new.shape[0])[:, None]
        new = new.astype(cache.dtype)
        return cache.at[layer, rows, slots_BT].set(new, mode="drop")

    positions = context.positions_BT
    return _on_own_rows(local, cache, new, layer, positions)


def _write_first(cache: Array, new: Array, layer: Int[Array, ""] | int) -> Array:
    """`cache` with `new` in each row of a layer, from slot 0 on."""

    def local(cache, new, layer):
        start = (layer,) + (0,) * (cache.ndim - 1)
        return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), start)

    return _on_own_rows(local, cache, new, layer)


def _on_own_rows(local: Callable, cache: Array, new: Array, layer, *of_rows) -> Array:
    """`local` on each device's rows alone."""
    specs = [jax.typeof(x).sharding.spec for x in (cache, new)]
    rows = [P(batch_axes(x), *[None] * (x.ndim - 1)) for x in of_rows]
    return jax.shard_map(local, in_specs=(*specs, P(), *rows), out_specs=specs[0])(
        cache, new, layer, *of_rows
    )


def read(cache: Float[Array, "Y ..."], layer: Int[Array, ""]) -> Float[Array, "..."]:
    """One layer of a stacked cache."""
    return jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
