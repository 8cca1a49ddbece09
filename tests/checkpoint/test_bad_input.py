"""Bad input: one clear line that names the culprit, and nothing written."""

import json

import numpy as np
import published
import pytest

from dsjax.checkpoint import convert, export, load
from dsjax.errors import UserError

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
INDEX = "model.safetensors.index.json"


def refused(source, *words: str) -> None:
    """convert and load raise one line with these words, and leave nothing behind."""
    for action in (
        lambda: convert(source, source.parent / "out"),
        lambda: load(source),
    ):
        with pytest.raises(UserError) as error:
            action()
        message = str(error.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def with_weights(tmp_path, change, *, kind="deepseek_v3", shards=2, **config):
    values = published.config(kind, **config)
    weights = published.tensors(values)
    change(weights)
    return published.write(tmp_path / "hf", values, weights, shards=shards)


def test_missing_tensor(tmp_path):
    source = with_weights(tmp_path, lambda weights: weights.pop(EXPERT))
    refused(source, "missing tensor", EXPERT)


def test_missing_mtp_tensor(tmp_path):
    name = "model.layers.3.eh_proj.weight"
    source = with_weights(tmp_path, lambda weights: weights.pop(name))
    refused(source, "missing tensor", name)


def test_extra_tensor(tmp_path):
    name = "model.layers.0.self_attn.q_norm.weight"
    change = {name: np.zeros(4, np.float32)}
    source = with_weights(tmp_path, lambda weights: weights.update(change))
    refused(source, "does not have", name)


def test_wrong_shape(tmp_path):
    change = {EXPERT: np.zeros((24, 47), published.BF16)}
    source = with_weights(tmp_path, lambda weights: weights.update(change))
    refused(source, EXPERT, "[24, 47]", "[24, 48]")


def test_wrong_dtype(tmp_path):
    change = {EXPERT: np.zeros((24, 48), np.int8)}
    source = with_weights(tmp_path, lambda weights: weights.update(change))
    refused(source, EXPERT, "I8")


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_shard(tmp_path, cut):
    source = published.make(tmp_path / "hf", "deepseek_v3")
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-cut])
    refused(source, shard.name, "truncated")


def test_missing_shard(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_unreadable_header(tmp_path, kept):
    source = published.make(tmp_path / "hf", "llama")
    shard = source / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    refused(source, shard.name, "header")


def test_header_that_is_no_json(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    shard = source / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[8] = ord("[")
    shard.write_bytes(content)
    refused(source, shard.name, "header")


def test_missing_index_entry(tmp_path):
    source = published.make(tmp_path / "hf", "deepseek_v3")
    index = json.loads((source / INDEX).read_text())
    del index["weight_map"][EXPERT]
    (source / INDEX).write_text(json.dumps(index))
    refused(source, INDEX, "no entry", EXPERT)


def test_index_names_the_wrong_shard(tmp_path):
    source = published.make(tmp_path / "hf", "deepseek_v3")
    index = json.loads((source / INDEX).read_text())
    places = index["weight_map"]
    other = next(file for file in places.values() if file != places[EXPERT])
    places[EXPERT] = other
    (source / INDEX).write_text(json.dumps(index))
    refused(source, INDEX, other, EXPERT)


def test_no_index(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    (source / INDEX).unlink()
    refused(source, "no " + INDEX)


def quantised(tmp_path, change, **config):
    block = (16, 32)
    known = {"quant_method": "fp8", "weight_block_size": list(block)}
    values = published.config("deepseek_v3", quantization_config=known | config)
    weights = published.quantise(published.tensors(values), block)
    change(weights)
    return published.write(tmp_path / "hf", values, weights, shards=2)


def test_missing_scale(tmp_path):
    name = f"{EXPERT}_scale_inv"
    source = quantised(tmp_path, lambda weights: weights.pop(name))
    refused(source, "missing scale tensor", name)


def test_scale_of_another_block_size(tmp_path):
    change = {f"{EXPERT}_scale_inv": np.ones((1, 1), np.float32)}
    source = quantised(tmp_path, lambda weights: weights.update(change))
    refused(source, f"{EXPERT}_scale_inv", "[1, 1]", "[2, 2]")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_other_quantisation(tmp_path, method):
    source = quantised(tmp_path, lambda _: None, quant_method=method)
    refused(source, "quant_method", method)


@pytest.mark.parametrize("block", [None, [0, 128], "128"], ids=str)
def test_broken_block_size(tmp_path, block):
    source = quantised(tmp_path, lambda _: None, weight_block_size=block)
    refused(source, "weight_block_size")


def test_fp8_without_a_quantisation_config(tmp_path):
    source = quantised(tmp_path, lambda _: None)
    values = json.loads((source / "config.json").read_text())
    del values["quantization_config"]
    (source / "config.json").write_text(json.dumps(values))
    refused(source, "weight_block_size")


@pytest.mark.parametrize("kind", ["gemma3", None])
def test_unknown_model_type(tmp_path, kind):
    source = published.make(tmp_path / "hf", "llama")
    values = json.loads((source / "config.json").read_text()) | {"model_type": kind}
    (source / "config.json").write_text(json.dumps(values))
    refused(source, "unknown model_type", *published.KINDS)


def test_bin_shards(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    for file in source.glob("*.safetensors*"):
        file.unlink()
    (source / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    refused(source, ".bin", "convert them to safetensors")


def test_no_weights(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    for file in source.glob("*.safetensors*"):
        file.unlink()
    refused(source, "model.safetensors")


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_no_config(tmp_path, text):
    source = published.make(tmp_path / "hf", "llama")
    (source / "config.json").unlink()
    if text is not None:
        (source / "config.json").write_text(text)
    refused(source, "config.json")


def test_no_directory(tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="nowhere"):
        load(tmp_path / "here" / "nowhere")


def test_differing_copies(tmp_path):
    name = "model.layers.3.embed_tokens.weight"
    change = {name: np.zeros((96, 48), published.BF16)}
    source = with_weights(tmp_path, lambda weights: weights.update(change))
    refused(source, name, "model.embed_tokens.weight", "differs")


def test_differing_tied_head(tmp_path):
    change = {"lm_head.weight": np.zeros((96, 48), published.BF16)}
    source = with_weights(
        tmp_path,
        lambda weights: weights.update(change),
        kind="qwen2",
        tie_word_embeddings=True,
    )
    refused(source, "lm_head.weight", "differs")


def test_output_exists(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(UserError, match="exists"):
        convert(source, out)
    convert(source, tmp_path / "orbax", progress=False)
    with pytest.raises(UserError, match="exists"):
        export(tmp_path / "orbax", out)
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert not list(tmp_path.glob("*.partial"))


def test_too_little_space(tmp_path, monkeypatch):
    source = published.make(tmp_path / "hf", "llama")
    convert(source, tmp_path / "orbax", progress=False)

    def nearly_full(path):
        return type("Usage", (), {"free": 1000})

    monkeypatch.setattr("dsjax.checkpoint.work.shutil.disk_usage", nearly_full)
    for action, form in ((convert, "hf"), (export, "orbax")):
        with pytest.raises(UserError, match="are needed"):
            action(tmp_path / form, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), ValueError("No space left on device")]
)
def test_disk_that_fills(tmp_path, monkeypatch, error):
    """One line; nothing at OUT; the same command goes on once there is room."""
    source = published.make(tmp_path / "hf", "llama")
    from dsjax.checkpoint import orbax

    write, count = orbax.Array.write, iter(range(100))

    def failing(self, region, values):
        if next(count) > 5:
            raise error
        write(self, region, values)

    monkeypatch.setattr(orbax.Array, "write", failing)
    with pytest.raises(UserError, match="disk is full") as told:
        convert(source, tmp_path / "out", progress=False)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(orbax.Array, "write", write)
    convert(source, tmp_path / "out", progress=False)
    assert (tmp_path / "out").exists()


def test_partial_of_other_work(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("kept")
    with pytest.raises(UserError, match="other work"):
        convert(source, tmp_path / "out", progress=False)
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


def test_damaged_orbax_directory(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    convert(source, tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["model"]["vocab_size"] = 97
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for action in (load, lambda path: export(path, tmp_path / "hf2")):
        with pytest.raises(UserError, match=r"\[96, 48\], expected \[97, 48\]"):
            action(tmp_path / "out")
    (tmp_path / "out" / "params" / "_METADATA").unlink()
    with pytest.raises(UserError, match="not a whole checkpoint"):
        load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float8", "int8"])
def test_unknown_dtype(tmp_path, dtype):
    source = published.make(tmp_path / "hf", "llama")
    for action in (
        lambda: convert(source, tmp_path / "out", dtype=dtype),
        lambda: load(source, dtype=dtype),
    ):
        with pytest.raises(UserError, match=f"{dtype}.*bfloat16"):
            action()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_storage_that_refuses(tmp_path):
    """An output below a file: one line, not a traceback."""
    source = published.make(tmp_path / "hf", "llama")
    with pytest.raises(UserError, match="cannot go on"):
        convert(source, tmp_path / "hf" / "config.json" / "out", progress=False)
