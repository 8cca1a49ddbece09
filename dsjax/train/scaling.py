"""The LLM paper's scaling laws (2401.02954, section 3): what a compute budget asks for.

Compute C is in FLOPs, model size M in non-embedding FLOPs a token (not in parameters),
data D in tokens: C = M D.
"""

import math
from dataclasses import asdict, dataclass

from dsjax.errors import UserError

LENGTH = 4096  # of a sequence, as the paper trained
HEAD = 128  # widths are whole heads of this size
WIDTH_PER_LAYER = 128  # d_model / layers: 137 in the paper's 7B, 86 in its 67B


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What `flops` of training are best spent on.

    `batch_tokens` also as `batch_sequences` of 4,096 tokens. `flops_per_token` is M.
    `layers` and `d_model` suggest a dense model whose own M, `suggested_flops_per_token`,
    is near it; `parameters` are its own, without embeddings.
    """

    flops: float
    learning_rate: float
    batch_tokens: float
    batch_sequences: float
    flops_per_token: float
    tokens: float
    layers: int
    d_model: int
    suggested_flops_per_token: float
    parameters: int

    def as_dict(self) -> dict[str, float | int]:
        """Every number by its name, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """All of it, for a reader."""
        return (
            f"compute        {self.flops:.3g} FLOPs\n"
            f"learning rate  {self.learning_rate:.3e}\n"
            f"batch          {self.batch_tokens:,.0f} tokens, "
            f"{self.batch_sequences:,.0f} sequences of {LENGTH:,}\n"
            f"model          {self.flops_per_token:.3e} non-embedding FLOPs a token\n"
            f"data           {self.tokens:.3e} tokens\n"
            f"for example    {self.layers} layers of d_model {self.d_model:,}: "
            f"{self.suggested_flops_per_token:.3e} FLOPs a token, "
            f"{self.parameters / 1e6:,.0f}M parameters without embeddings"
        )


def scaling(flops: float) -> Scaling:
    """The fitted laws at a budget. Raises UserError unless it is positive."""
    if not 0 < flops < math.inf:
        raise UserError(f"flops={flops} must be a positive number")
    batch_tokens = 0.2920 * flops**0.3271
    model = 0.1715 * flops**0.5243
    layers, d_model = suggest(model)
    return Scaling(
        flops=flops,
        learning_rate=0.3118 * flops**-0.1250,
        batch_tokens=batch_tokens,
        batch_sequences=batch_tokens / LENGTH,
        flops_per_token=model,
        tokens=5.8316 * flops**0.4757,
        layers=layers,
        d_model=d_model,
        suggested_flops_per_token=flops_per_token(layers=layers, d_model=d_model),
        parameters=12 * layers * d_model**2,
    )


def flops_per_token(*, layers: int, d_model: int, length: int = LENGTH) -> int:
    """M of a dense model: 72 n d^2 for its products, 12 n d l for attention."""
    return 72 * layers * d_model**2 + 12 * layers * d_model * length


def suggest(model: float) -> tuple[int, int]:
    """(layers, d_model) with an M near `model`: the width is a number of whole heads,
    and near 128 times the depth.
    """

    def depth(d_model: int) -> int:
        return max(1, round(model / flops_per_token(layers=1, d_model=d_model)))

    def distance(d_model: int) -> float:
        layers = depth(d_model)
        size = flops_per_token(layers=layers, d_model=d_model)
        shape = math.log(d_model / layers / WIDTH_PER_LAYER)
        # a size wrong by a tenth weighs as much as a shape wrong by half
        return (10 * math.log(size / model)) ** 2 + (2 * shape) ** 2

    best = min(range(HEAD, 400 * HEAD, HEAD), key=distance)
    return depth(best), best
