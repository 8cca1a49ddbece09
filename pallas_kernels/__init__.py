"""Kernels: one face per operation, each with a plain-JAX reference."""

from pallas_kernels.dispatch import reference_only

__all__ = ["reference_only"]
