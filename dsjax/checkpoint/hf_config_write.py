"""`ModelConfig` -> a published config.json, in a form that transformers 5 loads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsjax.checkpoint.hf_config import read
from dsjax.config import (
    Dense,
    Gqa,
    Groups,
    GroupScore,
    Llama3,
    Mla,
    ModelConfig,
    Moe,
    Yarn,
)
from dsjax.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# Without these lines transformers would take its own defaults for the vocabulary's.
UNKNOWN_IDS = {"bos_token_id": None, "eos_token_id": None}
DROPPED = ("quantization_config", "torch_dtype", "dtype", "num_mtp_layers")


def write(
    config: ModelConfig, *, dtype: str, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The published config.json of `config`, in a form that transformers 5 loads.

    source: the config.json that the model was converted from. Its keys are kept as they
    were when it describes `config`; the weights' dtype is brought up to date.
    Raises UserError when no published model_type can express `config`.
    """
    kept = {key: source[key] for key in source or () if key not in DROPPED}
    if "num_nextn_predict_layers" in kept or config.mtp:
        kept["num_nextn_predict_layers"] = int(config.mtp)
    if not _describes(kept, config):
        kept = UNKNOWN_IDS | kept | _generated(config)
        if not _describes(kept, config):
            raise UserError(f"{config.name}: no published model_type can express it")
    return kept | {"torch_dtype": dtype, "dtype": dtype}


def _describes(values: Mapping[str, Any], config: ModelConfig) -> bool:
    try:
        told = read(values, name=config.name)
    except UserError:
        return False
    return replace(told, init_std=config.init_std) == config


def _generated(config: ModelConfig) -> dict[str, Any]:
    kind = model_type(config)
    values = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "attention_bias": False,
        "rope_theta": config.attention.rope.theta,
        "rope_scaling": _rope_scaling(config.attention.rope.scaling),
        "rope_parameters": None,
    }
    return values | _attention_values(config) | _feed_forward_values(config, kind)


def model_type(config: ModelConfig) -> str:
    """The published architecture that a config belongs to."""
    moes = [s.feed_forward for s in config.segments if isinstance(s.feed_forward, Moe)]
    match config.attention:
        case Mla():
            return (
                "deepseek_v3" if any(m.selection_bias for m in moes) else "deepseek_v2"
            )
        case Gqa(qkv_bias=True):
            return "qwen2"
        case _:
            return "deepseek" if moes else "llama"


def _rope_scaling(scaling: Yarn | Llama3 | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case Yarn():
            magnitudes = {
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
            }
            return {
                "type": "yarn",
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                **{key: value for key, value in magnitudes.items() if value},
            }
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }


def _attention_values(config: ModelConfig) -> dict[str, Any]:
    match config.attention:
        case Gqa() as gqa:
            values = {"num_key_value_heads": gqa.num_kv_heads}
            if gqa.head_dim * gqa.num_heads != config.d_model:
                values["head_dim"] = gqa.head_dim
            return values
        case Mla() as mla:
            return {
                "num_key_value_heads": mla.num_heads,
                "kv_lora_rank": mla.kv_rank,
                "q_lora_rank": mla.q_rank,
                "qk_nope_head_dim": mla.nope_dim,
                "qk_rope_head_dim": mla.rope_dim,
                "v_head_dim": mla.value_dim,
                "rope_interleave": mla.rope.interleaved,
            }


def _feed_forward_values(config: ModelConfig, kind: str) -> dict[str, Any]:
    dense = sum(s.count for s in config.segments if isinstance(s.feed_forward, Dense))
    widths = [
        s.feed_forward.width
        for s in config.segments
        if isinstance(s.feed_forward, Dense)
    ]
    moe = config.segments[-1].feed_forward
    if not isinstance(moe, Moe):
        values = {"intermediate_size": widths[0]}
        return values | ({"n_routed_experts": None} if kind == "deepseek_v2" else {})
    groups = moe.groups or Groups(count=1, kept=1, score=GroupScore.TOP2_SUM)
    values = {
        "intermediate_size": widths[0] if widths else moe.width,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "moe_intermediate_size": moe.width,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalize,
        "scoring_func": moe.score.value,
    }
    if kind == "deepseek":
        return values
    method = "group_limited_greedy" if moe.groups else "greedy"
    return values | {
        "topk_method": "noaux_tc" if kind == "deepseek_v3" else method,
        "n_group": groups.count,
        "topk_group": groups.kept,
        "routed_scaling_factor": moe.scale,
    }
