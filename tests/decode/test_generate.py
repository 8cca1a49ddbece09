"""Generation: the same tokens as the full forward, row by row, and its limits."""

import numpy as np
import pytest

import dsjax
from dsjax.data.tokenizer import train_bpe
from dsjax.decode import engine
from dsjax.decode.generate import stream
from dsjax.errors import UserError
from tests.support import random_model

PROMPTS = [[1, 2, 3, 4], [5], list(range(20)), [9, 10, 11]]
KINDS = ["tiny_v3", "tiny_r1_distill_qwen_7b"]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def text_model():
    model = random_model("tiny_moe_16b")
    model.tokenizer = train_bpe(["def f(x): return x + 1\n"] * 50, vocab_size=300)
    return model


def test_greedy_equals_the_full_forward(model):
    """Unequal prompts in one batch; each token is the argmax of an uncached run."""
    generated = dsjax.generate(model, PROMPTS, max_new_tokens=10)
    length = max(map(len, PROMPTS)) + 10
    rows = [p + new for p, new in zip(PROMPTS, generated)]
    padded = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    best = np.asarray(model(padded)).argmax(axis=-1)
    for row, prompt, new in zip(best, PROMPTS, generated):
        assert row[len(prompt) - 1 : len(prompt) + 9].tolist() == new


def test_batch_equals_one_by_one(model):
    together = dsjax.generate(model, PROMPTS, max_new_tokens=10)
    assert together == [
        dsjax.generate(model, [p], max_new_tokens=10)[0] for p in PROMPTS
    ]


def test_fp8_latents_or_an_error():
    """The first token is the prefill's; some of the others may differ by rounding."""
    model = random_model("tiny_v3")
    wide = dsjax.generate(model, PROMPTS, max_new_tokens=10)
    fp8 = dsjax.generate(model, PROMPTS, max_new_tokens=10, cache_dtype="float8_e4m3fn")
    assert [len(row) for row in fp8] == [10] * 4
    assert [row[0] for row in fp8] == [row[0] for row in wide]
    model = random_model("tiny_moe_16b")
    with pytest.raises(UserError, match="no latents to keep in float8_e4m3fn"):
        dsjax.generate(model, PROMPTS, max_new_tokens=2, cache_dtype="float8_e4m3fn")


def test_stops_at_stop_ids(model):
    free = dsjax.generate(model, PROMPTS, max_new_tokens=10)
    stop = free[0][4]
    stopped = dsjax.generate(model, PROMPTS, max_new_tokens=10, stop_ids=[stop])
    assert stopped == [new[: new.index(stop)] if stop in new else new for new in free]
    assert len(stopped[0]) == free[0].index(stop) < 10


def test_seed_decides_and_settings_do_not_recompile(model):
    def sample(**options):
        return dsjax.generate(model, PROMPTS, max_new_tokens=10, **options)

    hot = sample(temperature=1.0, seed=1)
    compiled = engine._run._cache_size()
    assert hot == sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    sample(temperature=0.7, top_p=0.9, top_k=7)
    dsjax.generate(model, [[*p, 3] for p in PROMPTS], max_new_tokens=12)
    assert engine._run._cache_size() == compiled


def test_sharded_samples_the_same(model):
    name = model.config.name
    sharded = random_model(name, data=2, fsdp=1, expert=2, tensor=2)
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    expected = dsjax.generate(model, PROMPTS, **options)
    assert dsjax.generate(sharded, PROMPTS, **options) == expected


def test_text(text_model):
    (text,) = dsjax.generate(text_model, ["def f"], max_new_tokens=20)
    assert isinstance(text, str) and text
    assert dsjax.generate(text_model, "def f", max_new_tokens=20) == text
    assert "".join(stream(text_model, "def f", max_new_tokens=20)) == text


def test_stream_comes_in_pieces(text_model):
    assert len(list(stream(text_model, "def f", max_new_tokens=20))) > 2


def test_chat_uses_the_template(text_model):
    prompt = text_model.tokenizer.chat([{"role": "user", "content": "def f"}])
    expected = dsjax.generate(text_model, [text_model.tokenizer.encode(prompt)])
    reply = "".join(stream(text_model, "def f", chat=True))
    assert reply == text_model.tokenizer.decode(expected[0])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["text"], {}, "no tokenizer"),
        ([[1, 512]], {}, "token 512 is outside the vocabulary of 512"),
        ([[]], {}, "empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1] * 100], {"max_new_tokens": 2000}, "max_length=2048"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5"),
    ],
)
def test_bad_input_is_one_clear_line(model, prompts, options, message):
    with pytest.raises(dsjax.UserError, match=message) as caught:
        dsjax.generate(model, prompts, **options)
    assert "\n" not in str(caught.value)


def test_no_prompts_no_texts(model):
    assert dsjax.generate(model, []) == []
