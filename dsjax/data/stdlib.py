"""Real text that every machine has: the source of the Python standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

NOT_THE_LIBRARY = frozenset({"__pycache__", "site-packages", "dist-packages"})
# Tests, and what is not written by hand: tables of encodings, pydoc's topics.
BESIDE_THE_LIBRARY = frozenset(
    {"encodings", "idle_test", "pydoc_data", "test", "tests"}
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two disjoint lists of whole files."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]


def python_source(
    *, held_out_percent: int = 5, root: Path | None = None, tests: bool = False
) -> Split:
    """The .py files below `root` (the running interpreter's standard library), in
    sorted order; with `tests`, also its tests and the files that programs wrote.

    A file is held out by the hash of its path relative to `root`: the same file on
    every machine, whatever else is there.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    excluded = NOT_THE_LIBRARY | (frozenset() if tests else BESIDE_THE_LIBRARY)
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if excluded.isdisjoint(relative.parts) and path.stat().st_size:
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            held = int.from_bytes(digest[:4], "big") % 100 < held_out_percent
            (held_out if held else train).append(path)
    return Split(train=tuple(train), held_out=tuple(held_out))
