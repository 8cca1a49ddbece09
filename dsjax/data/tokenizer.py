"""Text to token ids and back: Hugging Face `tokenizers` with a model directory's
settings around it.

Nothing here needs transformers. What a directory's tokenizer_config.json asks for is
done as transformers does it: a template around the text when it names add_bos_token or
add_eos_token, whatever tokenizer.json itself says.
"""

# ruff: noqa: RUF001  (the special tokens are written with U+FF5C)

import functools
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors
from tokenizers import trainers as bpe_trainers

from dsjax.errors import UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
# Before the prefix, in the hole's place, before what belongs there: V3's names.
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
REPLACEMENT = "\ufffd"  # how a decoder writes bytes that are no UTF-8 character

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

# Words with the one space or sign before them, runs of signs with the line end after
# them, line ends, spaces: the character classes that V3's tokenizer keeps apart. Digits
# are split off before.
_PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows its model's special tokens and chat
    template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        config: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ):
        """`config` and `generation` are what tokenizer_config.json and
        generation_config.json hold.
        """
        self.backend = backend
        self.config = dict(config or {})
        self.generation = dict(generation or {})
        self.chat_template = chat_template
        self.bos_token = _token_text(self.config.get("bos_token"))
        self.eos_token = _token_text(self.config.get("eos_token"))
        if "add_bos_token" in self.config or "add_eos_token" in self.config:
            backend.post_processor = self._template()

    def _template(self) -> processors.TemplateProcessing:
        bos, eos = self.bos_token, self.eos_token
        before = [bos] if self.config.get("add_bos_token") and bos else []
        after = [eos] if self.config.get("add_eos_token") and eos else []
        for token in before + after:
            if self.backend.token_to_id(token) is None:
                raise UserError(
                    f"tokenizer_config.json names {token!r}, tokenizer.json lacks it"
                )
        return processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[
                (token, self.backend.token_to_id(token)) for token in before + after
            ],
        )

    @classmethod
    def load(cls, directory: epath.PathLike) -> "Tokenizer | None":
        """The tokenizer of a model directory (local or gs://); None when it has no
        tokenizer.json.

        Raises UserError when one of its files cannot be read.
        """
        directory = epath.Path(directory)
        if not (directory / "tokenizer.json").exists():
            return None
        try:
            backend = tokenizers.Tokenizer.from_str(
                (directory / "tokenizer.json").read_text(encoding="utf-8")
            )
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"{directory / 'tokenizer.json'}: {error}") from error
        special = _read_json(directory / "special_tokens_map.json")
        config = special | _read_json(directory / "tokenizer_config.json")
        template = directory / "chat_template.jinja"
        return cls(
            backend,
            config=config,
            generation=_read_json(directory / "generation_config.json"),
            chat_template=template.read_text(encoding="utf-8")
            if template.exists()
            else _default_template(config.get("chat_template")),
        )

    def save(self, directory: epath.PathLike) -> None:
        """Writes tokenizer.json and its neighbours, as transformers reads them."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": _to_json(self.config),
        }
        if self.generation:
            files["generation_config.json"] = _to_json(self.generation)
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; a model's embedding may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The id that starts a sequence, None when the model has none."""
        return self.bos_token and self.backend.token_to_id(self.bos_token)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end generation: generation_config.json's, else the tokenizer's
        end of sequence.
        """
        match self.generation.get("eos_token_id"):
            case int(token):
                return (token,)
            case list(tokens) if tokens:
                return tuple(tokens)
        eos = self.eos_token and self.backend.token_to_id(self.eos_token)
        return () if eos is None else (eos,)

    @property
    def fim_ids(self) -> tuple[int, int, int] | None:
        """The ids that frame prefix, suffix and middle; None when the model has none."""
        ids = tuple(self.backend.token_to_id(token) for token in FIM)
        return None if None in ids else ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, begin-of-sequence first where the model's tokenizer adds
        it.

        Text that already starts with that token, as a rendered chat does, gets no
        second one.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        batch = [encoding.ids for encoding in self.backend.encode_batch(list(texts))]
        bos = self.bos_id
        return [
            ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
            for ids in batch
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    def chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation in the model's own format, from its jinja
        template.

        `messages` hold "role" and "content". Raises UserError when there is no template
        or it rejects the messages.
        """
        import jinja2

        if self.chat_template is None:
            raise UserError("this model's tokenizer has no chat template")
        try:
            return _compile_template(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise UserError(f"chat template: {error}") from error


class StreamDecoder:
    """Decodes a growing sequence without ever emitting half of a character.

    The pieces of all `step`s and of `flush`, joined, are `Tokenizer.decode` of all ids.
    """

    WINDOW = (
        16  # ids kept as context, since some decoders treat a text's first token apart
    )

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = ""  # the part of decode(self._ids) that is out

    def step(self, token: int) -> str:
        """The text that `token` completes; empty while a character's bytes are still
        coming.
        """
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        piece = text.rstrip(REPLACEMENT)[len(self._emitted) :]
        self._emitted += piece
        if self._emitted == text and len(self._ids) >= 2 * self.WINDOW:
            self._ids = self._ids[-self.WINDOW :]
            self._emitted = self._tokenizer.decode(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end: replacement characters for bytes that never became a
        character.
        """
        piece = self._tokenizer.decode(self._ids)[len(self._emitted) :]
        self._ids, self._emitted = [], ""
        return piece


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, show_progress: bool = False
) -> Tokenizer:
    """A byte-level BPE like the family's, trained on `texts`: any text encodes, and
    decodes to itself.

    Ids 0 and 1 are begin and end of sentence, then the two chat marks and the three of
    fill-in-the-middle; digits are split one by one. The chat template is V3's format.
    `vocab_size` counts all of them.
    """
    special = [BOS, EOS, USER, ASSISTANT, *FIM]
    if vocab_size < 256 + len(special):
        raise UserError(
            f"vocab_size={vocab_size} must hold 256 bytes and {len(special)} specials"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = bpe_trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(
        backend,
        config=config,
        generation={"bos_token_id": 0, "eos_token_id": 1},
        chat_template=CHAT_TEMPLATE,
    )


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _default_template(template: str | list[dict[str, str]] | None) -> str | None:
    if isinstance(template, list):  # several named templates
        return {item["name"]: item["template"] for item in template}.get("default")
    return template


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _to_json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@functools.lru_cache(maxsize=8)
def _compile_template(template: str) -> Any:
    """A template is a stranger's program: it runs in jinja's immutable sandbox."""
    import jinja2
    from jinja2 import sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.now().strftime
    return environment.from_string(template)
