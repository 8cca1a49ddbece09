"""Products of FP8 operands with a scale for every block, as DeepSeek-V3 has them."""

from pallas_kernels.fp8_matmul.api import (
    fp8_matmul,
    grouped_fp8_matmul,
    quantize_rows,
)
from pallas_kernels.fp8_matmul.quantize import quantize_blocks

__all__ = ["fp8_matmul", "grouped_fp8_matmul", "quantize_blocks", "quantize_rows"]
