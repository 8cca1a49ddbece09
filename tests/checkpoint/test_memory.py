"""Converting and exporting hold a few chunks, never a tensor."""

import subprocess
import sys

import numpy as np
import published

STEPS = """
import resource, sys
from dsjax.checkpoint import convert, export
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, big = sys.argv[1:]
for source in (small, big):
    before = peak()
    convert(source, source + "-orbax", progress=False)
    export(source + "-orbax", source + "-back", progress=False)
print(peak() - before)
"""


def test_one_big_tensor(tmp_path):
    """An embedding of 480 MB: less than 60% of it is held at any time."""
    rows, columns = 120_000, 1000
    values = published.config(
        "llama", vocab_size=rows, hidden_size=columns, tie_word_embeddings=True
    )
    sizes = published.shapes(values)
    weights = {name: np.ones(shape, np.float32) for name, shape in sizes.items()}
    published.write(tmp_path / "big", values, weights)
    del weights
    published.make(tmp_path / "small", "llama")
    places = [str(tmp_path / name) for name in ("small", "big")]
    run = [sys.executable, "-c", STEPS, *places]
    printed = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True)
    assert 0 <= int(printed.stdout) < 0.6 * rows * columns * 4
