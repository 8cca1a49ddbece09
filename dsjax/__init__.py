"""dsjax: the DeepSeek family in JAX.

import dsjax
model = dsjax.load(path)                       # Hugging Face or Orbax directory
logits = model(tokens)                         # int32 [B, T] -> float32 [B, T, V]
texts = dsjax.generate(model, ["def "], max_new_tokens=64)
dsjax.save(model, other_path)
config = dsjax.models.v3()
"""

import importlib

__version__ = "0.1.0"

# Imported on first use, so that `dsjax --help` does not wait for JAX.
_HOMES = {
    "load": "dsjax.api",
    "save": "dsjax.api",
    "generate": "dsjax.decode.generate",
    "Redundant": "dsjax.decode.eplb",
    "Transformer": "dsjax.nn.transformer",
    "make_mesh": "dsjax.sharding",
    "Sharding": "dsjax.sharding",
    "UserError": "dsjax.errors",
    **dict.fromkeys(
        ["Dense", "Gqa", "Mla", "ModelConfig", "Moe", "Rope", "Segment", "Yarn"],
        "dsjax.config",
    ),
}
_MODULES = ("checkpoint", "models")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dsjax.{name}")
    raise AttributeError(f"module 'dsjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
