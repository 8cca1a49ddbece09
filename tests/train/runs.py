"""Runs in processes of their own, and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMINGS = {"tokens_per_second", "mfu"}


def environment(cache: Path | None, **more: str) -> dict[str, str]:
    """A child's environment; with a `cache` it compiles what no child did before."""
    new = os.environ | {"PYTHONPATH": str(ROOT)} | more
    if cache is not None:
        new |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return new


def launch(out: Path, *args: str, cache: Path | None = None, **more: str):
    """`dsjax train tests.train.tiny.run --out OUT ARGS`, or of another experiment if
    the first of ARGS is its name.
    """
    name = "tests.train.tiny.run"
    if args and args[0].startswith("tests."):
        name, *args = args
    command = [
        sys.executable,
        "-m",
        "dsjax.cli",
        "train",
        name,
        "--out",
        str(out),
        *args,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child: subprocess.Popen, code: int = 0, timeout: float = 240) -> str:
    """Waits for a child; its stdout."""
    try:
        out, errors = child.communicate(timeout=timeout)
    finally:
        child.kill()
    assert child.returncode == code, errors[-3000:]
    return out


def rows(out: Path) -> list[dict]:
    """The rows of a run's metrics without what depends on the clock; the last one may
    be cut short while the run goes on.
    """
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in whole]


def steps(out: Path) -> int:
    """How many steps a run's metrics tell of."""
    return max((row["step"] for row in rows(out)), default=0)


def until(ready, child: subprocess.Popen, timeout: float = 240) -> None:
    """Waits until `ready()`; the child shall not end before."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert child.poll() is None, child.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
