"""Converts and exports a synthetic checkpoint of V3's real layer shapes, and measures.

    python benchmarks/convert_v3_layers.py [--dir /tmp/convert_v3] [--json out.json]

Makes one dense and one MoE layer of V3 (FP8 in blocks of 128 x 128, a vocabulary of
8192), converts them, loads nothing, exports them again, each step in a process of its own
whose peak resident memory is read at its end. Beside every step stands what reading and
writing the same numbers of bytes takes on the same disk, in the same run: plain files,
nothing computed. Caches are dropped before every timing. About 12 GB in and 23 GB out:
needs 55 GB of disk, which it frees at the end.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
from etils import epath

from dsjax.checkpoint import fp8, hf_config_write, table
from dsjax.checkpoint.hf import array_shapes
from dsjax.checkpoint.safetensors import INDEX, Planned, Writer, index_json, plan_shards
from dsjax.config import ModelConfig, Segment
from dsjax.models import v3

BLOCK, VOCABULARY = (128, 128), 8192
PIECE = 64 << 20
STEP = """
import resource, sys, time
from dsjax.checkpoint import convert, export
begin = time.perf_counter()
{"convert": convert, "export": export}[sys.argv[1]](sys.argv[2], sys.argv[3])
seconds = time.perf_counter() - begin
used = resource.getrusage(resource.RUSAGE_SELF)
print(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""


def two_layers() -> ModelConfig:
    """V3 with one layer of each kind, no MTP and a small vocabulary."""
    config = v3()
    segments = tuple(
        Segment(count=1, feed_forward=segment.feed_forward)
        for segment in config.segments
    )
    return replace(config, vocab_size=VOCABULARY, segments=segments, mtp=False)


def planned_tensors(config: ModelConfig) -> Iterator[Planned]:
    """The published tensors: linear layers in FP8 with their scales, the rest in BF16."""
    for tensor in table.tensors(config, array_shapes(config)):
        if "_proj" not in tensor.name:
            kind = (
                np.float32 if "correction_bias" in tensor.name else ml_dtypes.bfloat16
            )
            yield Planned(tensor.name, np.dtype(kind), tensor.shape)
            continue
        yield Planned(tensor.name, fp8.E4M3, tensor.shape)
        scales = fp8.scale_shape(tensor.shape, BLOCK)
        name = tensor.name + fp8.SCALE_SUFFIX
        yield Planned(name, np.dtype(np.float32), scales)


def make(directory: Path) -> int:
    """Writes the checkpoint; returns its bytes."""
    config = two_layers()
    directory.mkdir(parents=True)
    quantised = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    values = hf_config_write.write(config, dtype="bfloat16")
    values |= {"quantization_config": quantised}
    (directory / "config.json").write_text(json.dumps(values))
    shards = plan_shards(planned_tensors(config))
    random = np.random.default_rng(0).integers(0, 126, PIECE, np.uint8)
    for file, group in shards.items():
        with Writer(epath.Path(directory) / file, group) as writer:
            for tensor in group:
                _fill(writer, tensor, random)
    (directory / INDEX).write_text(index_json(shards))
    return sum(tensor.nbytes for group in shards.values() for tensor in group)


def _fill(writer: Writer, tensor: Planned, random: np.ndarray) -> None:
    if tensor.name.endswith(fp8.SCALE_SUFFIX):
        writer.write(np.full(tensor.shape, 1e-3, np.float32))
        return
    for start in range(0, tensor.nbytes, PIECE):
        writer.write(random[: min(PIECE, tensor.nbytes - start)])


def drop_caches(directory: Path) -> None:
    """Writes dirty pages out, and forgets the pages of these files."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def raw_read(directory: Path) -> None:
    """Reads every byte of every file."""
    buffer = bytearray(PIECE)
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def raw_write(path: Path, nbytes: int) -> None:
    """Writes so many bytes and waits until the disk has them.

    In files of 4 GiB, each removed before the next, to need little room.
    """
    random = np.random.default_rng(0).integers(0, 255, PIECE, np.uint8)
    while nbytes > 0:
        part = min(nbytes, 64 * PIECE)
        with path.open("wb", buffering=0) as file:
            for start in range(0, part, PIECE):
                file.write(random[: min(PIECE, part - start)])
            os.fsync(file.fileno())
        path.unlink()
        nbytes -= part


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(step: str, source: Path, out: Path) -> dict[str, float]:
    """One step in its own process, and the same bytes read and written plainly."""
    drop_caches(source)
    bytes_in = sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
    arguments = [sys.executable, "-c", STEP, step, str(source), str(out)]
    begin = time.perf_counter()
    printed = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    seconds, processor, peak = map(float, printed.stdout.split()[-3:])
    seconds += timed(os.sync)
    whole = time.perf_counter() - begin
    bytes_out = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    drop_caches(source)
    reading = timed(lambda: raw_read(source))
    writing = timed(lambda: raw_write(out.parent / "raw", bytes_out))
    return {
        "step": step,
        "gb_in": bytes_in / 1e9,
        "gb_out": bytes_out / 1e9,
        "seconds": seconds,
        "seconds_with_start": whole,
        "processor_seconds": processor,
        "mb_per_second": (bytes_in + bytes_out) / 1e6 / seconds,
        "peak_gib": peak / 2**30,
        "raw_read_seconds": reading,
        "raw_write_seconds": writing,
        "times_raw": seconds / (reading + writing),
    }


def dequantise_rate() -> float:
    """GB/s of FP8 through the dequantiser alone, from memory, on all cores."""
    weight = np.zeros((1024, 7168), fp8.E4M3)
    scale = np.ones(fp8.scale_shape(weight.shape, BLOCK), np.float32)
    bf16 = np.dtype(ml_dtypes.bfloat16)

    def run() -> None:
        for _ in range(50):
            fp8.dequantise(weight, scale, first_row=0, block=BLOCK, dtype=bf16)

    run()
    return 50 * weight.nbytes / 1e9 / timed(run)


def machine() -> dict[str, str | float]:
    """Where the numbers come from."""
    names = ("jax", "numpy", "tensorstore", "orbax-checkpoint", "ml_dtypes")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        **{name: version(name) for name in names},
    }


def main() -> None:
    """Makes, converts, exports, measures, cleans up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("/tmp/convert_v3"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    directory = arguments.dir
    directory.mkdir(parents=True)
    try:
        nbytes = make(directory / "hf")
        print(f"made {nbytes / 1e9:.1f} GB", flush=True)
        rows = [measure("convert", directory / "hf", directory / "orbax")]
        shutil.rmtree(directory / "hf")
        rows.append(measure("export", directory / "orbax", directory / "out"))
    finally:
        shutil.rmtree(directory)
    results = {
        "machine": machine(),
        "dequantise_gb_s": dequantise_rate(),
        "steps": rows,
    }
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
