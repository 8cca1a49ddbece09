"""A corpus of Python source and documentation, from what is installed on a machine.

    python -m experiments.corpus OUT

Looks through all Pythons' libraries and packages, and /usr and /opt, for .py, .rst, .md
and .txt files. Of the versions of one file (numpy/linalg/linalg.py of two Pythons) the
newest Python's stays; a file half of whose lines stand in others already goes; no
package has more than `PACKAGE_SHARE` of the text. Whole packages and subpackages are
held out, by a hash of their name. OUT holds train/ and held_out/ as `dsjax tokenize` writes them, with
a BPE trained on the former, and manifest.json; OUT.tar.xz is all of it, to be carried
(`python -m tarfile -e OUT.tar.xz`).

Hardware: 2 CPU cores, 4 GB of memory. Cost: about 6 minutes for 200 MB of text.
"""

import argparse
import hashlib
import json
import lzma
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from dsjax.data.shards import whole_directory
from dsjax.data.text import read_texts
from dsjax.data.tokenize import encode_files, write
from dsjax.data.tokenizer import train_bpe
from dsjax.errors import UserError

VOCAB_SIZE = 8192
MAX_BYTES = 200_000_000
PACKAGE_SHARE = {"train": 0.04, "held_out": 0.1}
HELD_OUT_PERCENT = 6
SUFFIXES = (".py", ".rst", ".md", ".txt")
SIZES = range(256, 500_000)  # bytes of a file worth reading; larger ones are tables
LONGEST_LINE = 1000
TELLING = 20  # characters of a line that says where it is from
REPEATED = 0.5  # share of a file's telling lines that stand elsewhere already

# What comes before a file's name in its own package, and the Python it belongs to.
LIBRARY = re.compile(r".*?/(?:python(\d(?:\.\d+)?)/)?(?:site|dist)-packages/")
STANDARD = re.compile(r".*/lib/python(\d\.\d+)/")
ELSEWHERE = re.compile(r"/(?:usr|opt)(?:/local)?/")
SKIPPED = re.compile(
    r"/(?:__pycache__|node_modules|[^/]+\.(?:dist|egg)-info|\.git|pytest-of-\w+)(?:/|$)"
    r"|^/(?:proc|sys|dev|run)(?:/|$)"
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file, its path inside its library, and the version of Python that has it."""

    path: str
    name: str
    python: tuple[int, ...]

    @property
    def package(self) -> str:
        """numpy of numpy/linalg/linalg.py, argparse of argparse.py; of a path in /usr
        the first three parts: share/doc/bash, lib/google-cloud-sdk/lib.
        """
        return self._part(3 if self.name.startswith("/") else 1)

    @property
    def unit(self) -> str:
        """What is held out as a whole: numpy/linalg of numpy/linalg/linalg.py, numpy of
        numpy/version.py; of a path in /usr five parts.
        """
        return self._part(5 if self.name.startswith("/") else 2)

    def _part(self, depth: int) -> str:
        parts = self.name.removeprefix("/").split("/")
        return "/".join(parts[:-1][:depth]) or parts[0].removesuffix(".py")


def find(roots: Iterable[str]) -> Iterator[Found]:
    """Every file that may be of use below the roots, other file systems left out."""
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [f for f in folders if _worth(folder, f, root)]
            for file in files:
                found = _named(os.path.join(folder, file))
                if found is not None:
                    yield found


def _worth(parent: str, folder: str, root: str) -> bool:
    path = os.path.join(parent, folder)
    inside = "/" + os.path.relpath(path, root)
    return not (SKIPPED.search(inside) or os.path.ismount(path))


def _named(path: str) -> Found | None:
    if not path.endswith(SUFFIXES) or os.path.islink(path):
        return None
    for pattern in (LIBRARY, STANDARD):
        if match := pattern.match(path):
            version = tuple(map(int, (match[1] or "0").split(".")))
            return Found(path=path, name=path[match.end() :], python=version)
    if match := ELSEWHERE.match(path):
        return Found(path=path, name="/" + path[match.end() :], python=())
    return None


def newest(files: Iterable[Found]) -> list[Found]:
    """One file of each name: the newest Python's."""
    best: dict[str, Found] = {}
    for file in files:
        other = best.get(file.name)
        if other is None or (other.python, other.path) < (file.python, file.path):
            best[file.name] = file
    return [best[name] for name in sorted(best)]


def held_out(file: Found) -> bool:
    """Decided by a hash of the unit's name: the same on every machine."""
    digest = hashlib.sha256(file.unit.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def select(files: list[Found], *, max_bytes: int) -> dict[str, list[Found]]:
    """The files of both sides: none that mostly repeats others, no package too large.

    The order is by a hash of the name, training files first: what is held out repeats
    nothing that is trained on, and a limit cuts fairly.
    """
    order = lambda f: (  # noqa: E731
        held_out(f),
        hashlib.sha256(f.name.encode()).digest(),
    )
    limits = {
        "train": max_bytes * (100 - HELD_OUT_PERCENT) // 100,
        "held_out": max_bytes * HELD_OUT_PERCENT // 100,
    }
    chosen: dict[str, list[Found]] = {"train": [], "held_out": []}
    sizes, packages, seen = Counter(), Counter(), set()
    for file in tqdm(sorted(files, key=order), desc="reading", unit=" files"):
        side = "held_out" if held_out(file) else "train"
        most = limits[side] * PACKAGE_SHARE[side]
        content = None
        if sizes[side] < limits[side] and packages[side, file.package] < most:
            content = _read(file.path)
        if content is None:
            continue
        lines = _telling(content)
        if not lines or len(lines & seen) > REPEATED * len(lines):
            continue
        seen |= lines
        chosen[side].append(file)
        sizes[side] += len(content)
        packages[side, file.package] += len(content)
    return {side: sorted(found, key=lambda f: f.name) for side, found in chosen.items()}


def _read(path: str) -> bytes | None:
    """The file, where it is text that people wrote: UTF-8, of lines of some length."""
    try:
        if os.path.getsize(path) not in SIZES:
            return None
        content = Path(path).read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if b"\0" in content or max(map(len, content.split(b"\n"))) > LONGEST_LINE:
        return None
    return content


def _telling(content: bytes) -> set[int]:
    stripped = (line.strip() for line in content.split(b"\n"))
    return {hash(line) for line in stripped if len(line) >= TELLING}


def build(out: Path, *, roots: Iterable[str], max_bytes: int, workers: int) -> dict:
    """Writes OUT and OUT.tar.xz; returns the manifest. Raises UserError when `out`
    exists or too little is found.
    """
    with whole_directory(out) as partial:
        everything = list(tqdm(find(roots), desc="finding", unit=" files"))
        sides = select(newest(everything), max_bytes=max_bytes)
        if not all(sides.values()):
            raise UserError(f"{', '.join(roots)}: too few files to hold some out")
        paths = {side: [Path(f.path) for f in found] for side, found in sides.items()}
        texts = tqdm(paths["train"], desc="reading for a BPE", unit=" files")
        tokenizer = train_bpe(read_texts(texts), vocab_size=VOCAB_SIZE)
        manifest = {"files_found": len(everything)}
        for side, files in paths.items():
            encoded = encode_files(files, tokenizer, workers=workers)
            index = write(encoded, partial / side, tokenizer)[""]
            manifest[side] = _summary(sides[side]) | _counts(asdict(index))
        manifest["held_out"]["lzma_bits_per_byte"] = _lzma(paths["held_out"])
        text = json.dumps(manifest, indent=2) + "\n"
        (partial / "manifest.json").write_text(text)
        _pack(partial, out)
    return manifest


def _counts(index: dict) -> dict:
    return {name: index[name] for name in ("documents", "bytes", "tokens")}


def _summary(files: list[Found]) -> dict:
    kinds = Counter(Path(file.path).suffix for file in files)
    sizes = Counter()
    for file in files:
        sizes[file.package] += os.path.getsize(file.path)
    return {
        "files_by_suffix": dict(kinds.most_common()),
        "packages": len(sizes),
        "units": len({file.unit for file in files}),
        "largest_packages": dict(sizes.most_common(20)),
    }


def _lzma(files: list[Path]) -> float:
    content = b"".join(path.read_bytes() for path in files)
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    return round(8 * len(packed) / len(content), 4)


def _pack(directory: Path, out: Path) -> None:
    """`directory` as OUT.tar.xz, whose only member is called after `out`.

    Tokens are pairs of bytes, which the compressor is told: 4% smaller.
    """
    archive = out.with_name(out.name + ".tar.xz")
    partial = archive.with_name(archive.name + ".partial")
    pairs = {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 3, "lp": 1, "pb": 1}
    with (
        lzma.open(partial, "w", filters=[pairs]) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        tar.add(directory, arcname=out.name)
    partial.rename(archive)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--roots", nargs="+", default=["/"], metavar="DIR")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, metavar="N")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    try:
        manifest = build(
            args.out, roots=args.roots, max_bytes=args.max_bytes, workers=args.workers
        )
    except UserError as error:
        print(f"corpus: {error}", file=sys.stderr)
        return 2
    print(json.dumps(manifest, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
