"""Small published checkpoints, written with the safetensors library and own names.

The tensor names are spelt out here and not taken from dsjax's key table, so that a wrong
line of the table is found.
"""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
KINDS = ("llama", "qwen2", "deepseek", "deepseek_v2", "deepseek_v3")


def config(kind: str, **changes) -> dict:
    """A config.json of the published form."""
    values = {
        "model_type": kind,
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if kind in ("llama", "qwen2") else 4,
        "hidden_act": "silu",
        "max_position_embeddings": 2560,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 7,
        "eos_token_id": 8,
        "torch_dtype": "bfloat16",
    }
    if kind.startswith("deepseek"):
        values |= {
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
        }
    if kind in ("deepseek_v2", "deepseek_v3"):
        values |= {
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.5,
            "rope_scaling": YARN,
        }
    if kind == "deepseek_v3":
        values |= {
            "n_shared_experts": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        }
    return values | changes


def shapes(values: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor that the published repositories have, and its shape."""
    kind, d, vocab = values["model_type"], values["hidden_size"], values["vocab_size"]
    layers = values["num_hidden_layers"]
    out = {"model.embed_tokens.weight": (vocab, d)}
    for layer in range(layers):
        out |= _layer(values, f"model.layers.{layer}.", layer)
    out["model.norm.weight"] = (d,)
    if not values["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocab, d)
    if kind == "deepseek_v3" and values["num_nextn_predict_layers"]:
        prefix = f"model.layers.{layers}."
        out |= _layer(values, prefix, layers)
        out |= {
            f"{prefix}enorm.weight": (d,),
            f"{prefix}hnorm.weight": (d,),
            f"{prefix}eh_proj.weight": (d, 2 * d),
            f"{prefix}shared_head.norm.weight": (d,),
            f"{prefix}embed_tokens.weight": (vocab, d),
            f"{prefix}shared_head.head.weight": (vocab, d),
        }
    return out


def _layer(values: dict, prefix: str, layer: int) -> dict[str, tuple[int, ...]]:
    d, kind = values["hidden_size"], values["model_type"]
    out = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    heads = values["num_attention_heads"]
    if "kv_lora_rank" in values:
        latent, rope = values["kv_lora_rank"], values["qk_rope_head_dim"]
        nope, value = values["qk_nope_head_dim"], values["v_head_dim"]
        rank = values["q_lora_rank"]
        queries = heads * (nope + rope)
        out |= {
            "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, d),
            "self_attn.kv_a_layernorm.weight": (latent,),
            "self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
            "self_attn.o_proj.weight": (d, heads * value),
        }
        if rank is None:
            out["self_attn.q_proj.weight"] = (queries, d)
        else:
            out |= {
                "self_attn.q_a_proj.weight": (rank, d),
                "self_attn.q_a_layernorm.weight": (rank,),
                "self_attn.q_b_proj.weight": (queries, rank),
            }
    else:
        head = d // heads
        for part, count in zip("qkv", (heads, *[values["num_key_value_heads"]] * 2)):
            out[f"self_attn.{part}_proj.weight"] = (count * head, d)
            if kind == "qwen2":
                out[f"self_attn.{part}_proj.bias"] = (count * head,)
        out["self_attn.o_proj.weight"] = (d, heads * head)
    if layer < values.get("first_k_dense_replace", layer + 1):
        out |= _mlp("mlp.", values["intermediate_size"], d)
    else:
        width, count = values["moe_intermediate_size"], values["n_routed_experts"]
        out["mlp.gate.weight"] = (count, d)
        if kind == "deepseek_v3":
            out["mlp.gate.e_score_correction_bias"] = (count,)
        for expert in range(count):
            out |= _mlp(f"mlp.experts.{expert}.", width, d)
        out |= _mlp("mlp.shared_experts.", values["n_shared_experts"] * width, d)
    return {prefix + name: shape for name, shape in out.items()}


def _mlp(prefix: str, width: int, d: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, d),
        f"{prefix}up_proj.weight": (width, d),
        f"{prefix}down_proj.weight": (d, width),
    }


def tensors(values: dict, *, dtype: np.dtype = BF16, seed: int = 0) -> dict:
    """Random tensors; the selection bias is float32 and the MTP copies are copies."""
    random = np.random.default_rng(seed)
    out = {
        name: random.standard_normal(shape, np.float32).astype(
            F32 if name.endswith("e_score_correction_bias") else dtype
        )
        for name, shape in shapes(values).items()
    }
    prefix = f"model.layers.{values['num_hidden_layers']}."
    if f"{prefix}enorm.weight" in out:
        out[f"{prefix}embed_tokens.weight"] = out["model.embed_tokens.weight"]
        out[f"{prefix}shared_head.head.weight"] = out["lm_head.weight"]
    return out


def quantise(weights: dict, block: tuple[int, int], seed: int = 1) -> dict:
    """Replaces the linear layers by random e4m3 bytes and float32 block scales."""
    random = np.random.default_rng(seed)
    out = {}
    for name, array in weights.items():
        out[name] = array
        if "_proj" not in name or "eh_proj" in name:
            continue
        bits = random.integers(0, 255, array.shape, np.uint8)
        bits[bits & 0x7F == 0x7F] = 1  # no NaN
        out[name] = bits.view(E4M3)
        blocks = [math.ceil(n / size) for n, size in zip(array.shape, block)]
        out[f"{name}_scale_inv"] = random.uniform(1e-3, 2e-3, blocks).astype(np.float32)
    return out


def dequantise(weights: dict, block: tuple[int, int]) -> dict:
    """What a reader should see: float32(e4m3) * scale rounded to bfloat16."""
    out = {}
    for name, array in weights.items():
        if name.endswith("_scale_inv"):
            continue
        if array.dtype == E4M3:
            scale = np.kron(weights[f"{name}_scale_inv"], np.ones(block, np.float32))
            rows, columns = array.shape
            array = (array.astype(np.float32) * scale[:rows, :columns]).astype(BF16)
        out[name] = array
    return out


def write(directory: Path, values: dict, weights: dict, *, shards: int = 1) -> Path:
    """A checkpoint directory; tensors go round the shards one by one."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values))
    names = list(weights)
    if shards == 1:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return directory
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        group = names[number::shards]
        part = {name: weights[name] for name in group}
        save_file(part, directory / file, {"format": "pt"})
        places |= dict.fromkeys(group, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def make(directory: Path, kind: str, *, dtype: np.dtype = BF16, **changes) -> Path:
    """A random checkpoint of one architecture in two shards."""
    values = config(kind, **changes)
    return write(directory, values, tensors(values, dtype=dtype), shards=2)
