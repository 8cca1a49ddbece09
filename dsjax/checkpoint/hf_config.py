"""Published config.json files <-> `ModelConfig`.

Read in the form of the published repositories (rope_scaling, rope_theta, topk_method)
and as transformers 5 writes it (rope_parameters). What would change the arithmetic and is
not implemented is refused by name, never ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

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

Values = Mapping[str, Any]
HF_INIT_STD = 0.02  # a default of the file format that no published model trained with


def read(values: Values, *, name: str) -> ModelConfig:
    """The architecture that a published config.json describes.

    Raises UserError for an unknown model_type, a missing key, or a setting that is not
    implemented.
    """
    kind = values.get("model_type")
    if kind not in READERS:
        known = ", ".join(READERS)
        raise UserError(f"unknown model_type {kind!r}; known: {known}")
    _only(values, "hidden_act", "silu")
    _only(values, "attention_bias", False)
    _only(values, "mlp_bias", False)
    _only(values, "partial_rotary_factor", 1.0)
    init_std = values.get("initializer_range", HF_INIT_STD)
    attention, segments = READERS[kind](values)
    return ModelConfig(
        name=name,
        vocab_size=_need(values, "vocab_size"),
        d_model=_need(values, "hidden_size"),
        attention=attention,
        segments=segments,
        max_length=_need(values, "max_position_embeddings"),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        mtp=kind == "deepseek_v3" and _mtp(values),
        init_std=0.006 if init_std == HF_INIT_STD else init_std,
    )


def _need(values: Values, key: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"config.json lacks {key!r}")
    return values[key]


def _only(values: Values, key: str, *supported: Any) -> None:
    """Refuses a setting that is present and not one of the supported values."""
    value = values.get(key)
    if value is not None and value not in supported:
        options = " or ".join(map(repr, supported))
        raise UserError(
            f"config.json: {key}={value!r} is not supported, only {options}"
        )


def _mtp(values: Values) -> bool:
    count = values.get("num_nextn_predict_layers", values.get("num_mtp_layers")) or 0
    if count not in (0, 1):
        raise UserError(
            f"config.json: num_nextn_predict_layers={count}: 0 or 1 is known"
        )
    return count == 1


# --- attention


def _rope(values: Values, *, interleaved: bool) -> Rope:
    new = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or new
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UserError("config.json: rope_parameters by layer type are not supported")
    theta = scaling.get("rope_theta", new.get("rope_theta", values.get("rope_theta")))
    _only(scaling, "partial_rotary_factor", 1.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn", "llama3"):
        raise UserError(
            f"config.json: rope type {kind!r} is not supported; known: default, yarn, llama3"
        )
    parsers = {"default": lambda *_: None, "yarn": _yarn, "llama3": _llama3}
    return Rope(
        theta=float(theta or 10000.0),
        interleaved=interleaved,
        scaling=parsers[kind](scaling, values),
    )


def _yarn(scaling: Values, values: Values) -> Yarn:
    length = scaling.get("original_max_position_embeddings")
    length = length or _need(values, "max_position_embeddings")
    yarn = Yarn(
        factor=float(
            scaling.get("factor") or values["max_position_embeddings"] / length
        ),
        original_length=length,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=float(scaling.get("mscale") or 0),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0),
    )
    _only(scaling, "truncate", True)
    _only(scaling, "attention_factor", yarn.rotation_scale)
    return yarn


def _llama3(scaling: Values, values: Values) -> Llama3:
    return Llama3(
        factor=float(_need(scaling, "factor")),
        low_frequency_factor=float(_need(scaling, "low_freq_factor")),
        high_frequency_factor=float(_need(scaling, "high_freq_factor")),
        original_length=_need(scaling, "original_max_position_embeddings"),
    )


def _gqa(values: Values, *, qkv_bias: bool = False) -> Gqa:
    heads = _need(values, "num_attention_heads")
    rope = _rope(values, interleaved=False)
    if isinstance(rope.scaling, Yarn) and rope.scaling.mscale_all_dim:
        raise UserError("config.json: mscale_all_dim is supported for MLA only")
    return Gqa(
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or _need(values, "hidden_size") // heads,
        rope=rope,
        qkv_bias=qkv_bias,
    )


def _mla(values: Values, *, interleaved: bool) -> Mla:
    return Mla(
        num_heads=_need(values, "num_attention_heads"),
        kv_rank=_need(values, "kv_lora_rank"),
        q_rank=values.get("q_lora_rank"),
        nope_dim=_need(values, "qk_nope_head_dim"),
        rope_dim=_need(values, "qk_rope_head_dim"),
        value_dim=_need(values, "v_head_dim"),
        rope=_rope(values, interleaved=interleaved),
    )


# --- the five architectures


def _dense_segments(values: Values) -> tuple[Segment, ...]:
    width = Dense(width=_need(values, "intermediate_size"))
    return (Segment(count=_need(values, "num_hidden_layers"), feed_forward=width),)


def _moe_segments(values: Values, **routing: Any) -> tuple[Segment, ...]:
    _only(values, "moe_layer_freq", 1)
    layers = _need(values, "num_hidden_layers")
    if values.get("n_routed_experts") is None:
        return _dense_segments(values)
    dense = min(values.get("first_k_dense_replace") or 0, layers)
    moe = Moe(
        num_experts=values["n_routed_experts"],
        num_shared=values.get("n_shared_experts") or 0,
        top_k=_need(values, "num_experts_per_tok"),
        width=_need(values, "moe_intermediate_size"),
        **routing,
    )
    head = _dense_segments({**values, "num_hidden_layers": dense}) if dense else ()
    tail = (Segment(count=layers - dense, feed_forward=moe),) if dense < layers else ()
    return head + tail


def _groups(values: Values, score: GroupScore) -> Groups | None:
    count, kept = values.get("n_group") or 1, values.get("topk_group") or 1
    return None if count == kept == 1 else Groups(count=count, kept=kept, score=score)


def _read_llama(values: Values) -> tuple[Gqa, tuple[Segment, ...]]:
    return _gqa(values), _dense_segments(values)


def _read_qwen2(values: Values) -> tuple[Gqa, tuple[Segment, ...]]:
    _only(values, "use_sliding_window", False)
    kinds = set(values.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"config.json: layer_types {sorted(kinds)}: full_attention only"
        )
    return _gqa(values, qkv_bias=True), _dense_segments(values)


def _read_deepseek(values: Values) -> tuple[Gqa, tuple[Segment, ...]]:
    _only(values, "scoring_func", "softmax")
    normed = bool(values.get("norm_topk_prob"))
    return _gqa(values), _moe_segments(values, renormalize=normed)


def _read_deepseek_v2(values: Values) -> tuple[Mla, tuple[Segment, ...]]:
    _only(values, "topk_method", "greedy", "group_limited_greedy")
    _only(values, "scoring_func", "softmax")
    _only(values, "norm_topk_prob", False)
    limited = values.get("topk_method") == "group_limited_greedy"
    segments = _moe_segments(
        values,
        groups=_groups(values, GroupScore.MAX) if limited else None,
        scale=float(values.get("routed_scaling_factor") or 1.0),
    )
    return _mla(values, interleaved=True), segments


def _read_deepseek_v3(values: Values) -> tuple[Mla, tuple[Segment, ...]]:
    _only(values, "topk_method", "noaux_tc")
    _only(values, "scoring_func", "sigmoid")
    segments = _moe_segments(
        values,
        score=Score.SIGMOID,
        groups=_groups(values, GroupScore.TOP2_SUM),
        renormalize=bool(values.get("norm_topk_prob", True)),
        scale=float(values.get("routed_scaling_factor") or 1.0),
        selection_bias=True,
    )
    return _mla(
        values, interleaved=values.get("rope_interleave") is not False
    ), segments


Reader = Callable[[Values], tuple[Gqa | Mla, tuple[Segment, ...]]]
READERS: dict[str, Reader] = {
    "llama": _read_llama,
    "qwen2": _read_qwen2,
    "deepseek": _read_deepseek,
    "deepseek_v2": _read_deepseek_v2,
    "deepseek_v3": _read_deepseek_v3,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


# --- the other direction


def write(
    config: ModelConfig, *, dtype: str, source: Values | None = None
) -> dict[str, Any]:
    """The published config.json of `config`, in a form that transformers 5 loads.

    source: the config.json that the model was converted from. Its keys are kept as they
    were when it describes `config`; the weights' dtype is brought up to date.
    Raises UserError when no published model_type can express `config`.
    """
    kept = {key: source[key] for key in source or () if key not in DROPPED}
    if not (kept and _describes(kept, config)):
        kept = UNKNOWN_IDS | kept | _generated(config)
    if "num_nextn_predict_layers" in kept or config.mtp:
        kept["num_nextn_predict_layers"] = int(config.mtp)
    return kept | {"torch_dtype": dtype, "dtype": dtype}


# Without these lines transformers would take its own defaults for the vocabulary's.
UNKNOWN_IDS = {"bos_token_id": None, "eos_token_id": None}
DROPPED = ("quantization_config", "torch_dtype", "dtype", "num_mtp_layers")


def _describes(values: Values, config: ModelConfig) -> bool:
    try:
        told = read(values, name=config.name)
    except UserError:
        return False
    return replace(told, mtp=config.mtp, init_std=config.init_std) == config


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
    values |= _attention_values(config) | _feed_forward_values(config, kind)
    told = read(values, name=config.name)
    if replace(told, mtp=config.mtp) != config:
        raise UserError(f"{config.name}: no published model_type expresses this config")
    return values


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
