"""Real text that every machine has: the source of the Python standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Not written by hand (tables of encodings, pydoc's topics), or not the library: tests,
# installed packages.
EXCLUDED = frozenset(
    {
        "__pycache__",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
    }
)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two disjoint lists of whole files."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]


def python_source(*, held_out_percent: int = 5, root: Path | None = None) -> Split:
    """The .py files below `root` (the running interpreter's standard library), in
    sorted order.

    A file is held out by the hash of its path relative to `root`: the same file on
    every machine, whatever else is there.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED.isdisjoint(relative.parts) and path.stat().st_size:
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            held = int.from_bytes(digest[:4], "big") % 100 < held_out_percent
            (held_out if held else train).append(path)
    return Split(train=tuple(train), held_out=tuple(held_out))
