"""The published configurations, value by value, and what their tiny twins keep."""

import dataclasses

import pytest

from dsjax import models
from dsjax.config import (
    Dense,
    Gqa,
    Groups,
    GroupScore,
    Llama3,
    Mla,
    ModelConfig,
    Moe,
    Score,
    Yarn,
)
from dsjax.errors import UserError

PUBLISHED = [model() for model in models.PUBLISHED]


def by_name(config: ModelConfig) -> str:
    return config.name


# name: layers, d_model, heads, key-value heads, width, vocabulary, theta, norm epsilon
DENSE = {
    "llm_7b": (30, 4096, 32, 32, 11008, 102400, 1e4, 1e-6),
    "llm_67b": (95, 8192, 64, 8, 22016, 102400, 1e4, 1e-6),
    "r1_distill_qwen_1_5b": (28, 1536, 12, 2, 8960, 151936, 1e4, 1e-6),
    "r1_distill_qwen_7b": (28, 3584, 28, 4, 18944, 152064, 1e4, 1e-6),
    "r1_distill_qwen_14b": (48, 5120, 40, 8, 13824, 152064, 1e6, 1e-5),
    "r1_distill_qwen_32b": (64, 5120, 40, 8, 27648, 152064, 1e6, 1e-5),
    "r1_distill_llama_8b": (32, 4096, 32, 8, 14336, 128256, 5e5, 1e-5),
    "r1_distill_llama_70b": (80, 8192, 64, 8, 28672, 128256, 5e5, 1e-5),
}

# name: dense layers and width, MoE layers, shared, routed, chosen, expert width
EXPERTS = {
    "moe_2b": (0, None, 9, 1, 63, 7, 853),
    "moe_16b": (1, 10944, 27, 2, 64, 6, 1408),
    "moe_145b": (1, 21888, 61, 4, 128, 12, 1408),
    "v2": (1, 12288, 59, 2, 160, 6, 1536),
    "v2_lite": (1, 10944, 26, 2, 64, 6, 1408),
    "v3": (3, 18432, 58, 1, 256, 8, 2048),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_models(name):
    config = models.get(name)
    attention, (segment,) = config.attention, config.segments
    assert DENSE[name] == (
        segment.count,
        config.d_model,
        attention.num_heads,
        attention.num_kv_heads,
        segment.feed_forward.width,
        config.vocab_size,
        attention.rope.theta,
        config.norm_eps,
    )
    assert attention.head_dim == 128
    assert attention.qkv_bias == ("qwen" in name)
    assert attention.rope.scaling == (Llama3() if "llama" in name else None)
    assert not config.tied_embeddings
    assert not attention.rope.interleaved


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    *dense, moe = models.get(name).segments
    experts = moe.feed_forward
    assert EXPERTS[name] == (
        dense[0].count if dense else 0,
        dense[0].feed_forward.width if dense else None,
        moe.count,
        experts.num_shared,
        experts.num_experts,
        experts.top_k,
        experts.width,
    )


@pytest.mark.parametrize(
    ("name", "heads", "d_model"),
    [("moe_2b", 10, 1280), ("moe_16b", 16, 2048), ("moe_145b", 32, 4096)],
)
def test_moe_attention_is_multi_head(name, heads, d_model):
    config = models.get(name)
    assert config.attention == Gqa(num_heads=heads, num_kv_heads=heads, head_dim=128)
    assert config.d_model == d_model


@pytest.mark.parametrize(
    ("name", "heads", "q_rank", "mscale", "d_model"),
    [
        ("v2", 128, 1536, 0.707, 5120),
        ("v2_lite", 16, None, 0.707, 2048),
        ("v3", 128, 1536, 1.0, 7168),
    ],
)
def test_latent_attention(name, heads, q_rank, mscale, d_model):
    config = models.get(name)
    mla = config.attention
    assert (mla.num_heads, mla.q_rank, config.d_model) == (heads, q_rank, d_model)
    assert (mla.kv_rank, mla.nope_dim, mla.rope_dim, mla.value_dim) == (
        512,
        128,
        64,
        128,
    )
    assert mla.rope.interleaved
    assert mla.rope.theta == 1e4
    assert mla.rope.scaling == Yarn(factor=40, mscale=mscale, mscale_all_dim=mscale)
    assert config.max_length == 163840


def test_three_generations_of_routing():
    moe, lite, v2, v3 = (
        models.get(name).segments[-1].feed_forward
        for name in ("moe_16b", "v2_lite", "v2", "v3")
    )
    for softmax in (moe, lite, v2):
        assert softmax.score is Score.SOFTMAX
        assert not softmax.renormalize
        assert not softmax.selection_bias
    assert moe.groups is None
    assert lite.groups is None
    assert v2.groups == Groups(count=8, kept=3, score=GroupScore.MAX)
    assert v3.groups == Groups(count=8, kept=4, score=GroupScore.TOP2_SUM)
    assert (moe.scale, lite.scale, v2.scale, v3.scale) == (1.0, 1.0, 16.0, 2.5)
    assert v3.score is Score.SIGMOID
    assert v3.renormalize
    assert v3.selection_bias


def test_yarn_scales():
    """The softmax's factor is mscale squared; cos and sin keep a factor of exactly 1."""
    v2, v3 = (models.get(name).attention.rope.scaling for name in ("v2", "v3"))
    assert v2.softmax_scale == pytest.approx(1.5896, abs=5e-5)
    assert v3.softmax_scale == pytest.approx(1.8739, abs=5e-5)
    assert v2.softmax_scale / 192**0.5 == pytest.approx(0.11472, abs=5e-6)
    assert v3.softmax_scale / 192**0.5 == pytest.approx(0.13523, abs=5e-6)
    assert v2.rotation_scale == v3.rotation_scale == 1.0


def test_only_v3_predicts_two_tokens():
    assert [config.name for config in PUBLISHED if config.mtp] == ["v3"]


def test_vocabularies():
    assert models.v3().vocab_size == 129280
    assert models.moe_2b().vocab_size == 8192
    for name in ("moe_16b", "moe_145b", "v2", "v2_lite"):
        assert models.get(name).vocab_size == 102400


@pytest.mark.parametrize("config", PUBLISHED, ids=by_name)
def test_initialisation(config):
    tiny = models.get(f"tiny_{config.name}")
    assert config.init_std == 0.006
    assert tiny.init_std == pytest.approx(0.006 * (7168 / tiny.d_model) ** 0.5)


@pytest.mark.parametrize("config", PUBLISHED, ids=by_name)
def test_tiny_twin_keeps_every_kind_of_part(config):
    tiny = models.get(f"tiny_{config.name}")
    assert tiny.name == f"tiny_{config.name}"
    assert tiny.num_layers <= 4
    assert tiny.mtp == config.mtp
    assert tiny.tied_embeddings == config.tied_embeddings
    assert tiny.norm_eps == config.norm_eps
    assert _kind(tiny.attention) == _kind(config.attention)
    assert [_kind(segment.feed_forward) for segment in tiny.segments] == [
        _kind(segment.feed_forward) for segment in config.segments
    ]


def _kind(part: Gqa | Mla | Dense | Moe) -> tuple:
    """Everything about a part but its sizes."""
    match part:
        case Gqa():
            shared = part.num_kv_heads < part.num_heads
            return Gqa, shared, part.qkv_bias, *_rope(part)
        case Mla():
            return Mla, part.q_rank is None, *_rope(part)
        case Dense():
            return (Dense,)
        case Moe():
            group_score = part.groups and part.groups.score
            rules = (part.score, part.renormalize, part.scale, part.selection_bias)
            return Moe, part.num_shared, group_score, *rules


def _rope(part: Gqa | Mla) -> tuple:
    return part.rope.theta, part.rope.interleaved, type(part.rope.scaling)


def test_names_are_forgiving():
    assert models.get("V2-Lite") == models.v2_lite()
    assert models.get("r1-distill-qwen-1.5b") == models.r1_distill_qwen_1_5b()
    assert models.get("R1") == models.get("r1-zero") == models.v3()
    for name in models.names():
        assert models.get(name) == models.get(name)


@pytest.mark.parametrize("name", ["v4", "shrink", "PUBLISHED", ""])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(UserError, match=r"unknown model .*known: llm_7b, .*tiny_v3"):
        models.get(name)


def test_configs_are_frozen_and_hashable():
    config = models.v3()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 1
    assert len({models.v3(), models.v3(), models.v2()}) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 300}, "top_k=300 is more than num_experts=256"),
        (
            {"num_experts": 250},
            "groups.count=8 must divide num_experts=250",
        ),
        (
            {"groups": Groups(count=64, kept=1, score=GroupScore.TOP2_SUM)},
            "1 groups of 4 experts hold fewer than top_k=8",
        ),
        (
            {"groups": Groups(count=8, kept=9, score=GroupScore.MAX)},
            "groups.kept=9 must be from 1 to groups.count=8",
        ),
        (
            {"groups": Groups(count=256, kept=8, score=GroupScore.TOP2_SUM)},
            "TOP2_SUM needs two experts a group",
        ),
    ],
)
def test_impossible_routing_is_refused(change, words):
    moe = models.v3().segments[-1].feed_forward
    with pytest.raises(UserError, match=words):
        dataclasses.replace(moe, **change)


def test_heads_must_divide():
    with pytest.raises(UserError, match="num_kv_heads=3 must divide num_heads=4"):
        Gqa(num_heads=4, num_kv_heads=3, head_dim=8)


def test_locate():
    config = models.v3()
    assert config.locate(0) == (0, 0)
    assert config.locate(2) == (0, 2)
    assert config.locate(3) == (1, 0)
    assert config.locate(60) == (1, 57)
    with pytest.raises(IndexError):
        config.locate(61)
