"""How well a model predicts text: nats a token, bits a byte, perplexity.

Every token of every document is scored exactly once. The first one follows the model's
begin-of-sequence token (its end-of-sequence token if it has no other), so that all bytes
are paid for and results compare across tokenizers, and with compressors. A document
longer than the window is read in windows that overlap: a token that is not in the first
one has at least `length - stride` tokens before it.

Letters: B batch, T window length, C chunk of it, D model, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer

CHUNK = 128  # positions whose logits exist at once
DEFAULT_LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The negative log-likelihood `nats` of some documents, and what it is spread over.

    `bytes` are those of the documents in UTF-8; `tokens` are the model's.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def nats_per_token(self) -> float:
        """The cross-entropy loss that training reports."""
        return self.nats / self.tokens

    @property
    def nats_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """The same in bits: 8 is no compression at all."""
        return self.nats_per_byte / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nats a token); infinite where that is too large for a float."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    def as_dict(self) -> dict[str, float | int]:
        """Every number by its name, for JSON."""
        names = ("nats_per_token", "nats_per_byte", "bits_per_byte", "perplexity")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        """All of it, for a reader."""
        return (
            f"documents   {self.documents:,}\n"
            f"tokens      {self.tokens:,}\n"
            f"bytes       {self.bytes:,}\n"
            f"nats/token  {self.nats_per_token:.4f}\n"
            f"nats/byte   {self.nats_per_byte:.4f}\n"
            f"bits/byte   {self.bits_per_byte:.4f}\n"
            f"perplexity  {self.perplexity:.4f}"
        )


def read(files: Iterable[str | Path]) -> list[str]:
    """Each file as one document. Raises UserError for one that is not UTF-8."""
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 at byte {error.start}") from error
    return texts


def evaluate(
    model: Transformer,
    texts: Sequence[str],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch: int = 4,
    progress: bool = True,
) -> Perplexity:
    """Scores `texts`, each a document, with the model's own tokenizer.

    `length` is the window (2048 or the model's own, if shorter), `stride` how far the
    next one is (half of that), `batch` how many windows are computed at once. One shape
    is compiled. Raises UserError without a tokenizer, without text, and for windows that
    the model is too short for or that leave tokens out.
    """
    length, stride = _window(model, length, stride)
    documents = _encode(model.tokenizer, texts)
    tokens = sum(len(ids) - 1 for ids in documents)
    if not tokens:
        raise UserError("there is no text to evaluate")
    length = min(length, max(map(len, documents)) - 1)
    windows = (w for ids in documents for w in _windows(ids, length, stride))
    nats = 0.0
    hidden = None if progress else True  # None: where stderr is no terminal
    with tqdm(total=tokens, unit=" tokens", disable=hidden) as bar:
        while rows := list(islice(windows, batch)):
            scored = _score(model, rows, shape=(batch, length))
            nats += float(scored.sum())
            bar.update(scored.size)
    size = sum(len(text.encode("utf-8")) for text in texts)
    return Perplexity(nats=nats, tokens=tokens, bytes=size, documents=len(texts))


def _window(
    model: Transformer, length: int | None, stride: int | None
) -> tuple[int, int]:
    longest = model.config.max_length
    length = min(DEFAULT_LENGTH, longest) if length is None else length
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= length <= longest:
        raise UserError(f"length={length} must be from 1 to the model's {longest}")
    if not 1 <= stride <= length:
        raise UserError(f"stride={stride} must be from 1 to length={length}")
    return length, stride


def _encode(tokenizer: Tokenizer | None, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each document after exactly one start token."""
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer.json: it cannot read text")
    start = tokenizer.bos_id
    if start is None:
        if not tokenizer.eos_ids:
            raise UserError("the tokenizer has no token that could start a document")
        start = tokenizer.eos_ids[0]
    documents = tokenizer.encode_batch(texts)
    return [ids if ids[:1] == [start] else [start, *ids] for ids in documents]


@dataclass(frozen=True)
class _Window:
    """Some tokens of a document, of which those from `skip` + 1 on are scored here."""

    ids: list[int]
    skip: int


def _windows(ids: list[int], length: int, stride: int) -> Iterator[_Window]:
    """Windows of at most `length` inputs that score every token but the start once."""
    begin = done = 0
    while done < len(ids) - 1:
        end = min(begin + length, len(ids) - 1)
        yield _Window(ids[begin : end + 1], skip=done - begin)
        begin, done = begin + stride, end


def _score(
    model: Transformer, windows: Sequence[_Window], *, shape: tuple[int, int]
) -> np.ndarray:
    """-log p of all tokens that `windows` score, one after the other, float64."""
    inputs_BT, targets_BT = np.zeros((2, *shape), np.int32)
    scored_BT = np.zeros(shape, bool)
    for row, window in enumerate(windows):
        size = len(window.ids) - 1
        inputs_BT[row, :size] = window.ids[:-1]
        targets_BT[row, :size] = window.ids[1:]
        scored_BT[row, window.skip : size] = True
    graph, state = nnx.split(model)
    with jax.set_mesh(model.mesh):
        losses_BT = _losses(graph, state, inputs_BT, targets_BT)
    return np.asarray(losses_BT, np.float64)[scored_BT]


@jax.jit(static_argnums=0)
def _losses(
    graph: nnx.GraphDef,
    state: nnx.State,
    inputs_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """-log p(target) of every position, with the logits of few positions at a time."""
    model = nnx.merge(graph, state)
    hidden_BTD = model.forward(inputs_BT).hidden_BTD
    length = inputs_BT.shape[1]
    chunks = -(-length // CHUNK)

    def split(x: Array) -> Array:
        """[B, T, ...] -> [chunks, B, C, ...], padded at the end."""
        missing = chunks * -(-length // chunks) - length
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    def losses(part: tuple[Array, Array]) -> Float[Array, "B C"]:
        hidden_BCD, targets_BC = part
        logits_BCV = model.logits(hidden_BCD)
        chosen_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
        target_BC = jnp.where(chosen_BCV, logits_BCV, 0).sum(axis=-1)
        return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC

    parts = split(hidden_BTD), split(model.place(targets_BT))
    losses_BT = jnp.moveaxis(jax.lax.map(losses, parts), 0, 1)
    return losses_BT.reshape(inputs_BT.shape[0], -1)[:, :length]
