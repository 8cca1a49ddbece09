"""Rate of the pre-training loader: packed tokens a second from one process.

    python benchmarks/loader.py [--dir DIR] [--tokens 200000000]

Writes a corpus of random tokens, in documents of log-normal length, and takes batches
of 8 windows of 4096 + 1 tokens from it: the best and the median of several seconds.
The files are in the page cache: reading a disk is not what is measured.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsjax.data.loader import loader
from dsjax.data.mixture import Data, Documents, Source
from dsjax.data.shards import Writer
from dsjax.data.tokenizer import Tokenizer, train_bpe

LENGTH, MICROBATCH = 4096, 8
SECONDS, REPEATS = 1.0, 9


def write(directory: Path, tokenizer: Tokenizer, *, tokens: int, mean: int) -> Source:
    """A corpus of about `tokens` in documents of `mean` tokens: half are shorter than
    0.6 of that, as in collections of source files.
    """
    rng = np.random.default_rng(mean)
    lengths = rng.lognormal(np.log(mean) - 0.5, 1.0, tokens // mean).astype(int) + 8
    writer = Writer(directory, tokenizer)
    for part in np.array_split(lengths, max(1, tokens // 10_000_000)):
        ids = rng.integers(7, tokenizer.vocab_size, part.sum()).astype(np.uint16)
        writer.add(np.split(ids, np.cumsum(part)[:-1]), bytes=0)
    writer.close()
    return Source(path=str(directory))


def measure(data: Data) -> tuple[float, list[float]]:
    """Seconds until the first batch, and tokens a second in each repeat."""
    began = time.perf_counter()
    batches = loader(
        data, length=LENGTH, microbatch=MICROBATCH, seed=0, workdir=Path("unused")
    )
    next(batches)
    first = time.perf_counter() - began
    for _ in range(100):  # what was made ahead while nothing was taken
        next(batches)
    rates = []
    for _ in range(REPEATS):
        count, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < SECONDS:
            next(batches)
            count += 1
        rates.append(count * MICROBATCH * LENGTH / spent)
    batches.close()
    return first, rates


def main() -> None:
    """Writes, measures, prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        root = Path(directory)
        tokenizer = train_bpe(["some text"], vocab_size=280)
        size = {"tokens": args.tokens, "tokenizer": tokenizer}
        long = write(root / "long", mean=1000, **size)
        other = write(root / "other", mean=2000, **size)
        short = write(root / "short", mean=100, **size)
        plain = Data(sources=(long,))
        mixed = Data(sources=(replace(long, weight=0.7), other), fim_rate=0.1)
        cases = {
            "one source": plain,
            "two sources, FIM 0.1": mixed,
            "two sources, FIM 0.1, segments": replace(
                mixed, documents=Documents.SEPARATE
            ),
            "documents of 100 tokens, FIM 0.1, segments": Data(
                sources=(short,), fim_rate=0.1, documents=Documents.SEPARATE
            ),
        }
        print("| | best | median | until the first batch |\n|---|---|---|---|")
        for name, data in cases.items():
            first, rates = measure(data)
            best, median = max(rates) / 1e6, statistics.median(rates) / 1e6
            print(f"| {name} | {best:.0f} M/s | {median:.0f} M/s | {first:.2f} s |")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, peak {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
