"""Records what transformers and torch answer, for tests that run without them.

    python -m tests.reference.make_golden [CASE ...]

from the repository's root, with torch and transformers (5.x) installed; it takes a few
seconds. Needed when a case is added or its checkpoint changes. The logits recorded are
float32's; each case also runs in float64, and the distance between the two says how
much of the tests' tolerance the reference itself uses up.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.reference import checkpoints, files, golden, torch_models, torch_mtp
from tests.reference.cases import CASES
from tests.reference.checkpoints import Case
from tests.reference.torch_models import Reference


def record(case: Case, directory: Path) -> golden.Golden:
    """The answers for the checkpoint of `case`, which is written into `directory`."""
    checkpoints.write(case, directory)
    tokens = checkpoints.tokens(case)
    answers, error = answer(directory, tokens, mtp=bool(case.num_mtp))
    at = golden.positions(tokens.shape[1])
    result = {
        "digest": np.array(files.digest(directory)),
        "positions": at,
        "logits": answers[0].logits[:, at],
        "float32_error": np.array(error),
        "versions": np.array([torch.__version__, transformers.__version__]),
    }
    if case.moe_layers:
        result |= _routing("", answers[0])
    if case.num_mtp:
        at = golden.mtp_positions(tokens.shape[1])
        result |= {"mtp_logits": answers[1].logits[:, at]}
        result |= _routing("mtp_", answers[1])
    return result


def answer(
    directory: Path, tokens: np.ndarray, *, mtp: bool
) -> tuple[list[Reference], float]:
    """What main model (and MTP module) give in float32, and how far float64 is."""
    model = torch_models.load(directory)
    everything = torch.nn.ModuleList([model])
    if mtp:
        everything.append(torch_mtp.load(directory, model))

    def run() -> list[Reference]:
        main = torch_models.forward(model, tokens)
        further = (
            torch_mtp.forward(model, module, main.hidden, tokens)
            for module in everything[1:]
        )
        return [main, *further]

    single = run()
    with torch_models.float64(everything):
        double = run()
    errors = [abs(a.logits - b.logits).max() for a, b in zip(single, double)]
    for a, b in zip(single, double):
        assert all(np.array_equal(x, y) for x, y in zip(a.indices, b.indices))
    return single, float(max(errors))


def _routing(prefix: str, reference: Reference) -> golden.Golden:
    return {
        f"{prefix}indices": np.stack(reference.indices).astype(np.uint8),
        f"{prefix}affinity_logits": np.stack(reference.affinity_logits),
    }


def main(names: list[str]) -> None:
    """Records the named cases, or all."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            answers = record(CASES[name], Path(scratch) / name)
        path = golden.save(name, answers)
        kilobytes = path.stat().st_size / 1000
        narrowest = golden.narrowest_margin(CASES[name], answers)
        print(
            f"{name:30} logits std {answers['logits'].std():.3f}, "
            f"float32 from float64 {float(answers['float32_error']):.1e}, "
            f"narrowest choice {narrowest:.1e}, {kilobytes:.0f} kB"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
