"""Products of rows sorted by group with each group's own matrix."""

from pallas_kernels.grouped_matmul.api import (
    grouped_feed_forward,
    grouped_matmul,
    grouped_swiglu,
)

__all__ = ["grouped_feed_forward", "grouped_matmul", "grouped_swiglu"]
