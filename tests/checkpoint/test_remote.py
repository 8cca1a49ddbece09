"""gs:// paths, by an object store that is a local directory underneath.

What epath and tensorstore do with Google's servers is theirs; that every path of ours
goes through them, and none is taken for a local one, is tested here.
"""

import os

import published
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from test_round_trip import assert_same, read

from dsjax.checkpoint import convert, export, load, orbax
from dsjax.errors import UserError

BUCKET = "gs://bucket/"


class Bucket(LocalFileSystem):
    """Sees gs://bucket/NAME as ROOT/NAME."""

    root = ""
    cachable = False

    def _strip_protocol(self, path):
        path = os.fspath(path)
        if not path.startswith(self.root):
            assert path.startswith(BUCKET.rstrip("/")), f"a local path: {path}"
            path = self.root + "/" + path.removeprefix("gs://bucket").lstrip("/")
        return path.rstrip("/")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The directory behind gs://bucket."""
    root = tmp_path / "bucket"
    root.mkdir()
    monkeypatch.setattr(Bucket, "root", str(root))
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: Bucket())
    kvstore = orbax._kvstore

    def local(path):
        spec = kvstore(path)
        assert spec["driver"] == "gcs" and spec["bucket"] == "bucket"
        return {"driver": "file", "path": f"{root}/{spec['path']}"}

    monkeypatch.setattr(orbax, "_kvstore", local)
    return root


def test_every_step_on_a_bucket(bucket):
    published.make(bucket / "hf", "deepseek_v3")
    (bucket / "hf" / "tokenizer.json").write_text("{}")
    convert(BUCKET + "hf", BUCKET + "orbax", progress=False)
    export(BUCKET + "orbax", BUCKET + "out", shard_bytes=200_000, progress=False)
    assert sorted(path.name for path in bucket.iterdir()) == ["hf", "orbax", "out"]
    assert_same(read(bucket / "out"), read(bucket / "hf"))
    assert (bucket / "out" / "tokenizer.json").exists()
    assert load(BUCKET + "orbax").config == load(BUCKET + "hf").config
    with pytest.raises(UserError, match="exists"):
        convert(BUCKET + "hf", BUCKET + "orbax", progress=False)
