"""V3's multi-token prediction in torch (arXiv 2412.19437, section 2.2).

transformers runs it only while it drafts, for the last token of one sequence; here its
decoder layer and norm give the logits of whole sequences. test_parity_live.py checks
this module against transformers' drafting.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from tests.reference import files
from tests.reference.torch_models import (
    Reference,
    dequantize,
    to_torch,
    watch_routers,
)


class Mtp(nn.Module):
    """Block(W [RMSNorm(next embedding); RMSNorm(hidden)]), then its own norm."""

    def __init__(self, config: v3.DeepseekV3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = v3.DeepseekV3RMSNorm(size, eps)
        self.hnorm = v3.DeepseekV3RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = v3.DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.norm = v3.DeepseekV3RMSNorm(size, eps)

    def forward(
        self, hidden: torch.Tensor, embedding: torch.Tensor, **block_arguments: Any
    ) -> torch.Tensor:
        """Both [B, T, D], hidden of tokens i, embedding of tokens i + 1."""
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], -1))
        return self.norm(self.block(x, **block_arguments))


@torch.no_grad()
def forward(
    model: nn.Module, module: Mtp, hidden: torch.Tensor, tokens: np.ndarray
) -> Reference:
    """Logits [B, T - 1, V]: hidden state i and token i + 1 predict token i + 2.

    `hidden` [B, T, D] is what `model` left for int32 `tokens` [B, T]: after its final
    norm, as serving code does, or before it.
    """
    embedding = model.model.embed_tokens(torch.from_numpy(tokens[:, 1:]).long())
    positions = torch.arange(embedding.shape[1])[None]
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=embedding,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    angles = model.model.rotary_emb(embedding, positions)
    with watch_routers(module, embedding.shape[:2]) as seen:
        output = module(
            hidden[:, :-1],
            embedding,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=angles,
        )
    return Reference(logits=model.lm_head(output).numpy(), **seen)


def load(directory: Path, model: nn.Module) -> Mtp:
    """The MTP module of a V3 checkpoint in float32; `model` is its main model."""
    config, stored = files.read(directory)
    if quantization := config.get("quantization_config"):
        stored = dequantize(stored, quantization["weight_block_size"])
    prefix = f"model.layers.{config['num_hidden_layers']}."
    rest = {
        name.removeprefix(prefix): value
        for name, value in to_torch(stored).items()
        if name.startswith(prefix)
    }
    for copy_of_main in ("embed_tokens.weight", "shared_head.head.weight"):
        del rest[copy_of_main]
    own = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
    state = {name: rest.pop(name) for name in own}
    state["norm.weight"] = rest.pop("shared_head.norm.weight")
    block = _stack_experts(rest, config["n_routed_experts"])
    state |= {f"block.{name}": value for name, value in block.items()}
    module = Mtp(model.config).float().eval()
    module.load_state_dict(state, strict=True)
    return module


def _stack_experts(
    layer: dict[str, torch.Tensor], count: int
) -> dict[str, torch.Tensor]:
    """The tensors of a layer as transformers keeps them: its experts in two arrays."""
    layer = dict(layer)
    gate, up, down = (
        torch.stack(
            [
                layer.pop(f"mlp.experts.{expert}.{kind}.weight")
                for expert in range(count)
            ]
        )
        for kind in ("gate_proj", "up_proj", "down_proj")
    )
    layer["mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
    layer["mlp.experts.down_proj"] = down
    return layer
