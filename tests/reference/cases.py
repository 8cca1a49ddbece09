"""The checkpoints of the parity tests: config.json as published, at sizes for a test.

Sizes that could be mixed up differ, and sequences are longer than the original length
of the rope scaling, so that a swapped axis or a forgotten scaling shows.
"""

from typing import Any

from tests.reference.checkpoints import VOCAB_SIZE, Case

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "rope_theta": 10000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
}

# --- DeepSeek LLM and the R1 distills

_LLAMA_GQA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
}

_LLAMA_MHA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 80,
    "intermediate_size": 152,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
}

_QWEN2 = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 72,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "max_window_layers": 1,
    "sliding_window": 8,  # shorter than the sequences, and to be ignored:
    "use_sliding_window": False,
    "use_mrope": False,
}
del _QWEN2["rope_scaling"], _QWEN2["attention_bias"]

# --- DeepSeekMoE 16B

_MOE = _COMMON | {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "model_type": "deepseek",
    "hidden_size": 80,
    "intermediate_size": 152,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "pretraining_tp": 1,
}

# --- V2 and V2-Lite


def _yarn(mscale: float) -> dict[str, Any]:
    """Published YaRN but for the original length, which sequences here pass."""
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 32,
        "type": "yarn",
    }


_V2 = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "model_type": "deepseek_v2",
    "hidden_size": 80,
    "intermediate_size": 152,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 44,
    "kv_lora_rank": 36,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 28,
    "max_position_embeddings": 1280,
    "rope_scaling": _yarn(0.707),
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "pretraining_tp": 1,
}

_V2_LITE = _V2 | {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}

# --- V3

_V3 = _V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "deepseek_v3",
    "ep_size": 1,
    "num_nextn_predict_layers": 1,
    "rope_scaling": _yarn(1.0),
    "n_shared_experts": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def _fp8(rows: int, columns: int) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [rows, columns],
    }


_V3_FP8 = _V3 | {
    "hidden_size": 160,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 144,
    "kv_lora_rank": 132,
    "v_head_dim": 36,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "quantization_config": _fp8(128, 128),
}

CASES: dict[str, Case] = {
    "llama_gqa": Case(config=_LLAMA_GQA, seed=1, shards=2),
    "llama_mha": Case(config=_LLAMA_MHA, seed=2, dtype="F32"),
    "qwen2_untied": Case(config=_QWEN2, seed=3, shards=2),
    "qwen2_tied": Case(
        config=_QWEN2
        | {"tie_word_embeddings": True, "rope_theta": 1000000.0, "rms_norm_eps": 1e-05},
        seed=4,
    ),
    "deepseek_moe": Case(config=_MOE, seed=30, expert_gain=3.0),
    "deepseek_v2": Case(config=_V2, seed=32, shards=3, expert_gain=0.2),
    "deepseek_v2_lite": Case(config=_V2_LITE, seed=24, dtype="F32", expert_gain=3.0),
    "deepseek_v3": Case(config=_V3, seed=8, expert_gain=1.0),
    "deepseek_v3_fp8": Case(config=_V3_FP8, seed=9, shards=3),
    "deepseek_v3_fp8_small_blocks": Case(
        config=_V3 | {"quantization_config": _fp8(48, 32)}, seed=10, shards=2
    ),
}
