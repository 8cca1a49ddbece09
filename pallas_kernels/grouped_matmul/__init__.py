"""Products of rows sorted by group with each group's own matrix."""

from pallas_kernels.grouped_matmul.api import (
    feed_forward,
    grouped_feed_forward,
    grouped_matmul,
    grouped_swiglu,
)

__all__ = ["feed_forward", "grouped_feed_forward", "grouped_matmul", "grouped_swiglu"]
