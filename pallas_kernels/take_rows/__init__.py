"""Rows of a matrix by their index."""

from pallas_kernels.take_rows.api import take_rows

__all__ = ["take_rows"]
