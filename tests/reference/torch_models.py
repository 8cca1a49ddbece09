"""The same checkpoints through torch and transformers, in float32.

transformers 5 does not know DeepSeekMoE's `deepseek` model type (see torch_moe.py),
gives V3's MTP logits only while it drafts (torch_mtp.py), and needs a GPU for FP8, so
that those weights are dequantised here, by torch's own e4m3.
"""

import contextlib
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.reference import files, torch_moe

torch.set_num_threads(1)  # at these sizes threads only wait for each other


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a model or an MTP module gave.

    logits: float32 [B, T, V]. indices: [B, T, k] a MoE layer, ascending for each token.
    affinity_logits: [B, T, E] a MoE layer, before softmax or sigmoid. hidden, residual:
    a model's last hidden states [B, T, D], after the final norm and before it.
    """

    logits: np.ndarray
    indices: list[np.ndarray]
    affinity_logits: list[np.ndarray]
    hidden: torch.Tensor | None = None
    residual: torch.Tensor | None = None


def load(directory: Path) -> nn.Module:
    """The checkpoint as a torch model, attention and experts in their plain form."""
    config, stored = files.read(directory)
    if config["model_type"] == "deepseek":
        return torch_moe.load(config, to_torch(stored))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if "n_routed_experts" in config:
        options["experts_implementation"] = "eager"
    with tempfile.TemporaryDirectory() as scratch:
        if quantization := config.pop("quantization_config", None):
            values = dequantize(stored, quantization["weight_block_size"])
            directory = files.write_files(config, values, Path(scratch) / "float32")
        return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@torch.no_grad()
def forward(model: nn.Module, tokens: np.ndarray) -> Reference:
    """Runs `model` on int32 tokens [B, T]."""
    norms: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.model.norm.register_forward_hook(
        lambda _, inputs, output: norms.append((inputs[0], output))
    )
    with watch_routers(model, tokens.shape) as seen:
        logits = model(torch.from_numpy(tokens).long(), use_cache=False).logits
    hook.remove()
    [(residual, hidden)] = norms
    return Reference(logits=logits.numpy(), **seen, hidden=hidden, residual=residual)


@contextlib.contextmanager
def watch_routers(
    module: nn.Module, shape: tuple[int, ...]
) -> Iterator[dict[str, list[np.ndarray]]]:
    """Collects what every router gives for tokens of `shape`: `Reference`'s fields."""
    seen: dict[str, list[np.ndarray]] = {"indices": [], "affinity_logits": []}

    def record(_: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits, _weights, indices = output
        chosen = indices.reshape(*shape, -1).sort().values
        seen["indices"].append(chosen.numpy())
        seen["affinity_logits"].append(logits.reshape(*shape, -1).numpy())

    hooks = [router.register_forward_hook(record) for router in routers(module)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def routers(module: nn.Module) -> list[nn.Module]:
    """The routers in layer order; each returns logits, weights and indices."""
    return [part.gate for part in module.modules() if hasattr(part, "experts")]


def to_torch(stored: files.Tensors) -> dict[str, torch.Tensor]:
    """Float32 tensors of values that are not quantised."""
    return {
        name: torch.from_numpy(value.astype(np.float32))
        for name, value in stored.items()
    }


def dequantize(stored: files.Tensors, block: list[int]) -> files.Tensors:
    """The weights of an FP8 checkpoint times their blocks' scales; others as stored."""
    values = {}
    for name, value in stored.items():
        if f"{name}_scale_inv" in stored:
            rows, columns = value.shape
            scale = torch.from_numpy(stored[f"{name}_scale_inv"].copy())
            scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            bits = torch.from_numpy(value.view(np.uint8).copy())
            weight = bits.view(torch.float8_e4m3fn).float() * scale[:rows, :columns]
            value = weight.numpy()
        if not name.endswith("_scale_inv"):
            values[name] = value
    return values


# --- How far is float32 from the truth?


class _Float64Torch(types.ModuleType):
    """torch, but asking it for float32 gives float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float64(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in double precision, also where transformers asks for float32.

    That is in norms, softmax, routers and rotary angles.
    """
    modules = {
        sys.modules[type(part).__module__]
        for part in model.modules()
        if "modeling" in type(part).__module__
    }
    try:
        for module in modules:
            module.torch = _Float64Torch("torch")
        yield model.double()
    finally:
        for module in modules:
            module.torch = torch
        model.float()
