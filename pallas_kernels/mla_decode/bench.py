"""Decoding on cached latents at V3's shapes; run by `python -m pallas_kernels.bench`.

Letters: B rows, T new tokens, N heads, S slots of a row, P pages of a row, Z slots of one;
L latent, R rope, E both.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.measure import Case
from pallas_kernels.mla_decode import mla_decode, quantize_latents
from pallas_kernels.mla_decode import reference as plain

L, R = 512, 64
SCALE = 0.1352  # V3's, YaRN's factor included


def _case(
    name: str,
    lengths: Sequence[int],
    T: int,
    N: int,
    *,
    target: str = "",
    page: int = 0,
) -> Case:
    """One layer's cache, in rows as long as the longest or in pages of `page` slots.

    XLA multiplies with a cache of 576 values a slot, which is there when the clock
    starts; `lengths` that differ are compared with as many slots evenly split.
    """
    B, total = len(lengths), sum(lengths)
    S = -(-max(lengths) // 64) * 64
    even = min(lengths) == S

    def inputs(key):
        keys = jax.random.split(key, 5)
        X, Z = (B * S // page, page) if page else (B, S)
        sizes = (B, T, N, L), (B, T, N, R), (1, X, Z, L), (1, X, R, Z)
        *queries, latent, rope = (
            jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes)
        )
        pages_BP = kv_BSE = None
        if page:
            pages_BP = jax.random.permutation(keys[4], X).reshape(B, -1)
        elif even:
            kv_BSE = jnp.concatenate([latent[0], rope[0].swapaxes(1, 2)], axis=-1)
        return *queries, latent, rope, jnp.asarray(lengths, jnp.int32), pages_BP, kv_BSE

    def ours(q_BTNL, q_BTNR, latent, rope, lengths_B, pages_BP, _):
        return mla_decode(
            *(q_BTNL, q_BTNR, latent, rope, lengths_B),
            layer=0,
            scale=SCALE,
            pages_BP=pages_BP,
        )

    def evenly(q_BTNL, q_BTNR, latent, rope, lengths_B, pages_BP, _):
        lengths_B = jnp.full_like(lengths_B, total // B)
        return ours(q_BTNL, q_BTNR, latent, rope, lengths_B, pages_BP, None)

    others = {"xla": _einsum} if even and not page else {}
    queries = B * T * N
    return Case(
        operation="mla_decode",
        name=name,
        inputs=inputs,
        contestants={"pallas": ours} | (others if even else {"evenly": evenly}),
        exact=_row_by_row,
        flops=2 * total * T * N * (L + R + L),
        bytes=2 * (total * (L + R) + queries * (L + R + L)) + 4 * queries,
        target=target,
    )


def _fp8_case(name: str, B: int, S: int, N: int, *, target: str) -> Case:
    """Latents in FP8, beside the same values in a cache of bfloat16, which holds them
    exactly.
    """

    def inputs(key):
        keys = jax.random.split(key, 4)
        sizes = (B, 1, N, L), (B, 1, N, R), (1, B, S, L), (1, B, R, S)
        *queries, latent, rope = (
            jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes)
        )
        # Without the barrier XLA would leave out the rounding to e4m3 and back.
        codes, scale = jax.lax.optimization_barrier(quantize_latents(latent))
        wide = (codes.astype(jnp.float32) * scale[..., None]).astype(jnp.bfloat16)
        return *queries, codes, rope, jnp.full((B,), S, jnp.int32), scale, wide

    def narrow(q_BTNL, q_BTNR, codes, rope, lengths_B, scale, _):
        return mla_decode(
            *(q_BTNL, q_BTNR, codes, rope, lengths_B),
            layer=0,
            scale=SCALE,
            latent_scale_YXZ=scale,
        )

    def bfloat16(q_BTNL, q_BTNR, _, rope, lengths_B, __, wide):
        operands = (q_BTNL, q_BTNR, wide, rope, lengths_B)
        return mla_decode(*operands, layer=0, scale=SCALE)

    def exact(q_BTNL, q_BTNR, _, rope, lengths_B, __, wide):
        return _row_by_row(q_BTNL, q_BTNR, wide, rope, lengths_B, None, None)

    return Case(
        operation="mla_decode",
        name=name,
        inputs=inputs,
        contestants={"pallas": narrow, "bfloat16": bfloat16},
        exact=exact,
        flops=2 * B * S * N * (L + R + L),
        bytes=B * S * (L + 4 + 2 * R) + 2 * B * N * (L + R + L) + 4 * B * N,
        target=target,
    )


def _einsum(q_BTNL, q_BTNR, latent, rope, lengths_B, pages_BP, kv_BSE):
    """Of full rows; what several new tokens do not see of each other is left in."""
    q_BTNE = jnp.concatenate([q_BTNL, q_BTNR], axis=-1)
    scores_BTNS = jnp.einsum(
        "BTNE,BSE->BTNS", q_BTNE, kv_BSE, preferred_element_type=jnp.float32
    )
    weights_BTNS = jax.nn.softmax(SCALE * scores_BTNS, axis=-1).astype(kv_BSE.dtype)
    return jnp.einsum("BTNS,BSL->BTNL", weights_BTNS, kv_BSE[..., :L])


def _row_by_row(q_BTNL, q_BTNR, latent, rope, lengths_B, pages_BP, _):
    """The reference in float32; scores of all rows at once would be gigabytes."""

    def one(row):
        q_TNL, q_TNR, length, places_P = row
        caches = (x[:, places_P] for x in (latent, rope))
        wide = (x.astype(jnp.float32) for x in (q_TNL[None], q_TNR[None], *caches))
        pages = jnp.arange(len(places_P))[None]
        with jax.default_matmul_precision("highest"):
            out, _ = plain.decode(*wide, length[None], 0, pages, scale=SCALE)
        return out[0]

    if pages_BP is None:
        pages_BP = jnp.arange(len(lengths_B))[:, None]
    return jax.lax.map(one, (q_BTNL, q_BTNR, lengths_B, pages_BP))


_MIXED = np.random.default_rng(0).integers(256, 8193, 128).tolist()

CASES = [
    _case("128 rows of 4096, 128 heads", [4096] * 128, 1, 128, target=">= 2.1x xla"),
    _case("128 rows of 8192, 128 heads", [8192] * 128, 1, 128, target=">= 2.1x xla"),
    _case(
        "128 rows of 4096, 128 heads, 2 tokens",
        [4096] * 128,
        2,
        128,
        target=">= 1.75x xla",
    ),
    _case("32 rows of 8192, 128 heads", [8192] * 32, 1, 128, target=">= 2.15x xla"),
    _case("1 row of 65536, 128 heads", [65536], 1, 128, target=">= 2.1x xla"),
    _case(
        "128 rows of 4096, 16 heads",
        [4096] * 128,
        1,
        16,
        target=">= 70% of the read bandwidth",
    ),
    _case(
        "128 rows of 256 to 8192, 128 heads",
        _MIXED,
        1,
        128,
        target="evenly >= 0.87x",
    ),
    _case("128 rows of 4096, pages of 64", [4096] * 128, 1, 128, page=64),
    _fp8_case(
        "128 rows of 4096, 16 heads, FP8 latents",
        128,
        4096,
        16,
        target=">= 1.3x bfloat16",
    ),
    _fp8_case(
        "128 rows of 4096, 128 heads, FP8 latents",
        128,
        4096,
        128,
        target=">= 0.77x bfloat16",
    ),
]
