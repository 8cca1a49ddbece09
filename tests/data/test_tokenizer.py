"""The tokenizer: BOS exactly as configured, streaming, chat, and transformers' view."""

# ruff: noqa: RUF001

import json
import random

import pytest

from dsjax.data.tokenizer import BOS, EOS, Tokenizer, train_bpe
from dsjax.errors import UserError

TEXTS = [f"def f{n}(x):\n    return x + {n}  # naïve café ✓\n" for n in range(200)]
HARD = "  tabs\t\tand 12345 digits\r\n\n\n日本語 🙂🙃 \x00 é́ ｜▁ <think>" + "x" * 50


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, vocab_size=400).save(directory)
    return directory


@pytest.fixture
def tokenizer(directory):
    return Tokenizer.load(directory)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_any_text_survives(tokenizer):
    ids = tokenizer.encode(HARD)
    assert ids[0] == tokenizer.bos_id == 0
    assert tokenizer.decode(ids) == HARD
    assert max(ids) < tokenizer.vocab_size <= 400


def test_digits_are_split_one_by_one(tokenizer):
    assert len(tokenizer.encode("1234567")) == 1 + 7


def test_no_directory_no_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("post_processor", ["template", "none"])
@pytest.mark.parametrize("add_bos_token", [True, False, None])
@pytest.mark.parametrize("as_dict", [True, False])
def test_bos_is_added_as_configured(
    directory, tmp_path, post_processor, add_bos_token, as_dict
):
    """add_bos_token rules; without it, what tokenizer.json does is left alone."""
    Tokenizer.load(directory).save(tmp_path)
    if post_processor == "none":
        edit(tmp_path / "tokenizer.json", post_processor=None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["add_bos_token"], config["add_eos_token"]
    if add_bos_token is not None:
        config["add_bos_token"] = add_bos_token
    config["bos_token"] = {"content": BOS, "lstrip": False} if as_dict else BOS
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    expected = add_bos_token
    if add_bos_token is None:
        expected = post_processor == "template"
    assert tokenizer.encode("def f").count(tokenizer.bos_id) == expected
    assert tokenizer.encode(BOS + "def f").count(tokenizer.bos_id) == 1, "never twice"


def test_tokenizes_as_transformers_does(directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.load(directory)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "1+1?"},
    ]
    for text in [HARD, *TEXTS[:5]]:
        assert ours.encode(text) == theirs.encode(text)
    rendered = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ours.chat(messages) == rendered
    tokenized = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert ours.encode(rendered) == tokenized["input_ids"]


@pytest.mark.parametrize(
    ("eos", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, (1,))]
)
def test_eos_ids_come_from_the_generation_config(directory, tmp_path, eos, expected):
    Tokenizer.load(directory).save(tmp_path)
    edit(tmp_path / "generation_config.json", eos_token_id=eos)
    assert Tokenizer.load(tmp_path).eos_ids == expected


def test_chat_is_v3s_format(tokenizer):
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.chat(conversation) == (
        f"{BOS}<｜User｜>Hi<｜Assistant｜>Hello{EOS}<｜User｜>Bye<｜Assistant｜>"
    )
    assert tokenizer.chat(conversation[:1], add_generation_prompt=False).endswith("Hi")


def test_chat_template_errors_are_the_users(tokenizer):
    with pytest.raises(UserError, match="unknown role robot"):
        tokenizer.chat([{"role": "robot", "content": "beep"}])
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(UserError, match="unsafe"):
        tokenizer.chat([])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.chat([])


def test_streaming_never_splits_a_character(tokenizer):
    text = HARD * 20
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.step(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == text


def test_streaming_random_bytes_equals_decoding_at_once(tokenizer):
    rng = random.Random(0)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(500)] + [7 + 0xC3]
    stream = tokenizer.stream()
    text = "".join(stream.step(token) for token in ids) + stream.flush()
    assert text == tokenizer.decode(ids)


def test_broken_files_are_named(directory, tmp_path):
    Tokenizer.load(directory).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="vocab_size=100"):
        train_bpe(TEXTS, vocab_size=100)
