"""A killed convert or export leaves nothing that loads, and goes on when run again."""

import os
import signal
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import published
import pytest
from test_round_trip import assert_same, read

from dsjax.checkpoint import convert, export, load, orbax
from dsjax.errors import UserError

SLOW = """
import sys, time
from dsjax.checkpoint import convert, export, orbax
kind, source, out = sys.argv[1:]
def slow(function):
    def run(*args):
        time.sleep(0.05)
        return function(*args)
    return run
orbax.Array.write = slow(orbax.Array.write)
orbax.OrbaxSource.read = slow(orbax.OrbaxSource.read)
if kind == "convert":
    convert(source, out, progress=False)
else:
    export(source, out, shard_bytes=20_000, progress=False)
"""


def kill_when(ready, *arguments) -> None:
    """Runs the slow child and kills it as soon as `ready()` is true."""
    child = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)])
    deadline = time.monotonic() + 60
    while not ready():
        assert child.poll() is None, "the child ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


def chunks(directory) -> list:
    """The chunk files that are there."""
    return [path for path in directory.glob("params/*/c/**/*") if path.is_file()]


def test_convert(tmp_path, monkeypatch):
    source, out = published.make(tmp_path / "hf", "deepseek_v3"), tmp_path / "out"
    partial = tmp_path / "out.partial"
    kill_when(lambda: len(chunks(partial)) > 40, "convert", source, out)
    assert not out.exists()
    with pytest.raises(UserError):
        load(partial)
    with pytest.raises(Exception), ocp.StandardCheckpointer() as checkpointer:  # noqa: B017
        checkpointer.restore(partial / "params")

    written, write = [], orbax.Array.write
    monkeypatch.setattr(
        orbax.Array, "write", lambda *args: written.append(0) or write(*args)
    )
    convert(source, out, progress=False)
    resumed = len(written)
    convert(source, tmp_path / "at_once", progress=False)
    assert 0 < resumed <= len(written) - resumed - 30
    export(out, tmp_path / "back", progress=False)
    assert_same(read(tmp_path / "back"), read(source))
    assert not list(out.glob("**/*.__lock"))
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "at_once"))


def test_export(tmp_path):
    source, out = tmp_path / "orbax", tmp_path / "out"
    convert(published.make(tmp_path / "hf", "deepseek"), source, progress=False)
    partial = tmp_path / "out.partial"
    kill_when(
        lambda: len(list(partial.glob("*.safetensors"))) > 1, "export", source, out
    )
    assert not out.exists()
    with pytest.raises(UserError):
        load(partial)
    kept = {file: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    export(source, out, shard_bytes=20_000, progress=False)
    for file, when in kept.items():
        assert (out / file.name).stat().st_mtime_ns == when
    assert_same(read(out), read(tmp_path / "hf"))
    assert not list(out.glob("*unfinished*"))


def test_other_source_or_dtype_is_not_resumed(tmp_path):
    source, out = published.make(tmp_path / "hf", "llama"), tmp_path / "out"
    partial = tmp_path / "out.partial"
    kill_when(lambda: len(chunks(partial)) > 3, "convert", source, out)
    with pytest.raises(UserError, match="other work"):
        convert(source, out, dtype="float32", progress=False)
    shard = source / "model-00001-of-00002.safetensors"
    os.utime(shard, (1, 1))
    with pytest.raises(UserError, match="other work"):
        convert(source, out, progress=False)
