"""DeepSeekMoE 16B in torch (arXiv 2401.06066, section 3): Llama's decoder with MoE.

The released code is not part of transformers; attention, norms and rotary embedding are
transformers' Llama, the mixture of experts is written from the paper.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

FIELDS = (  # of config.json that mean the same for Llama
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)


class SoftmaxRouter(nn.Module):
    """Softmax over all routed experts; the k best keep their affinity as weight."""

    def __init__(self, experts: int, model: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, model))
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[.., D] -> (logits [.., E], weights [.., k], indices [.., k])."""
        logits = x @ self.weight.T
        return logits, *logits.softmax(-1).topk(self.top_k, dim=-1)


class MixtureOfExperts(nn.Module):
    """Routed experts, each over all tokens, and the shared experts as one wider one."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        model, width = config["hidden_size"], config["moe_intermediate_size"]
        count = config["n_routed_experts"]
        self.gate = SoftmaxRouter(count, model, config["num_experts_per_tok"])
        self.experts = nn.ModuleList(_swiglu(model, width) for _ in range(count))
        self.shared_experts = _swiglu(model, width * config["n_shared_experts"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        _, weights, indices = self.gate(x)
        output = self.shared_experts(x)
        for number, expert in enumerate(self.experts):
            weight = (weights * (indices == number)).sum(-1, keepdim=True)
            output = output + weight * expert(x)
        return output


def _swiglu(model: int, width: int) -> LlamaMLP:
    sizes = {"hidden_size": model, "intermediate_size": width}
    return LlamaMLP(LlamaConfig(**sizes, num_attention_heads=1))


def load(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """The model of a `deepseek` checkpoint: its config.json and its float32 tensors."""
    llama = LlamaConfig(**{name: config.get(name) for name in FIELDS})
    llama._attn_implementation = "eager"
    model = LlamaForCausalLM(llama).float()
    for layer in model.model.layers[config["first_k_dense_replace"] :]:
        layer.mlp = MixtureOfExperts(config)
    model.load_state_dict(weights, strict=True)
    return model.eval()
