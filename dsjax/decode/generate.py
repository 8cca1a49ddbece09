"""Text in, text out: prompts of any lengths through the decoding engine."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsjax.data.tokenizer import Tokenizer
from dsjax.decode import engine
from dsjax.decode.sample import Sampling, row_keys
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer

STREAM_TOKENS = 8  # new tokens between two looks at a streamed reply
SLOTS = (
    128  # a row's cache slots are a multiple: of others a TPU's kernels make nothing
)

Prompt = str | Sequence[int]


def generate(
    model: Transformer,
    prompts: Sequence[Prompt] | str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    cache_dtype: DTypeLike | None = None,
) -> list[str] | list[list[int]] | str:
    """Continues prompts, all as one batch; each stops at a stop token or at the limit.

    Strings give strings (the model needs a tokenizer), lists of token ids give lists of
    new ids without the stop token, one string alone gives one string. `stop_ids` are by
    default the tokenizer's end-of-sequence ids. Rows of one call do not influence each
    other; `temperature` 0 is greedy, and only then `seed` does not matter. The cache has
    the model's dtype, or `cache_dtype`: float8_e4m3fn for MLA's latents, half the bytes.

    Raises UserError for an empty prompt, ids outside the vocabulary, lengths beyond the
    model's, sampling values out of range, strings without a tokenizer, or FP8 without
    latents.
    """
    if isinstance(prompts, str):
        (prompts,), single = [[prompts]], True
    else:
        single = False
    sampling = Sampling.checked(temperature=temperature, top_p=top_p, top_k=top_k)
    rows = [_encode(model, prompt) for prompt in prompts]
    if not rows:
        return []
    options = (sampling, seed, stop_ids, cache_dtype)
    batch = _Batch(model, rows, max_new_tokens, *options)
    batch.run(max_new_tokens)
    new = [
        _tokenizer(model).decode(row) if isinstance(prompt, str) else row
        for prompt, row in zip(prompts, batch.rows())
    ]
    return new[0] if single else new


def stream(
    model: Transformer,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    cache_dtype: DTypeLike | None = None,
) -> Iterator[str]:
    """Pieces of the continuation as they are made; of the reply, if `chat`.

    The compiled loop hands over every STREAM_TOKENS tokens. Raises as `generate` does.
    """
    tokenizer = _tokenizer(model)
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        prompt = tokenizer.chat(messages)
    elif system:
        raise UserError("a system prompt needs chat")
    sampling = Sampling.checked(temperature=temperature, top_p=top_p, top_k=top_k)
    rows = [_encode(model, prompt)]
    batch = _Batch(model, rows, max_new_tokens, sampling, seed, None, cache_dtype)
    decoder, shown = tokenizer.stream(), 0
    while not batch.finished:
        batch.run(min(shown + STREAM_TOKENS, max_new_tokens))
        (new,) = batch.rows()
        yield "".join(decoder.step(token) for token in new[shown:])
        shown = len(new)
    yield decoder.flush()


class _Batch:
    """Padded prompts, their state on the device, and what has been made so far."""

    def __init__(
        self,
        model: Transformer,
        rows: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_ids: Sequence[int] | None,
        cache_dtype: DTypeLike | None,
    ):
        lengths = np.array([len(row) for row in rows], np.int32)
        _check_lengths(model, int(lengths.max()), max_new_tokens)
        tokenizer: Tokenizer | None = model.tokenizer
        if stop_ids is None:
            stop_ids = tokenizer.eos_ids if tokenizer else ()
        self._stop_ids = frozenset(stop_ids)
        self._model, self._limit = model, max_new_tokens
        self._options = {
            "sampling": sampling,
            "keys_B": row_keys(seed, len(rows)),
            # -1 is no token; one entry at least keeps the shape simple
            "stops": jnp.asarray([*stop_ids] or [-1], jnp.int32),
        }
        padded = np.zeros((len(rows), engine.bucket(int(lengths.max()))), np.int32)
        for row, tokens in zip(padded, rows):
            row[: len(tokens)] = tokens
        room = engine.bucket(max_new_tokens)
        self._generation = engine.start(
            model,
            jnp.asarray(padded),
            jnp.asarray(lengths),
            slots=-(-(padded.shape[1] + room) // SLOTS) * SLOTS,
            room=room,
            cache_dtype=cache_dtype,
            **self._options,
        )

    @property
    def finished(self) -> bool:
        """Every row has stopped, or the limit is reached."""
        done = int(self._generation.count) >= self._limit
        return done or bool(self._generation.done_B.all())

    def run(self, limit: int) -> None:
        """Goes on until `limit` tokens a row are made or all rows have stopped."""
        self._generation = engine.run(
            self._model, self._generation, limit, **self._options
        )

    def rows(self) -> list[list[int]]:
        """The new tokens of each row, up to its stop token."""
        made = np.asarray(self._generation.new_BN)[:, : int(self._generation.count)]
        rows = []
        for row in made.tolist():
            ends = [i for i, token in enumerate(row) if token in self._stop_ids]
            rows.append(row[: ends[0]] if ends else row)
        return rows


def _tokenizer(model: Transformer) -> Tokenizer:
    if model.tokenizer is None:
        raise UserError(
            "the model has no tokenizer (no tokenizer.json in its directory): "
            "give token ids, not text"
        )
    return model.tokenizer


def _encode(model: Transformer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        prompt = _tokenizer(model).encode(prompt)
    tokens = [int(token) for token in prompt]
    size = model.config.vocab_size
    outside = [token for token in tokens if not 0 <= token < size]
    if outside:
        raise UserError(f"token {outside[0]} is outside the vocabulary of {size}")
    if not tokens:
        raise UserError("a prompt is empty, and the tokenizer adds no token to it")
    return tokens


def _check_lengths(model: Transformer, prompt: int, new: int) -> None:
    if new < 1:
        raise UserError(f"max_new_tokens={new} must be at least 1")
    longest = model.config.max_length
    if prompt + new > longest:
        raise UserError(
            f"a prompt of {prompt} tokens and max_new_tokens={new} are together more "
            f"than the model's max_length={longest}"
        )
