"""convert then export gives the same bytes back, for every architecture."""

import json
import logging

import numpy as np
import published
import pytest
from safetensors.numpy import load_file

from dsjax.checkpoint import convert, export


def read(directory) -> dict[str, np.ndarray]:
    """All tensors of a directory, by the safetensors library."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(found: dict, expected: dict) -> None:
    """The same names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def there_and_back(source, **options):
    """The directory that export makes of what convert made."""
    orbax, out = source.parent / "orbax", source.parent / "out"
    convert(source, orbax, progress=False)
    export(orbax, out, progress=False, **options)
    return out


@pytest.mark.parametrize("dtype", [published.BF16, published.F32], ids=str)
@pytest.mark.parametrize("kind", published.KINDS)
def test_bit_identical(tmp_path, kind, dtype):
    source = published.make(tmp_path / "hf", kind, dtype=dtype)
    out = there_and_back(source)
    assert_same(read(out), read(source))
    before = json.loads((source / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after | {"torch_dtype": 0, "dtype": 0} == before | {
        "torch_dtype": 0,
        "dtype": 0,
    }
    assert after["torch_dtype"] == after["dtype"] == dtype.name


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"n_shared_experts": None},
    ],
    ids=str,
)
def test_variants_of_v2(tmp_path, changes):
    if changes.get("n_shared_experts", 1) is None:
        values = published.config("deepseek_v2", n_shared_experts=0)
        weights = published.tensors(values)
        weights = {n: w for n, w in weights.items() if "shared_experts" not in n}
        source = published.write(tmp_path / "hf", values, weights)
    else:
        source = published.make(tmp_path / "hf", "deepseek_v2", **changes)
    assert_same(read(there_and_back(source)), read(source))


@pytest.mark.parametrize("block", [(16, 32), (128, 128), (5, 7)])
def test_fp8_blocks_become_bf16(tmp_path, block):
    """Sizes that the block does not divide; scales in other shards than the weights."""
    values = published.config(
        "deepseek_v3",
        quantization_config={"quant_method": "fp8", "weight_block_size": list(block)},
    )
    weights = published.quantise(published.tensors(values), block)
    source = published.write(tmp_path / "hf", values, weights, shards=3)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    scaled = [name for name in places if name.endswith("_scale_inv")]
    assert any(places[n] != places[n.removesuffix("_scale_inv")] for n in scaled)
    out = there_and_back(source)
    assert_same(read(out), published.dequantise(weights, block))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_fp8_in_float32_is_not_rounded(tmp_path):
    block = (16, 32)
    values = published.config(
        "deepseek_v3",
        quantization_config={"quant_method": "fp8", "weight_block_size": list(block)},
    )
    weights = published.quantise(published.tensors(values), block)
    source = published.write(tmp_path / "hf", values, weights)
    convert(source, tmp_path / "orbax", dtype="float32", progress=False)
    export(tmp_path / "orbax", tmp_path / "out", progress=False)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    scale = np.kron(weights[f"{name}_scale_inv"], np.ones(block, np.float32))
    rows, columns = weights[name].shape
    expected = weights[name].astype(np.float32) * scale[:rows, :columns]
    np.testing.assert_array_equal(read(tmp_path / "out")[name], expected)


def test_mixed_dtypes_survive(tmp_path):
    """Float32 norms and bias beside bfloat16 weights keep their bits."""
    values = published.config("deepseek_v3")
    weights = {
        name: array.astype(np.float32) / 3 if "norm" in name else array
        for name, array in published.tensors(values).items()
    }
    source = published.write(tmp_path / "hf", values, weights)
    assert_same(read(there_and_back(source)), weights)


def test_shards_and_index(tmp_path):
    source = published.make(tmp_path / "hf", "deepseek_v2")
    out = there_and_back(source, shard_bytes=40_000)
    assert_same(read(out), read(source))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for file in files:
        for name in load_file(out / file):
            assert index["weight_map"][name] == file
    total = sum(array.nbytes for array in read(source).values())
    assert index["metadata"]["total_size"] == total
    again = tmp_path / "again"
    convert(out, again, progress=False)


def test_mtp_copies_are_optional_and_written_again(tmp_path):
    values = published.config("deepseek_v3")
    weights = published.tensors(values)
    copies = ("layers.3.embed_tokens.weight", "layers.3.shared_head.head.weight")
    without = {n: w for n, w in weights.items() if not n.endswith(copies)}
    assert len(without) == len(weights) - 2
    source = published.write(tmp_path / "hf", values, without)
    assert_same(read(there_and_back(source)), weights)


def test_v3_without_mtp_tensors_says_so(tmp_path, caplog):
    values = published.config("deepseek_v3")
    weights = {
        name: array
        for name, array in published.tensors(values).items()
        if not name.startswith("model.layers.3.")
    }
    source = published.write(tmp_path / "hf", values, weights)
    with caplog.at_level(logging.INFO, "dsjax"):
        out = there_and_back(source)
    assert sum("without MTP" in record.message for record in caplog.records) == 1
    assert_same(read(out), weights)
    assert (
        json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    )


@pytest.mark.parametrize("repeated", [False, True])
def test_tied_embeddings(tmp_path, repeated):
    values = published.config("qwen2", tie_word_embeddings=True)
    weights = published.tensors(values)
    assert "lm_head.weight" not in weights
    stored = dict(weights)
    if repeated:
        stored["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source = published.write(tmp_path / "hf", values, stored)
    assert_same(read(there_and_back(source)), weights)


def test_old_rotary_buffers_are_ignored(tmp_path):
    values = published.config("llama")
    weights = published.tensors(values)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    source = published.write(tmp_path / "hf", values, weights | buffer)
    assert_same(read(there_and_back(source)), weights)


def test_tokenizer_and_templates_travel(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    texts = {
        "tokenizer.json": '{"version": "1.0"}',
        "tokenizer_config.json": "{}",
        "special_tokens_map.json": "{}",
        "generation_config.json": '{"temperature": 0.6}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    out = there_and_back(source)
    for name, text in texts.items():
        assert (out / name).read_text() == text
    assert not list(out.glob("begun*")) and not list(tmp_path.glob("*.partial"))


def test_dtype_option(tmp_path):
    """Weights are cast on request; the selection bias keeps its float32."""
    source = published.make(tmp_path / "hf", "deepseek_v3", dtype=published.F32)
    convert(source, tmp_path / "orbax", progress=False)
    export(tmp_path / "orbax", tmp_path / "out", dtype="bfloat16", progress=False)
    found, before = read(tmp_path / "out"), read(source)
    for name, array in before.items():
        kept = name.endswith("e_score_correction_bias")
        expected = array if kept else array.astype(published.BF16)
        assert found[name].tobytes() == expected.tobytes(), name
