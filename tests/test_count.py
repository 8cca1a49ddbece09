"""`dsjax inspect`: the counts of the published models, to the digits that were published."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from dsjax import models
from dsjax.checkpoint import config_json
from dsjax.checkpoint.config_json import Description
from dsjax.cli import main
from dsjax.count import count, find, table
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer

# What the papers and model cards print, in billions: all parameters, active ones.
# V2-Lite's 2.4 leaves the embedding lookup out, so it is tested apart.
TOTALS = {
    "llm_7b": ("6.910", "6.910"),
    "llm_67b": ("67.425", "67.425"),
    "moe_2b": ("2.0", "0.3"),
    "moe_16b": ("16.376", "2.829"),
    "moe_145b": ("144.6", "22.2"),
    "v2": ("235.74", "21.38"),
    "v2_lite": ("15.71", None),
    "v3": ("671.03", "37.55"),
    "r1_distill_qwen_1_5b": ("1.777", "1.777"),
    "r1_distill_qwen_7b": ("7.616", "7.616"),
    "r1_distill_qwen_14b": ("14.77", "14.77"),
    "r1_distill_qwen_32b": ("32.76", "32.76"),
    "r1_distill_llama_8b": ("8.030", "8.030"),
    "r1_distill_llama_70b": ("70.55", "70.55"),
}
CACHE_VALUES = {
    "llm_7b": 245760,
    "llm_67b": 194560,
    "v2": 34560,
    "v2_lite": 15552,
    "v3": 35136,
}


def billions(number: int, like: str) -> str:
    """`number` rounded to as many digits as `like` has."""
    return f"{number / 1e9:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name):
    counted = count(models.get(name))
    total, active = TOTALS[name]
    assert billions(counted.parameters, total) == total
    if active:
        assert billions(counted.active, active) == active


def test_every_published_model_is_pinned():
    assert {model().name for model in models.PUBLISHED} == TOTALS.keys()


def test_active_without_lookup():
    assert billions(count(models.v2_lite()).active_without_lookup, "2.45") == "2.45"
    v3 = count(models.v3())
    assert v3.active - v3.active_without_lookup == 129280 * 7168


def test_v3_mtp_is_counted_apart():
    v3 = count(models.v3())
    without = count(dataclasses.replace(models.v3(), mtp=False))
    assert billions(v3.mtp_parameters, "11.6") == "11.6"
    assert without.mtp_parameters == 0
    assert without.parameters == v3.parameters
    assert without.active == v3.active


@pytest.mark.parametrize("name", CACHE_VALUES)
def test_cache_values(name):
    assert count(models.get(name)).cache_bytes == 2 * CACHE_VALUES[name]


def test_cache_with_latents_in_fp8():
    assert count(models.v3()).cache_bytes_fp8 == 61 * (512 + 4 + 2 * 64)
    assert count(models.llm_67b()).cache_bytes_fp8 is None


def test_cache_against_mha_and_gqa():
    v3 = count(models.v3())
    assert v3.cache_bytes_mha == 2 * 2 * 128 * 128 * 61
    assert v3.cache_bytes_gqa == 2 * 2 * 8 * 128 * 61
    llm = count(models.llm_67b())
    assert llm.cache_bytes == llm.cache_bytes_gqa  # it has 8 groups itself
    assert llm.cache_bytes_mha == 8 * llm.cache_bytes


def test_training_flops_of_the_moe_paper():
    """DeepSeekMoE, table 1: 4.3T for 2K tokens of the 2B model, forward and backward."""
    counted = count(models.moe_2b(), context=2048)
    assert f"{3 * counted.flops * 2048 / 1e12:.1f}" == "4.3"


def test_attention_flops_by_hand():
    llm = count(models.llm_7b(), context=10)
    assert llm.attention_flops == 30 * 32 * (128 + 128) * 2 * 10
    v3 = count(models.v3(), context=10)
    assert v3.attention_flops == 61 * 128 * (192 + 128) * 2 * 10
    assert count(models.v3()).context == 4096
    assert count(models.moe_2b()).context == 2048


def test_matmul_flops_by_hand():
    """V3's weights, layer by layer, without norms and biases."""
    attention = (
        7168 * 1536  # queries down
        + 1536 * 128 * 192  # and up
        + 7168 * 576  # latent and rotary key
        + 512 * 128 * 256  # keys and values up
        + 128 * 128 * 7168  # output
    )
    dense, moe = 3 * 7168 * 18432, 3 * 7168 * 2048 * (8 + 1) + 7168 * 256
    weights = 61 * attention + 3 * dense + 58 * moe + 129280 * 7168
    assert count(models.v3()).matmul_flops == 2 * weights


def test_a_tied_embedding_is_looked_up_and_multiplied():
    untied = models.tiny_llm_7b()
    tied = dataclasses.replace(untied, tied_embeddings=True)
    embedding = untied.vocab_size * untied.d_model
    assert count(tied).parameters == count(untied).parameters - embedding
    assert count(tied).matmul_flops == count(untied).matmul_flops


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_moe_2b", "tiny_r1_distill_qwen_7b"])
def test_counts_are_those_of_the_arrays(name):
    config = models.get(name)
    counted = count(config)
    model = Transformer(config, rngs=nnx.Rngs(0))
    arrays = jax.tree.leaves(nnx.state(model))
    assert counted.parameters + counted.mtp_parameters == sum(map(np.size, arrays))


def test_json_and_table(capsys):
    assert main(["inspect", "v3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == count(models.v3()).as_dict()
    assert main(["inspect", "DeepSeek-V3"]) == 2
    assert main(["inspect", "v3"]) == 0
    out = capsys.readouterr().out
    assert out.strip() == table(models.v3(), count(models.v3()))
    for text in ("671.026 B", "37.552 B", "70,272", "56.9 x", "8 of 256 experts"):
        assert text in out


def test_context_changes_attention_alone():
    short, long = count(models.v3(), context=1000), count(models.v3(), context=2000)
    assert long.attention_flops == 2 * short.attention_flops
    assert long.matmul_flops == short.matmul_flops


V2_LITE = {  # as published, less what says nothing about the architecture
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def test_a_published_directory_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V2_LITE))
    found = find(str(tmp_path))
    assert dataclasses.replace(found, name="v2_lite") == models.v2_lite()


def test_a_directory_of_ours(tmp_path):
    description = Description(config=models.tiny_v3(), dtype="float32")
    config_json.write(epath.Path(tmp_path), description)
    assert find(str(tmp_path)) == models.tiny_v3()


def test_a_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        find(str(tmp_path))


@pytest.mark.parametrize("target", ["nothing/here", "v4"])
def test_unknown_target(target):
    with pytest.raises(UserError, match=target):
        find(target)
