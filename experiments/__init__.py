"""Experiments: one function each, which returns a frozen `Experiment`.

`dsjax train experiments.NAME` runs one. A function with a paper's name carries that
paper's numbers; results are in LOG.md.
"""

from experiments.extend import v2_32k, v3_32k, v3_128k
from experiments.pretrain import (
    pretrain_llm_7b,
    pretrain_llm_67b,
    pretrain_moe_2b,
    pretrain_moe_16b,
    pretrain_moe_145b,
    pretrain_v2,
    pretrain_v2_lite,
    pretrain_v3,
)
from experiments.tiny import pretrain_tiny_v3

PUBLISHED = (
    pretrain_llm_7b,
    pretrain_llm_67b,
    pretrain_moe_2b,
    pretrain_moe_16b,
    pretrain_moe_145b,
    pretrain_v2_lite,
    pretrain_v2,
    pretrain_v3,
    v2_32k,
    v3_32k,
    v3_128k,
)

__all__ = ["PUBLISHED", "pretrain_tiny_v3", *(make.__name__ for make in PUBLISHED)]
