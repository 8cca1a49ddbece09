"""Random Hugging Face checkpoints in the published form, for the parity tests.

Needs numpy alone (and ml_dtypes, which comes with jax): no torch, nothing of dsjax, not
even the safetensors library, so that a mistake in the code under test cannot hide here.
A checkpoint is a function of its `Case`: every tensor comes from a counter-based bit
generator keyed by seed and tensor name, through integer arithmetic and correctly
rounded operations only, so that every machine and numpy version writes the same bytes
(`digest` pins them).

The weights are scaled so that mistakes show: logits have a standard deviation near 1,
attention is far from uniform, routed experts matter as much as shared ones, biases and
norm scales are not at their neutral values.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.reference.files import Tensors, quantize, write_files

VOCAB_SIZE = 264  # 256 bytes and eight special tokens
BATCH, LENGTH = 2, 48


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint: what config.json says, the seed, and how the files are laid out.

    `expert_gain` undoes what routing weights do to the size of the routed experts' sum;
    `shards` of 1 means a single model.safetensors without an index.
    """

    config: Mapping[str, Any]
    seed: int
    shards: int = 1
    dtype: str = "BF16"
    expert_gain: float = 1.0

    @property
    def num_layers(self) -> int:
        """Layers of the main model; an MTP layer comes on top."""
        return self.config["num_hidden_layers"]

    @property
    def num_mtp(self) -> int:
        """MTP layers in the files: 0 or 1."""
        return self.config.get("num_nextn_predict_layers", 0)

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward of `layer` is a mixture of experts."""
        return "n_routed_experts" in self.config and (
            layer >= self.config["first_k_dense_replace"]
        )

    @property
    def moe_layers(self) -> list[int]:
        """Layers of the main model with a mixture of experts."""
        return [layer for layer in range(self.num_layers) if self.is_moe(layer)]

    @property
    def all_moe_layers(self) -> list[int]:
        """`moe_layers` and the MTP layer."""
        mtp = range(self.num_layers, self.num_layers + self.num_mtp)
        return self.moe_layers + list(mtp)


def tokens(case: Case) -> np.ndarray:
    """Token ids, int32 [BATCH, LENGTH], the special ones included."""
    bits = _bits(case, "tokens", BATCH * LENGTH)
    return (bits % case.config["vocab_size"]).astype(np.int32).reshape(BATCH, LENGTH)


def write(case: Case, directory: Path) -> Path:
    """Makes `directory` with config.json and the safetensors files; returns it."""
    config = dict(case.config)
    return write_files(config, tensors(case), directory, shards=case.shards)


def tensors(case: Case) -> Tensors:
    """All tensors as stored: bfloat16, float32, or e4m3 with float32 scales beside."""
    quantization = case.config.get("quantization_config")
    stored: Tensors = {}
    for name, shape in shapes(case):
        value = _value(case, name, shape)
        if quantization and is_quantized(name):
            block = quantization["weight_block_size"]
            stored[name], stored[f"{name}_scale_inv"] = quantize(value, block)
        elif case.dtype == "F32" or name.endswith("e_score_correction_bias"):
            stored[name] = value
        else:
            stored[name] = value.astype(ml_dtypes.bfloat16)
    return stored


def router_bias(stored: Tensors, layer: int) -> np.ndarray | None:
    """The selection bias [E] of one layer's router, None where there is none."""
    return stored.get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")


def is_quantized(name: str) -> bool:
    """Whether the FP8 releases quantise this tensor: all projections but eh_proj."""
    module = name.split(".")[-2]
    return (
        name.endswith("_proj.weight") and module != "eh_proj"
    ) or "with_mqa" in module


# --- Names and shapes, [out, in] as in the published files


def shapes(case: Case) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in file order, the MTP layer last."""
    config = case.config
    vocab_by_model = (config["vocab_size"], config["hidden_size"])
    yield "model.embed_tokens.weight", vocab_by_model
    for layer in range(case.num_layers):
        yield from _layer(case, layer)
    yield "model.norm.weight", (config["hidden_size"],)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", vocab_by_model
    for layer in range(case.num_layers, case.num_layers + case.num_mtp):
        yield from _layer(case, layer)
        yield from _mtp(config, f"model.layers.{layer}")


def _layer(case: Case, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    config, prefix = case.config, f"model.layers.{layer}"
    model = config["hidden_size"]
    attention = _latent_attention if "kv_lora_rank" in config else _grouped_attention
    yield f"{prefix}.input_layernorm.weight", (model,)
    for name, shape in attention(config):
        yield f"{prefix}.self_attn.{name}", shape
    yield f"{prefix}.post_attention_layernorm.weight", (model,)
    feed_forward = _experts if case.is_moe(layer) else _dense
    for name, shape in feed_forward(config):
        yield f"{prefix}.mlp.{name}", shape


def _grouped_attention(
    config: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or model // heads
    kv_rows = head * config["num_key_value_heads"]
    for name, rows in (
        ("q_proj", head * heads),
        ("k_proj", kv_rows),
        ("v_proj", kv_rows),
    ):
        yield f"{name}.weight", (rows, model)
        if config["model_type"] == "qwen2":
            yield f"{name}.bias", (rows,)
    yield "o_proj.weight", (model, head * heads)


def _latent_attention(
    config: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, heads = config["hidden_size"], config["num_attention_heads"]
    query_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value = config["v_head_dim"]
    if query_rank is None:
        yield "q_proj.weight", (heads * (nope + rope), model)
    else:
        yield "q_a_proj.weight", (query_rank, model)
        yield "q_a_layernorm.weight", (query_rank,)
        yield "q_b_proj.weight", (heads * (nope + rope), query_rank)
    yield "kv_a_proj_with_mqa.weight", (kv_rank + rope, model)
    yield "kv_a_layernorm.weight", (kv_rank,)
    yield "kv_b_proj.weight", (heads * (nope + value), kv_rank)
    yield "o_proj.weight", (model, heads * value)


def _swiglu(model: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gate_proj.weight", (width, model)
    yield "up_proj.weight", (width, model)
    yield "down_proj.weight", (model, width)


def _dense(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    return _swiglu(config["hidden_size"], config["intermediate_size"])


def _experts(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, width = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["n_routed_experts"]
    yield "gate.weight", (experts, model)
    if config.get("topk_method") == "noaux_tc":
        yield "gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        for name, shape in _swiglu(model, width):
            yield f"experts.{expert}.{name}", shape
    for name, shape in _swiglu(model, width * config["n_shared_experts"]):
        yield f"shared_experts.{name}", shape


def _mtp(
    config: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    model, vocab = config["hidden_size"], config["vocab_size"]
    yield f"{prefix}.enorm.weight", (model,)
    yield f"{prefix}.hnorm.weight", (model,)
    yield f"{prefix}.eh_proj.weight", (model, 2 * model)
    yield f"{prefix}.shared_head.norm.weight", (model,)
    yield f"{prefix}.embed_tokens.weight", (vocab, model)
    yield f"{prefix}.shared_head.head.weight", (vocab, model)


# --- Values


def _bits(case: Case, name: str, count: int) -> np.ndarray:
    """`count` random uint64.

    Raw bits are stable across numpy versions; the Generator's distributions are not.
    """
    key = hashlib.sha256(f"{case.seed}/{name}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def _normal(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal float64 values of `shape`, mean 0 and standard deviation 1.

    Each is the sum of four uniform 16-bit integers, centred and scaled.
    """
    quarters = _bits(case, name, math.prod(shape)).view("<u2").reshape(*shape, 4)
    total = quarters.astype(np.int64).sum(-1) - 4 * 65535 / 2
    return total / math.sqrt((65536**2 - 1) / 3)


GAINS = {  # times 1 / sqrt(fan in); 1.0 where not named
    "q_proj": 1.6,
    "q_b_proj": 1.6,
    "k_proj": 1.2,
    "down_proj": 2.0,
    "o_proj": 1.5,
    "gate": 1.5,
}


def _value(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of the tensor `name`."""
    if name.startswith(
        f"model.layers.{case.num_layers}."
    ):  # shared with the main model
        for copy, original in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", "lm_head.weight"),
        ):
            if name.endswith(copy):
                return _value(case, original, shape)
    normal = _normal(case, name, shape)
    module, kind = name.split(".")[-2:]
    match kind, len(shape):
        case "e_score_correction_bias", _:
            # mostly below minus the affinities, so that a masked score of 0 would win
            value = 0.13 * normal - 0.7
        case "bias", _:
            value = 0.5 * normal
        case "weight", 1:
            value = 1 + 0.25 * normal
        case "weight", 2:
            value = _gain(case, name, module) * normal / math.sqrt(shape[1])
    return value.astype(np.float32)


def _gain(case: Case, name: str, module: str) -> float:
    if module == "embed_tokens" and not case.config["tie_word_embeddings"]:
        return math.sqrt(case.config["hidden_size"])
    routed = ".experts." in name and module == "down_proj"
    return GAINS.get(module, 1.0) * (case.expert_gain if routed else 1.0)
