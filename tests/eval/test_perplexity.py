"""Perplexity against a plain recomputation: every token once, every byte counted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax import models
from dsjax.data.tokenizer import Tokenizer, train_bpe
from dsjax.errors import UserError
from dsjax.eval import perplexity
from dsjax.nn.transformer import Transformer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "größer als π — ein Satz mit Umlauten, dreimal so lang wie die anderen Texte hier.",
    "",
    "x",
    "import os\nimport sys\n\nprint(os.path.join(*sys.argv[1:]))\n" * 3,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    config = dataclasses.replace(models.tiny_llm_7b(), init_std=0.15)
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.tokenizer = tokenizer
    return model


def evaluate(model, texts, **options):
    return perplexity.evaluate(model, texts, progress=False, **options)


def log_probabilities(model, ids: list[int]) -> np.ndarray:
    """log p of each token after the first, in float64 from the model's logits."""
    logits = np.asarray(model(jnp.array([ids[:-1]])), np.float64)[0]
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


def test_whole_documents_by_hand(model, tokenizer):
    documents = [tokenizer.encode(text) for text in TEXTS]
    assert all(ids[0] == tokenizer.bos_id for ids in documents)
    nats = -sum(log_probabilities(model, ids).sum() for ids in documents if ids[1:])
    result = evaluate(model, TEXTS)
    tokens = sum(len(ids) - 1 for ids in documents)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (result.tokens, result.bytes, result.documents) == (tokens, size, 5)
    assert size > sum(map(len, TEXTS))  # umlauts are two bytes each
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.nats_per_token == pytest.approx(nats / tokens, rel=1e-6)
    assert result.nats_per_byte == pytest.approx(nats / size, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (16, 16), (20, 7), (5, 1)])
def test_windows_by_hand(model, tokenizer, length, stride):
    """The same sum from a loop over tokens: which window is the first to hold each?"""
    nats = 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for target in range(1, len(ids)):
            window = max(0, math.ceil((target - length) / stride))
            context = ids[window * stride : target + 1]
            assert len(context) > min(target, length - stride)
            padded = context + [0] * (length + 1 - len(context))
            nats -= log_probabilities(model, padded)[len(context) - 2]
    result = evaluate(model, TEXTS, length=length, stride=stride)
    assert result.nats == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (2, 1), (7, 3), (64, 64)])
@pytest.mark.parametrize("size", [1, 2, 6, 7, 8, 64, 65, 130])
def test_every_token_is_scored_once(size, length, stride):
    ids = list(range(100, 100 + size))
    scored = []
    for window in perplexity._windows(ids, length, stride):
        assert 1 <= len(window.ids) - 1 <= length
        scored += window.ids[window.skip + 1 :]
    assert scored == ids[1:]


def test_batch_size_does_not_matter(tokenizer):
    """Nor do the padding and the other rows, to a mixture of experts."""
    config = dataclasses.replace(models.tiny_moe_2b(), init_std=0.15)
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.tokenizer = tokenizer
    one, many = (evaluate(model, TEXTS, length=16, batch=batch) for batch in (1, 7))
    assert one.nats == pytest.approx(many.nats, rel=1e-6)
    assert one.tokens == many.tokens


def test_one_shape_is_compiled(model):
    perplexity._losses.clear_cache()
    evaluate(model, TEXTS, length=16, batch=3)
    evaluate(model, TEXTS[:2], length=16, batch=3)
    assert perplexity._losses._cache_size() == 1


@pytest.mark.parametrize("chunk", [3, 16, 1000])
def test_chunks_of_logits_do_not_matter(model, monkeypatch, chunk):
    whole = evaluate(model, TEXTS)
    monkeypatch.setattr(perplexity, "CHUNK", chunk)
    perplexity._losses.clear_cache()
    assert evaluate(model, TEXTS).nats == pytest.approx(whole.nats, rel=1e-6)
    perplexity._losses.clear_cache()


def test_logits_exist_for_one_chunk_at_a_time(model):
    """The largest float32 array with a vocabulary has CHUNK positions, not T."""
    graph, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((2, 4 * perplexity.CHUNK), np.int32)
    with jax.set_mesh(model.mesh):
        text = perplexity._losses.lower(graph, state, tokens, tokens).as_text()
    vocabulary, chunk = model.config.vocab_size, perplexity.CHUNK
    assert f"tensor<2x{chunk}x{vocabulary}xf32>" in text
    assert f"tensor<2x{4 * chunk}x{vocabulary}xf32>" not in text


def test_a_uniform_model_pays_log_vocabulary(model, tokenizer):
    flat = Transformer(model.config, rngs=nnx.Rngs(0))
    flat.head_VD[...] = 0 * flat.head_VD[...]
    flat.tokenizer = tokenizer
    result = evaluate(flat, TEXTS, length=16)
    assert result.nats_per_token == pytest.approx(math.log(512), rel=1e-6)
    assert result.perplexity == pytest.approx(512, rel=1e-5)


class WithoutStart:
    """A tokenizer that adds nothing in front, and has no begin-of-sequence token."""

    bos_id, eos_ids = None, (1,)

    def encode_batch(self, texts):
        return [[10 + ord(c) % 50 for c in text] for text in texts]


def test_the_end_token_starts_where_there_is_no_other(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", WithoutStart())
    result = evaluate(model, ["abc"])
    ids = [1, *WithoutStart().encode_batch(["abc"])[0]]
    assert result.tokens == result.bytes == 3
    assert result.nats == pytest.approx(-log_probabilities(model, ids).sum(), rel=1e-6)


def test_mistakes_are_named(model, monkeypatch):
    with pytest.raises(UserError, match="no text"):
        evaluate(model, ["", ""])
    with pytest.raises(UserError, match=r"length=4096 must be from 1 to .* 2048"):
        evaluate(model, TEXTS, length=4096)
    with pytest.raises(UserError, match="stride=9 must be from 1 to length=8"):
        evaluate(model, TEXTS, length=8, stride=9)
    monkeypatch.setattr(WithoutStart, "eos_ids", ())
    monkeypatch.setattr(model, "tokenizer", WithoutStart())
    with pytest.raises(UserError, match="no token that could start"):
        evaluate(model, TEXTS)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate(model, TEXTS)


def test_read(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_bytes("größer\r\n".encode())
    bad.write_bytes(b"ok\xff")
    assert perplexity.read([good]) == ["größer\r\n"]
    with pytest.raises(UserError, match=r"bad\.txt: not UTF-8 at byte 2"):
        perplexity.read([good, bad])
    with pytest.raises(FileNotFoundError):
        perplexity.read([tmp_path / "none.txt"])
