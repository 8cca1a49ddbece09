"""The corpus builder: one version of each file, nothing held out that is trained on."""

import json
import os
import tarfile

import numpy as np
import pytest

from dsjax.data.shards import open_corpus
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError
from experiments import corpus


@pytest.fixture(autouse=True)
def a_fifth_held_out(monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT_PERCENT", 20)


def module(name: str, *, lines: int = 30) -> str:
    return "".join(f"def function_{name}_{n}(argument):  # {n}\n" for n in range(lines))


@pytest.fixture
def root(tmp_path):
    """Two Pythons with 60 packages, the older one's files a little different."""
    root = tmp_path / "machine"
    for version in ("3.9", "3.11"):
        for number in range(60):
            where = root / f"lib/python{version}/site-packages/package{number}"
            where.mkdir(parents=True)
            text = module(f"p{number}") + f"# of {version}\n"
            (where / "core.py").write_text(text)
            (where / "data.py").write_bytes(b"\xff\xfe" * 500)
    packages = root / "lib/python3.11/site-packages"
    (packages / "vendored").mkdir()
    copy = (packages / "package7/core.py").read_text().upper().lower()
    (packages / "vendored/seven.py").write_text(copy + module("other", lines=10))
    (packages / "x.dist-info").mkdir()
    (packages / "x.dist-info/notes.txt").write_text(module("x"))
    return root


def test_one_version_of_each_file(root):
    found = list(corpus.find([str(root)]))
    names = [file.name for file in corpus.newest(found)]
    assert len(names) == len(set(names)) == 121
    assert not any("dist-info" in name for name in names)
    assert all(file.python == (3, 11) for file in corpus.newest(found))


def test_sides_share_no_package_and_no_copies(root):
    files = corpus.newest(corpus.find([str(root)]))
    sides = corpus.select(files, max_bytes=10**9)
    train, held_out = ({file.unit for file in side} for side in sides.values())
    assert train and held_out and not train & held_out
    names = {file.name for side in sides.values() for file in side}
    assert not any(name.endswith("data.py") for name in names), "no text"
    assert ("vendored/seven.py" in names) + ("package7/core.py" in names) == 1
    assert len(names) == 60


def test_a_package_has_a_limited_share(root, monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGE_SHARE", {"train": 0.1, "held_out": 1})
    where = root / "lib/python3.11/site-packages/package1"
    for number in range(50):
        (where / f"m{number}.py").write_text(module(f"m{number}"))
    size = 30_000
    sides = corpus.select(corpus.newest(corpus.find([str(root)])), max_bytes=size)
    names = [file.name for file in sides["train"]]
    large = [name for name in names if name.startswith("package1/")]
    assert 1 <= len(large) * 1200 <= 0.1 * size + 2400
    total = sum(os.path.getsize(file.path) for file in sides["train"])
    assert 0.5 * size < total < size + 2000


def test_a_large_package_has_held_out_parts(root, monkeypatch):
    """What is trained on of a package does not use up its share of the held-out text."""
    monkeypatch.setattr(corpus, "PACKAGE_SHARE", {"train": 0.5, "held_out": 0.1})
    where = root / "lib/python3.11/site-packages/large"
    for number in range(40):
        (where / f"sub{number}").mkdir(parents=True)
        (where / f"sub{number}/m.py").write_text(module(f"s{number}"))
    sides = corpus.select(corpus.newest(corpus.find([str(root)])), max_bytes=100_000)
    for side in sides.values():
        assert any(file.package == "large" for file in side)


def test_the_corpus_is_packed_and_read(root, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "VOCAB_SIZE", 300)
    out = tmp_path / "out"
    manifest = corpus.build(out, roots=[str(root)], max_bytes=10**9, workers=1)
    with tarfile.open(tmp_path / "out.tar.xz") as packed:
        packed.extractall(tmp_path / "carried", filter="data")
    carried = tmp_path / "carried/out"
    assert json.loads((carried / "manifest.json").read_text()) == manifest
    for side in ("train", "held_out"):
        found = open_corpus(carried / side)
        assert len(found.starts) == manifest[side]["documents"] > 0
        np.testing.assert_array_equal(
            found.tokens[:], open_corpus(out / side).tokens[:]
        )
        text = Tokenizer.load(carried / side).decode(
            found.tokens[: int(found.starts[1])]
        )
        assert text.startswith("def function_p")
    assert 0 < manifest["held_out"]["lzma_bits_per_byte"] < 8
    with pytest.raises(UserError, match="out exists"):
        corpus.build(out, roots=[str(root)], max_bytes=10**9, workers=1)


def test_too_little_is_refused(tmp_path):
    with pytest.raises(UserError, match="too few files"):
        corpus.build(tmp_path / "o", roots=[str(tmp_path)], max_bytes=9, workers=1)
