"""Attention of a few new tokens on cached latents (MLA, absorbed)."""

from pallas_kernels.mla_decode.api import append, mla_decode, quantize_latents

__all__ = ["append", "mla_decode", "quantize_latents"]
