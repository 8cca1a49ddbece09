"""Published config.json files -> `ModelConfig` (`hf_config_write` is the way back).

Read in the form of the published repositories (rope_scaling, rope_theta, topk_method)
and as transformers 5 writes it (rope_parameters). What would change the arithmetic and is
not implemented is refused by name, never ignored.
"""

from collections.abc import Callable, Mapping
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
    try:
        return _model(values, name=name)
    except (TypeError, AttributeError) as error:
        raise UserError(f"config.json: a value of the wrong kind ({error})") from None


def _model(values: Values, *, name: str) -> ModelConfig:
    kind = values["model_type"]
    attention, segments = READERS[kind](values)
    init_std = values.get("initializer_range", HF_INIT_STD)
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
    """A number that has no default."""
    value = values.get(key)
    if value is None:
        raise UserError(f"config.json lacks {key!r}")
    if not isinstance(value, int | float):
        raise UserError(f"config.json: {key}={value!r} is not a number")
    return value


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
