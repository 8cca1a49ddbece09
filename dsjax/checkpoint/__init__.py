"""Checkpoints: published safetensors <-> Orbax, and either form onto a mesh."""

from dsjax.checkpoint.convert import convert, export
from dsjax.checkpoint.load import load, save

__all__ = ["convert", "export", "load", "save"]
