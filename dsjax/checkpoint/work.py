"""OUT.partial: where work goes on until it is whole, and is then renamed to OUT."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from dsjax.errors import UserError

SUFFIX, RECORD = ".partial", "begun_from"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def fingerprint(*facts: Any) -> str:
    """A digest of what a piece of work depends on: only the same work is resumed."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def check_absent(out: epath.Path) -> None:
    """Raises UserError when the output exists."""
    if out.exists():
        raise UserError(f"{out} exists: choose another output or remove it")


def check_space(out: epath.Path, needed: int) -> None:
    """Raises UserError when a local disk cannot take `needed` bytes more for `out`.

    What OUT.partial has already counts as written.
    """
    if "://" in str(out):
        return
    there = sum(p.stat().st_size for p in Path(partial_path(out)).rglob("*"))
    place = next(parent for parent in Path(out).absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed - there:
        raise UserError(
            f"{out}: {(needed - there) / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} are free"
        )


def partial_path(out: epath.Path) -> epath.Path:
    """OUT.partial."""
    return out.parent / (out.name + SUFFIX)


@contextmanager
def partial_directory(out: epath.Path, digest: str) -> Iterator[epath.Path]:
    """Yields OUT.partial, new or to be resumed, and renames it when the body is done.

    Raises UserError when OUT exists, when OUT.partial is from other work, and when the
    disk fills. After any error OUT.partial stays, for the next try to go on from.
    """
    check_absent(out)
    partial = partial_path(out)
    record = partial / RECORD
    with _storage_is_the_users(partial):
        if partial.exists() and any(partial.iterdir()):
            if not record.exists() or record.read_text() != digest:
                raise UserError(
                    f"{partial} is from other work than this: remove it to begin anew"
                )
        else:
            partial.mkdir(parents=True, exist_ok=True)
            record.write_text(digest)
        yield partial
    partial.rename(out)
    (out / RECORD).unlink()


@contextmanager
def _storage_is_the_users(partial: epath.Path) -> Iterator[None]:
    """Turns what the storage refuses, seen by Python or tensorstore, into one line."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        told = ("No space left on device", "Disk quota exceeded")
        if full or any(text in str(error) for text in told):
            message = "the disk is full; make room and run again to go on from here"
            raise UserError(f"{partial}: {message}") from error
        if isinstance(error, OSError):
            raise UserError(f"{partial}: cannot go on: {error}") from error
        raise


def copy_companions(source: epath.Path, target: epath.Path) -> None:
    """Copies tokenizer, chat template, generation config and remote code, if present."""
    code = [path.name for path in source.glob("*.py")]
    for name in (*COMPANIONS, *code):
        if (source / name).exists():
            (source / name).copy(target / name, overwrite=True)
