"""The recorded answers in golden/: what transformers and torch gave for each case.

Fields of golden/CASE.npz (B sequences of T tokens, S recorded positions, V vocabulary,
E experts, k chosen ones, Y layers with experts):
    digest           SHA-256 of the checkpoint's files that the answers belong to
    positions        [S] int32: logits at some say enough, each depends on all before it
    logits           [B, S, V] float32
    indices          [Y, B, T, k] uint8, ascending for each token
    affinity_logits  [Y, B, T, E] float32, the router's logits before softmax or sigmoid
    mtp_logits       [B, S, V] float32 at `mtp_positions`, from hidden states after the
                     final norm, as serving code feeds them
    mtp_indices, mtp_affinity_logits    the same of the MTP layer, [1, B, T - 1, ..]
    float32_error    the largest distance of any logit from the same model in float64
    versions         of torch and transformers
Cases without experts or without MTP lack those fields.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.reference import checkpoints, routing
from tests.reference.checkpoints import Case

DIRECTORY = Path(__file__).parent / "golden"

Golden = dict[str, np.ndarray]


def positions(length: int) -> np.ndarray:
    """Every third position, with the last one."""
    return np.arange(length - 1, -1, -3, dtype=np.int32)[::-1]


def mtp_positions(length: int) -> np.ndarray:
    """Like `positions`, for the length - 1 positions that have a next token."""
    return positions(length - 1)


def load(name: str) -> Golden:
    """The recorded answers of one case."""
    with np.load(DIRECTORY / f"{name}.npz") as file:
        return dict(file)


def save(name: str, golden: Golden) -> Path:
    """Records the answers of one case."""
    DIRECTORY.mkdir(exist_ok=True)
    path = DIRECTORY / f"{name}.npz"
    np.savez_compressed(path, **golden)
    return path


def routers(
    case: Case, golden: Golden
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """(affinity logits, indices, selection bias) of each router, MTP's last."""
    stored = checkpoints.tensors(case)
    layers = iter(case.all_moe_layers)
    for prefix in ("", "mtp_") if case.num_mtp else ("",):
        logits, indices = golden[f"{prefix}affinity_logits"], golden[f"{prefix}indices"]
        for seen, chosen in zip(logits, indices, strict=True):
            yield seen, chosen, checkpoints.router_bias(stored, next(layers))


def narrowest_margin(case: Case, golden: Golden) -> float:
    """The narrowest lead of a chosen expert or group; infinite without experts."""
    if not case.moe_layers:
        return np.inf
    return min(
        routing.margin(seen, case.config, bias)
        for seen, _, bias in routers(case, golden)
    )
