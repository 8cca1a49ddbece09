"""The commands that work on checkpoints, one after the other, on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest

import dsjax
from dsjax import cli
from dsjax.data.tokenizer import train_bpe
from dsjax.nn.transformer import Transformer

TEXT = "def greet(name):\n    return 'grüß dich, ' + name\n" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model` as save writes it; then what export and convert make of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = Transformer.create(dsjax.models.tiny_llm_67b(), seed=1)
    model.tokenizer = train_bpe([TEXT], vocab_size=300)
    dsjax.save(model, folder / "model")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    assert cli.main(["export", f"{folder}/model", f"{folder}/hf"]) == 0
    assert cli.main(["convert", f"{folder}/hf", f"{folder}/again"]) == 0
    return folder


def out(capsys, *args: str) -> str:
    capsys.readouterr()
    assert cli.main([*args]) == 0
    return capsys.readouterr().out


FORMS = ["model", "hf", "again"]


def test_every_form_holds_the_same_model(folder):
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    first, *others = (dsjax.load(folder / form)(tokens) for form in FORMS)
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("form", FORMS)
def test_inspect(folder, capsys, form):
    counted = json.loads(out(capsys, "inspect", f"{folder}/{form}", "--json"))
    named = json.loads(out(capsys, "inspect", "tiny_llm_67b", "--json"))
    assert counted | {"name": ""} == named | {"name": ""}


def test_eval_is_the_same_for_every_form(folder, capsys):
    data = ("--task", "perplexity", "--data", f"{folder}/text.txt", "--json")
    results = [
        json.loads(out(capsys, "eval", f"{folder}/{form}", *data)) for form in FORMS
    ]
    assert results[0] == results[1] == results[2]
    assert results[0]["bytes"] == len(TEXT.encode())
    assert results[0]["documents"] == 1
    assert 0 < results[0]["bits_per_byte"] < 8


def test_eval_for_a_reader(folder, capsys):
    printed = out(
        capsys,
        *("eval", f"{folder}/model", "--task", "perplexity", "--batch", "1"),
        *("--length", "32", "--stride", "16", "--data", f"{folder}/text.txt"),
    )
    assert "bits/byte" in printed
    assert len(printed.splitlines()) == 7


def test_generate(folder, capsys):
    prompt = ("--prompt", "def ", "--max-new-tokens", "8")
    greedy = out(capsys, "generate", f"{folder}/model", *prompt)
    assert greedy == out(capsys, "generate", f"{folder}/hf", *prompt)
    (text,) = dsjax.generate(
        dsjax.load(folder / "model"), ["def "], max_new_tokens=8, temperature=0.0
    )
    assert text in greedy


def test_generate_follows_its_seed(folder, capsys):
    first, again, other = (
        out(
            capsys,
            *("generate", f"{folder}/model", "--prompt", "def ", "--seed", seed),
            *("--temperature", "1", "--top-p", "0.9", "--max-new-tokens", "16"),
        )
        for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_generate_in_the_chat_format(folder, capsys):
    chat = ("--chat", "--system", "Be brief.", "--max-new-tokens", "8")
    printed = out(capsys, "generate", f"{folder}/model", "--prompt", "greet", *chat)
    model = dsjax.load(folder / "model")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "greet"},
    ]
    prompt = model.tokenizer.chat(messages)
    text = dsjax.generate(model, prompt, max_new_tokens=8)
    assert printed == text + "\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("convert", "{0}/hf", "{0}/model"), "exists"),
        (("export", "{0}/model", "{0}/hf"), "exists"),
        (("convert", "{0}/nothing", "{0}/new"), "nothing"),
        (("export", "{0}/hf", "{0}/new"), "hf"),
        (("inspect", "{0}/nothing"), "nothing"),
        (("generate", "{0}/nothing", "--prompt", "x"), "nothing"),
        (("generate", "{0}/model", "--prompt", "x", "--mesh", "fsdp=1024"), "1024"),
        (("generate", "{0}/model", "--prompt", "x", "--temperature", "-1"), "-1"),
        (("generate", "{0}/model", "--prompt", "x", "--top-p", "2"), "2"),
        (("generate", "{0}/model", "--prompt", "x", "--system", "y"), "needs chat"),
        (
            ("eval", "{0}/model", "--task", "perplexity", "--data", "{0}/none.txt"),
            "none.txt: No such file",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_mistakes_are_one_line_and_leave_nothing(folder, capsys, args, words):
    capsys.readouterr()
    assert cli.main([arg.format(folder) for arg in args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.startswith("dsjax: ")
    assert printed.err.count("\n") == 1
    assert not (folder / "new").exists()
    assert not list(folder.glob("*.partial"))
