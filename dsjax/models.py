"""The published models by name, each with a `tiny_` twin of the same structure.

Sources: the papers' configuration sections and the published config.json files. Every
function returns a fresh frozen `ModelConfig`; `get("v3")` looks one up by name,
`names()` lists them.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from dsjax.config import (
    Dense,
    Gqa,
    Groups,
    GroupScore,
    Llama3,
    Mla,
    ModelConfig,
    Moe,
    Rope,
    Score,
    Segment,
    Yarn,
)
from dsjax.errors import UserError


def small_init_std(d_model: int) -> float:
    """V3's 0.006 carried over to another width: it grows as 1 / sqrt(d_model)."""
    return 0.006 * math.sqrt(7168 / d_model)


def _dense_decoder(
    name: str, *, layers: int, d_model: int, width: int, attention: Gqa, **rest
) -> ModelConfig:
    segments = (Segment(count=layers, feed_forward=Dense(width=width)),)
    return ModelConfig(
        name=name, d_model=d_model, attention=attention, segments=segments, **rest
    )


# --- DeepSeek LLM (arXiv 2401.02954, table 2)


def llm_7b() -> ModelConfig:
    """DeepSeek LLM 7B: multi-head attention, 30 layers."""
    attention = Gqa(num_heads=32, num_kv_heads=32, head_dim=128)
    return _dense_decoder(
        "llm_7b",
        layers=30,
        d_model=4096,
        width=11008,
        attention=attention,
        vocab_size=102400,
        max_length=4096,
    )


def llm_67b() -> ModelConfig:
    """DeepSeek LLM 67B: 8 key-value heads, deep rather than wide."""
    attention = Gqa(num_heads=64, num_kv_heads=8, head_dim=128)
    return _dense_decoder(
        "llm_67b",
        layers=95,
        d_model=8192,
        width=22016,
        attention=attention,
        vocab_size=102400,
        max_length=4096,
    )


# --- DeepSeekMoE (arXiv 2401.06066, table 7)


def moe_2b() -> ModelConfig:
    """DeepSeekMoE 2B, the validation model: every layer MoE, 1 + 63 experts."""
    return ModelConfig(
        name="moe_2b",
        vocab_size=8192,
        d_model=1280,
        attention=Gqa(num_heads=10, num_kv_heads=10, head_dim=128),
        segments=(
            Segment(
                count=9,
                feed_forward=Moe(num_experts=63, num_shared=1, top_k=7, width=853),
            ),
        ),
        max_length=2048,
    )


def moe_16b() -> ModelConfig:
    """DeepSeekMoE 16B: the first layer dense, then 2 shared and 64 routed experts."""
    return ModelConfig(
        name="moe_16b",
        vocab_size=102400,
        d_model=2048,
        attention=Gqa(num_heads=16, num_kv_heads=16, head_dim=128),
        segments=(
            Segment(count=1, feed_forward=Dense(width=10944)),
            Segment(
                count=27,
                feed_forward=Moe(num_experts=64, num_shared=2, top_k=6, width=1408),
            ),
        ),
        max_length=4096,
    )


def moe_145b() -> ModelConfig:
    """DeepSeekMoE 145B: 4 shared and 128 routed experts.

    The paper gives no widths; 1408, and 21888 for the dense layer, are what makes its
    144.6B total and 22.2B active.
    """
    return ModelConfig(
        name="moe_145b",
        vocab_size=102400,
        d_model=4096,
        attention=Gqa(num_heads=32, num_kv_heads=32, head_dim=128),
        segments=(
            Segment(count=1, feed_forward=Dense(width=21888)),
            Segment(
                count=61,
                feed_forward=Moe(num_experts=128, num_shared=4, top_k=12, width=1408),
            ),
        ),
        max_length=4096,
    )


# --- V2 and V2-Lite (arXiv 2405.04434)


def _v2_rope() -> Rope:
    return Rope(
        interleaved=True, scaling=Yarn(factor=40, mscale=0.707, mscale_all_dim=0.707)
    )


def v2() -> ModelConfig:
    """DeepSeek-V2: MLA, 160 experts in 8 device groups of which a token reaches 3."""
    groups = Groups(count=8, kept=3, score=GroupScore.MAX)
    moe = Moe(
        num_experts=160, num_shared=2, top_k=6, width=1536, groups=groups, scale=16.0
    )
    return ModelConfig(
        name="v2",
        vocab_size=102400,
        d_model=5120,
        attention=Mla(
            num_heads=128,
            kv_rank=512,
            q_rank=1536,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            rope=_v2_rope(),
        ),
        segments=(
            Segment(count=1, feed_forward=Dense(width=12288)),
            Segment(count=59, feed_forward=moe),
        ),
        max_length=163840,
    )


def v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite: queries without a latent, 64 experts, no groups."""
    return ModelConfig(
        name="v2_lite",
        vocab_size=102400,
        d_model=2048,
        attention=Mla(
            num_heads=16,
            kv_rank=512,
            q_rank=None,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            rope=_v2_rope(),
        ),
        segments=(
            Segment(count=1, feed_forward=Dense(width=10944)),
            Segment(
                count=26,
                feed_forward=Moe(num_experts=64, num_shared=2, top_k=6, width=1408),
            ),
        ),
        max_length=163840,
    )


# --- V3 (arXiv 2412.19437); R1 and R1-Zero have the same architecture


def v3() -> ModelConfig:
    """DeepSeek-V3, and so R1 and R1-Zero.

    Sigmoid routing with a selection bias, node-limited groups, one MTP module.
    """
    moe = Moe(
        num_experts=256,
        num_shared=1,
        top_k=8,
        width=2048,
        score=Score.SIGMOID,
        groups=Groups(count=8, kept=4, score=GroupScore.TOP2_SUM),
        renormalize=True,
        scale=2.5,
        selection_bias=True,
    )
    return ModelConfig(
        name="v3",
        vocab_size=129280,
        d_model=7168,
        attention=Mla(
            num_heads=128,
            kv_rank=512,
            q_rank=1536,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            rope=Rope(interleaved=True, scaling=Yarn(factor=40)),
        ),
        segments=(
            Segment(count=3, feed_forward=Dense(width=18432)),
            Segment(count=58, feed_forward=moe),
        ),
        max_length=163840,
        mtp=True,
    )


# --- The six R1 distills (arXiv 2501.12948, table 5): Qwen2.5 and Llama 3 architectures


def _qwen(
    name: str,
    *,
    layers: int,
    d_model: int,
    width: int,
    heads: int,
    kv_heads: int,
    **rest,
) -> ModelConfig:
    rope = Rope(theta=rest.pop("theta"))
    attention = Gqa(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d_model // heads,
        rope=rope,
        qkv_bias=True,
    )
    return _dense_decoder(
        name,
        layers=layers,
        d_model=d_model,
        width=width,
        attention=attention,
        max_length=131072,
        **rest,
    )


def r1_distill_qwen_1_5b() -> ModelConfig:
    """R1-Distill-Qwen-1.5B.

    The distill unties the embeddings that its base ties.
    """
    return _qwen(
        "r1_distill_qwen_1_5b",
        layers=28,
        d_model=1536,
        width=8960,
        heads=12,
        kv_heads=2,
        theta=1e4,
        vocab_size=151936,
    )


def r1_distill_qwen_7b() -> ModelConfig:
    """R1-Distill-Qwen-7B."""
    return _qwen(
        "r1_distill_qwen_7b",
        layers=28,
        d_model=3584,
        width=18944,
        heads=28,
        kv_heads=4,
        theta=1e4,
        vocab_size=152064,
    )


def r1_distill_qwen_14b() -> ModelConfig:
    """R1-Distill-Qwen-14B."""
    return _qwen(
        "r1_distill_qwen_14b",
        layers=48,
        d_model=5120,
        width=13824,
        heads=40,
        kv_heads=8,
        theta=1e6,
        vocab_size=152064,
        norm_eps=1e-5,
    )


def r1_distill_qwen_32b() -> ModelConfig:
    """R1-Distill-Qwen-32B."""
    return _qwen(
        "r1_distill_qwen_32b",
        layers=64,
        d_model=5120,
        width=27648,
        heads=40,
        kv_heads=8,
        theta=1e6,
        vocab_size=152064,
        norm_eps=1e-5,
    )


def _llama(
    name: str, *, layers: int, d_model: int, width: int, heads: int
) -> ModelConfig:
    rope = Rope(theta=5e5, scaling=Llama3())
    attention = Gqa(num_heads=heads, num_kv_heads=8, head_dim=128, rope=rope)
    return _dense_decoder(
        name,
        layers=layers,
        d_model=d_model,
        width=width,
        attention=attention,
        vocab_size=128256,
        max_length=131072,
        norm_eps=1e-5,
    )


def r1_distill_llama_8b() -> ModelConfig:
    """R1-Distill-Llama-8B."""
    return _llama("r1_distill_llama_8b", layers=32, d_model=4096, width=14336, heads=32)


def r1_distill_llama_70b() -> ModelConfig:
    """R1-Distill-Llama-70B."""
    return _llama(
        "r1_distill_llama_70b", layers=80, d_model=8192, width=28672, heads=64
    )


# --- Tiny twins: the same structure at a size for a test or a laptop


def shrink(
    config: ModelConfig, *, d_model: int = 64, vocab_size: int = 512, width: int = 32
) -> ModelConfig:
    """The same architecture, small: 2 layers a segment, 4 heads, 16 experts of `width`.

    Every kind of part that the original has is kept (latents, groups, bias, shared
    experts, MTP, rope scaling) and `d_model`, the latents and all widths divide by 8,
    so that 8 devices can share the weights. The initial standard deviation follows
    `small_init_std`.
    """
    match config.attention:
        case Gqa() as gqa:
            kv_heads = 4 if gqa.num_kv_heads == gqa.num_heads else 2
            rope = replace(gqa.rope, scaling=_shrink_scaling(gqa.rope.scaling))
            attention = replace(
                gqa,
                num_heads=4,
                num_kv_heads=kv_heads,
                head_dim=d_model // 4,
                rope=rope,
            )
        case Mla() as mla:
            attention = replace(
                mla,
                num_heads=4,
                kv_rank=d_model // 2,
                q_rank=mla.q_rank and 3 * d_model // 4,
                nope_dim=d_model // 4,
                rope_dim=d_model // 8,
                value_dim=d_model // 4,
                rope=replace(mla.rope, scaling=_shrink_scaling(mla.rope.scaling)),
            )
    segments = tuple(
        Segment(
            count=min(segment.count, 2),
            feed_forward=_shrink_feed_forward(segment.feed_forward, width),
        )
        for segment in config.segments
    )
    return replace(
        config,
        name=f"tiny_{config.name}",
        vocab_size=vocab_size,
        d_model=d_model,
        attention=attention,
        segments=segments,
        max_length=min(config.max_length, 2048),
        init_std=small_init_std(d_model),
    )


def _shrink_scaling(scaling: Yarn | Llama3 | None) -> Yarn | Llama3 | None:
    return scaling and replace(scaling, original_length=64)


def _shrink_feed_forward(feed_forward: Dense | Moe, width: int) -> Dense | Moe:
    match feed_forward:
        case Dense():
            return Dense(width=4 * width)
        case Moe() as moe:
            experts = (
                16 if moe.num_experts % 2 == 0 else 15
            )  # the 2B model's 1 + 63 becomes 1 + 15
            groups = moe.groups and replace(moe.groups, count=4, kept=2)
            return replace(
                moe,
                num_experts=experts,
                top_k=min(moe.top_k, 4),
                width=width,
                groups=groups,
            )


PUBLISHED: tuple[Callable[[], ModelConfig], ...] = (
    llm_7b,
    llm_67b,
    moe_2b,
    moe_16b,
    moe_145b,
    v2,
    v2_lite,
    v3,
    r1_distill_qwen_1_5b,
    r1_distill_qwen_7b,
    r1_distill_qwen_14b,
    r1_distill_qwen_32b,
    r1_distill_llama_8b,
    r1_distill_llama_70b,
)
_ALIASES = {"r1": "v3", "r1_zero": "v3"}


def tiny_llm_7b() -> ModelConfig:
    """`llm_7b` in miniature."""
    return shrink(llm_7b())


def tiny_llm_67b() -> ModelConfig:
    """`llm_67b` in miniature."""
    return shrink(llm_67b())


def tiny_moe_2b() -> ModelConfig:
    """`moe_2b` in miniature."""
    return shrink(moe_2b())


def tiny_moe_16b() -> ModelConfig:
    """`moe_16b` in miniature."""
    return shrink(moe_16b())


def tiny_moe_145b() -> ModelConfig:
    """`moe_145b` in miniature."""
    return shrink(moe_145b())


def tiny_v2() -> ModelConfig:
    """`v2` in miniature."""
    return shrink(v2())


def tiny_v2_lite() -> ModelConfig:
    """`v2_lite` in miniature."""
    return shrink(v2_lite())


def tiny_v3() -> ModelConfig:
    """`v3` in miniature."""
    return shrink(v3())


def tiny_r1_distill_qwen_1_5b() -> ModelConfig:
    """`r1_distill_qwen_1_5b` in miniature."""
    return shrink(r1_distill_qwen_1_5b())


def tiny_r1_distill_qwen_7b() -> ModelConfig:
    """`r1_distill_qwen_7b` in miniature."""
    return shrink(r1_distill_qwen_7b())


def tiny_r1_distill_qwen_14b() -> ModelConfig:
    """`r1_distill_qwen_14b` in miniature."""
    return shrink(r1_distill_qwen_14b())


def tiny_r1_distill_qwen_32b() -> ModelConfig:
    """`r1_distill_qwen_32b` in miniature."""
    return shrink(r1_distill_qwen_32b())


def tiny_r1_distill_llama_8b() -> ModelConfig:
    """`r1_distill_llama_8b` in miniature."""
    return shrink(r1_distill_llama_8b())


def tiny_r1_distill_llama_70b() -> ModelConfig:
    """`r1_distill_llama_70b` in miniature."""
    return shrink(r1_distill_llama_70b())


def names() -> list[str]:
    """All names that `get` knows: published models, tiny twins, r1 and r1_zero."""
    published = [model.__name__ for model in PUBLISHED]
    return published + [f"tiny_{name}" for name in published] + list(_ALIASES)


def get(name: str) -> ModelConfig:
    """The configuration called `name`; hyphens and dots count as underscores.

    Raises UserError with the known names.
    """
    key = name.lower().replace("-", "_").replace(".", "_")
    key = _ALIASES.get(key, key)
    if key not in names():
        raise UserError(f"unknown model {name!r}; known: {', '.join(names())}")
    return globals()[key]()
