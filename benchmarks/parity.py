"""How far dsjax is from transformers and torch, in float32, case by case.

    JAX_DEFAULT_MATMUL_PRECISION=highest python -m benchmarks.parity

Small random checkpoints of every architecture against the recorded answers of the
parity tests (tests/reference/golden). Prints a Markdown table of the largest absolute
differences; logits have a standard deviation near 1. Beside them stands how far the
reference's own float32 is from float64. The precision matters on GPUs and TPUs alone,
which otherwise multiply float32 in fewer bits.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np

import dsjax
from tests.reference import checkpoints, golden
from tests.reference.cases import CASES
from tests.reference.observe import decode, largest, logits, observe

PROMPT = 20  # tokens read in the plain form; the others by the cache, absorbed


def main() -> None:
    """Prints the table."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| case | logits | cached decode | MTP | experts | reference's own error |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for name in CASES:
            print("|", " | ".join(row(name, Path(directory) / name)), "|", flush=True)


def row(name: str, directory: Path) -> list[str]:
    """One case: written to `directory`, loaded, compared."""
    case, recorded = CASES[name], golden.load(name)
    checkpoints.write(case, directory)
    model, tokens = dsjax.load(directory), checkpoints.tokens(case)
    at, expected = recorded["positions"], recorded["logits"]
    after = at >= PROMPT
    cached = decode(model, tokens, PROMPT)[:, at[after] - PROMPT]
    cells = [
        largest(logits(model, tokens)[:, at] - expected),
        largest(cached - expected[:, after]),
    ]
    mtp = experts = ""
    if case.moe_layers:
        found = observe(model, tokens)
        same = np.array_equal(found.indices, recorded["indices"])
        experts = "equal" if same else "DIFFERENT"
        if found.mtp_logits is not None:
            here = golden.mtp_positions(tokens.shape[1])
            difference = largest(found.mtp_logits[:, here] - recorded["mtp_logits"])
            mtp = f"{difference:.1e}"
    numbers = [f"{cell:.1e}" for cell in cells]
    return [name, *numbers, mtp, experts, f"{float(recorded['float32_error']):.1e}"]


if __name__ == "__main__":
    main()
