"""What a run reads: weighted sources of tokens, and how documents become sequences."""

import enum
from dataclasses import dataclass


class Documents(enum.Enum):
    """Whether attention crosses the document boundaries of a packed sequence."""

    JOINED = "joined"  # it does: V3's pre-training
    SEPARATE = "separate"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A directory that `dsjax tokenize` wrote, and its share of the mixture."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """The Python standard library's own source, tokenised when a run first needs it.

    Whole files are held out. `root`: another directory of Python files.
    """

    vocab_size: int = 4096
    held_out_percent: int = 5
    root: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training mixture and the held-out text.

    `held_out`: a directory that `dsjax tokenize` wrote; StandardLibrary brings its own.
    `fim_rate`: the share of documents rearranged to prefix, suffix, middle (V3, section
    4.1).
    """

    sources: tuple[Source, ...] | StandardLibrary
    held_out: str | None = None
    documents: Documents = Documents.JOINED
    fim_rate: float = 0.0
