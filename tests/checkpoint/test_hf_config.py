"""config.json in both published forms, what is refused, and what export writes."""

import json
from dataclasses import replace

import published
import pytest

from dsjax import models
from dsjax.checkpoint import config_json, hf_config, hf_config_write
from dsjax.config import Groups, GroupScore, Llama3, Mla, Score, Yarn
from dsjax.errors import UserError

V3 = {  # as the published repository has it, without what does not concern us
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2_LITE = V3 | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}


def test_published_v3_is_ours():
    assert hf_config.read(V3, name="v3") == models.v3()


def test_published_v2_lite_is_ours():
    assert hf_config.read(V2_LITE, name="v2_lite") == models.v2_lite()


@pytest.mark.parametrize("name", models.names())
def test_every_model_comes_back(name):
    config = models.get(name)
    values = json.loads(json.dumps(hf_config_write.write(config, dtype="bfloat16")))
    assert hf_config.read(values, name=config.name) == config
    assert (
        config_json.decode(json.loads(json.dumps(config_json.encode(config)))) == config
    )


def test_published_keys_are_kept():
    values = hf_config_write.write(models.v3(), dtype="bfloat16", source=V3)
    dropped = {key: V3[key] for key in V3 if key != "quantization_config"}
    assert values == dropped | {"dtype": "bfloat16"}


def test_a_changed_model_is_written_as_it_is():
    """The source's other keys stay, what it no longer says rightly is replaced."""
    values = hf_config_write.write(models.v2_lite(), dtype="float32", source=V3)
    assert hf_config.read(values, name="v2_lite") == models.v2_lite()
    assert values["eos_token_id"] == 1 and values["ep_size"] == 1


def test_token_ids_are_not_left_to_defaults():
    values = hf_config_write.write(models.tiny_v3(), dtype="float32")
    assert values["bos_token_id"] is None and values["eos_token_id"] is None


TINY = [n for n in models.names() if n.startswith("tiny") and "tiny_moe" not in n]


@pytest.mark.parametrize("name", TINY)  # transformers has no model type "deepseek"
def test_as_transformers_5_writes_it(tmp_path, name):
    """transformers loads ours; what it then writes (rope_parameters) is read the same."""
    transformers = pytest.importorskip("transformers")
    config = models.get(name)
    values = hf_config_write.write(config, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert str(loaded.dtype) == "torch.float32"
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written
    assert hf_config.read(written, name=config.name) == config


def test_values_that_matter():
    config = hf_config.read(V3 | {"rope_interleave": False}, name="x")
    assert isinstance(config.attention, Mla) and not config.attention.rope.interleaved
    assert config.attention.rope.scaling == Yarn(factor=40)
    moe = config.segments[1].feed_forward
    assert (moe.score, moe.renormalize, moe.scale) == (Score.SIGMOID, True, 2.5)
    assert moe.groups == Groups(count=8, kept=4, score=GroupScore.TOP2_SUM)
    assert moe.selection_bias


def test_llama3_scaling():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    values = published.config("llama", rope_scaling=scaling, rope_theta=500000.0)
    assert hf_config.read(values, name="x").attention.rope.scaling == Llama3()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deepseek_v3", {"moe_layer_freq": 2}),
        ("deepseek_v3", {"attention_bias": True}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"num_nextn_predict_layers": 2}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek", {"scoring_func": "sigmoid"}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("qwen2", {"use_sliding_window": True}),
    ],
    ids=str,
)
def test_refused_settings_are_named(kind, changes):
    values = published.config(kind)
    hf_config.read(values, name="accepted without the change")
    (key, value), *_ = changes.items()
    with pytest.raises(UserError, match=f"{key}=.*{value}"):
        hf_config.read(values | changes, name="x")


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "longrope"}, "longrope"),
        (published.YARN | {"attention_factor": 1.5}, "attention_factor"),
        (published.YARN | {"truncate": False}, "truncate"),
        ({"full_attention": {"rope_type": "default"}}, "layer type"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_rope(scaling, word):
    values = published.config("deepseek_v2", rope_scaling=scaling)
    with pytest.raises(UserError, match=word):
        hf_config.read(values, name="x")


def test_yarn_scaling_of_plain_attention():
    """Without mscale_all_dim it is the same as in transformers; with it, refused."""
    plain = {k: v for k, v in published.YARN.items() if not k.startswith("mscale")}
    config = hf_config.read(published.config("qwen2", rope_scaling=plain), name="x")
    scaling = config.attention.rope.scaling
    assert scaling.softmax_scale == 1.0 and scaling.rotation_scale > 1.3
    with pytest.raises(UserError, match="mscale_all_dim"):
        hf_config.read(published.config("qwen2", rope_scaling=published.YARN), name="x")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "kv_lora_rank"])
def test_missing_keys_are_named(key):
    values = published.config("deepseek_v2")
    del values[key]
    with pytest.raises(UserError, match=key):
        hf_config.read(values, name="x")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"rope_scaling": [1]}, {"n_routed_experts": "8"}],
    ids=str,
)
def test_values_of_the_wrong_kind(changes):
    with pytest.raises(UserError, match=r"wrong kind|not a number") as error:
        hf_config.read(published.config("deepseek_v2") | changes, name="x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        replace(models.tiny_v2(), mtp=True),
        replace(models.tiny_v3(), segments=models.tiny_v3().segments[::-1]),
        replace(models.tiny_v3(), segments=models.tiny_moe_16b().segments, mtp=True),
    ],
    ids=["V2 with MTP", "MoE before dense", "MTP without selection bias"],
)
def test_what_no_published_type_expresses(config):
    with pytest.raises(UserError, match="no published model_type"):
        hf_config_write.write(config, dtype="float32")
