"""The face of absorbed MLA decoding: what it computes, and who computes it where.

Letters: B rows, T new tokens of each (1 to 4), N heads, L latent, R rope, Y layers, X rows
or pages of the cache, Z slots of one, P pages of a row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import named, note_choice
from pallas_kernels.mla_decode import fp8_gpu, pallas_gpu, pallas_tpu, reference
from pallas_kernels.mla_decode.quantize import E4M3, quantize_latents

__all__ = ["E4M3", "append", "mla_decode", "quantize_latents"]

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}  # by platform
IMPLEMENTATIONS = ("reference", *KERNELS.values())


def mla_decode(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
    rope_YXRZ: Float[Array, "Y X R Z"],
    lengths_B: Int[Array, " B"],
    *,
    layer: Int[Array, ""] | int,
    scale: float,
    pages_BP: Int[Array, "B P"] | None = None,
    latent_scale_YXZ: Float[Array, "Y X Z"] | None = None,
    softmax_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N L"], Float[Array, "B T N"]]:
    """Attention on cached latents (DeepSeek-V2, section 2.1.2): softmax(scale * s) c with
    s = q_L c + q_R k, and its log-sum-exp in float32.

    The cache is that of all layers, of which `layer` is read; no copy of it is made. Its
    rotary part has the slots last: as [.., Z, 64] a TPU would pad it to twice its size.
    Row b has `lengths` slots filled, the new tokens' own among them: token t of T sees
    the first lengths - T + 1 + t. With `pages`, page p of a row holds its slots from
    p * Z on, and is `pages[b, p]` of the cache; the entries behind a row's length are
    never used.

    What only run-time values show: lengths are taken to be at least 0 and at most the
    slots there are. A token that sees nothing gets zeros and a log-sum-exp of -inf.
    Pages outside the cache are the caller's mistake, clipped to its first and last.

    Latents may be float8_e4m3fn, with a float32 scale for each slot's, `latent_scale`,
    as `quantize_latents` makes them: of V3, 644 bytes a token instead of 1152. Attention
    is on latents times scales: "reference" rounds these to the dtype of queries,
    "pallas_gpu" to float16, as it does queries, so that what is larger than 65504 is
    lost; neither changes anything where scales are powers of two.

    On a mesh of Explicit axes, rows and heads may be cut, and with the rows the cache,
    unless it is paged. Results have the dtype of `q`. There is no gradient.

    `implementation`: "pallas_tpu" is for queries and cache of one dtype, bfloat16 or
    float32, a latent that 128 divides, of 512 at most, a rotary part that 16 divides, of
    128 at most, rows or pages of slots that 128 divides, 512 queries (T N) a row at most;
    "pallas_gpu" for Hopper GPUs, bfloat16, of latents also FP8, a latent of 512 and a
    rotary part of 64, rows or pages of slots that 64 divides, queries a row in equal
    tiles of 8, 16 .. or 64;
    "reference" is plain JAX. None takes the kernel of the platform compiled for where it
    can, else the reference, and says so once.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: the kernel was named and does not take this.
    """
    _check(q_BTNL, q_BTNR, latent_YXZL, rope_YXRZ, lengths_B, pages_BP)
    _check_scales(latent_YXZL, latent_scale_YXZ)
    dtype = jnp.dtype(softmax_dtype)
    softmax = "" if dtype == jnp.float32 else f"a softmax in {dtype}"
    operands = (q_BTNL, q_BTNR, latent_YXZL, rope_YXRZ)
    kernels, lacking = _kernels(*operands, pages_BP)
    run = _choose(
        "mla_decode",
        implementation,
        reference=functools.partial(reference.decode, scale=scale, dtype=dtype),
        kernels={
            platform: functools.partial(kernel.decode, scale=scale)
            for platform, kernel in kernels.items()
        },
        lacking={platform: softmax or why for platform, why in lacking.items()},
    )
    q, out = P(*_cut(q_BTNL)), P(*_cut(q_BTNL)[:3])
    cache, lengths, pages = _cut_cache(q[0], pages_BP)
    specs = (q, q, cache, cache, lengths, P(), pages, P(*cache[:3]))
    operands = (*operands, lengths_B, jnp.asarray(layer, jnp.int32), pages_BP)
    if latent_scale_YXZ is not None:
        operands = (*operands, latent_scale_YXZ)
    run = _on_each_device(run, q_BTNL, specs[: len(operands)], (q, out))
    return run(*operands)


def append(
    rope_YXRZ: Float[Array, "Y X R Z"],
    new_BTR: Float[Array, "B T R"],
    first_B: Int[Array, " B"],
    *,
    layer: Int[Array, ""] | int,
    pages_BP: Int[Array, "B P"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "Y X R Z"]:
    """The rotary cache with T tokens' entries of one layer, from slot `first` of a row on.

    Entries behind a row's last slot are dropped. In place, where the cache is donated or
    carried by a loop: on a TPU, XLA's own way to write a column has the whole cache
    turned round for it. Arguments as in `mla_decode`; paged, rows may not be cut, and the
    pages written to have to be there, each for one row: else nothing outside the cache is
    touched, but what these pages hold is not defined. The kernel, for TPUs only, takes
    128 tokens at most.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.
        NotImplementedError: the kernel was named and does not take this.
    """
    if new_BTR.ndim != 3 or new_BTR.shape[-1] != rope_YXRZ.shape[2]:
        raise ValueError(f"entries {new_BTR.shape} for a cache {rope_YXRZ.shape}")
    run = _choose(
        "mla_decode.append",
        implementation,
        reference=reference.append,
        kernels={"tpu": pallas_tpu.append},
        lacking={"tpu": pallas_tpu.lacks_append(rope_YXRZ, new_BTR)},
    )
    new = P(_cut(new_BTR)[0], None, None)
    if pages_BP is not None and new[0] is not None:
        raise ValueError(f"rows cut along {new[0]!r}, pages are not")
    cache, first, pages = _cut_cache(new[0], pages_BP)
    run = _on_each_device(run, new_BTR, (cache, new, first, P(), pages), cache)
    return run(rope_YXRZ, new_BTR, first_B, jnp.asarray(layer, jnp.int32), pages_BP)


def _kernels(q_BTNL, q_BTNR, latent_YXZL, rope_YXRZ, pages_BP) -> tuple[dict, dict]:
    """By platform: the kernel, and why it does not take these, or nothing."""
    operands = (q_BTNL, q_BTNR, latent_YXZL)
    if latent_YXZL.dtype == E4M3:
        kernels = {"tpu": pallas_tpu, "cuda": fp8_gpu}
        on_tpu = "takes no latents in float8_e4m3fn"
        return kernels, {"tpu": on_tpu, "cuda": fp8_gpu.lacks(*operands, rope_YXRZ)}
    kernels = {"tpu": pallas_tpu, "cuda": pallas_gpu}
    on_tpu = pallas_tpu.lacks(*operands, pages_BP)
    return kernels, {"tpu": on_tpu, "cuda": pallas_gpu.lacks(*operands)}


def _choose(
    operation: str,
    implementation: str | None,
    *,
    reference: Callable,
    kernels: dict[str, Callable],
    lacking: dict[str, str],
) -> Callable:
    """What runs: the one that was named, else the platform's kernel unless it lacks.

    `kernels` and `lacking` are by platform; the latter says why one is not taken.
    """
    match named(implementation):
        case "reference":
            return reference
        case None:
            note_choice(operation, {on: KERNELS[on] for on in kernels}, lacking)
            taken = {on: run for on, run in kernels.items() if not lacking[on]}
            if not taken:
                return reference
            return functools.partial(
                jax.lax.platform_dependent, **taken, default=reference
            )
        case name if name not in IMPLEMENTATIONS:
            raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}")
    (platform,) = (on for on, name in KERNELS.items() if name == implementation)
    if reason := lacking.get(platform, "there is no such kernel"):
        raise NotImplementedError(f"{operation}: {implementation}: {reason}")
    return kernels[platform]


def _cut(x: Array) -> tuple:
    """The mesh axes that cut each dimension."""
    return (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[: x.ndim]


def _cut_cache(rows, pages: Array | None) -> tuple[P, P, P | None]:
    """How the cache, numbers of rows, and pages are cut, where rows are."""
    if pages is None:
        return P(None, rows, None, None), P(rows), None
    return P(None, None, None, None), P(rows), P(rows, None)


def _on_each_device(run: Callable, x: Array, in_specs, out_specs) -> Callable:
    """`run` on each device's own rows and heads, where `x` lies on a mesh."""
    if AxisType.Explicit not in jax.typeof(x).sharding.mesh.axis_types:
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _check(q_latent, q_rope, latent, rope, lengths, pages) -> None:
    queries, caches = (q_latent, q_rope), (latent, rope)
    shapes = ", ".join(str(x.shape) for x in (*queries, *caches, lengths))
    if any(x.ndim != 4 for x in (*queries, *caches)) or lengths.ndim != 1:
        raise ValueError(f"ranks of {shapes}: not 4, 4, 4, 4, 1")
    if q_latent.shape[:3] != q_rope.shape[:3] or len(q_latent) != len(lengths):
        raise ValueError(
            f"rows, tokens or heads of queries and lengths differ: {shapes}"
        )
    layers, rows, slots, size = latent.shape
    if rope.shape != (layers, rows, q_rope.shape[-1], slots):
        raise ValueError(f"latent and rotary cache differ, or [.., slots, R]: {shapes}")
    if size != q_latent.shape[-1]:
        raise ValueError(f"latents of queries and cache differ: {shapes}")
    if q_latent.dtype != q_rope.dtype or latent.dtype not in (rope.dtype, E4M3):
        raise ValueError(
            f"dtypes differ: {[x.dtype.name for x in (*queries, *caches)]}"
        )
    if pages is None and rows != len(lengths):
        raise ValueError(f"{rows} rows of cache for {len(lengths)}, and no pages")
    if pages is not None and (pages.ndim != 2 or len(pages) != len(lengths)):
        raise ValueError(f"pages of {pages.shape} for {len(lengths)} rows")
    for name, x in {"lengths": lengths, "pages": pages}.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} of {x.dtype} are no integers")


def _check_scales(latent, scale) -> None:
    if (latent.dtype == E4M3) != (scale is not None):
        given = "none" if scale is None else f"{scale.shape}"
        raise ValueError(f"latents of {latent.dtype}, scales: {given}")
    if scale is None:
        return
    if scale.shape != latent.shape[:3] or scale.dtype != jnp.float32:
        raise ValueError(
            f"scales of {scale.shape}, {scale.dtype}, for latents of {latent.shape}: "
            f"not {latent.shape[:3]}, float32"
        )
