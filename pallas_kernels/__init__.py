"""Kernels: one face per operation, each with a plain-JAX reference."""
