"""The model that training speed is measured with, on one GPU.

DeepSeekMoE's 2B model (2401.06066, table 7) with V2's attention and a vocabulary of
32,000: 1.94 billion parameters, of which a token uses 0.33 (without its embedding).
benchmarks/train_speed.md has what frameworks reach on it.
"""

from dataclasses import replace

import jax.numpy as jnp

from dsjax.config import Dense, Mla, ModelConfig, Moe, Rope, Segment
from dsjax.data.mixture import Data, StandardLibrary
from dsjax.nn.options import Precision, Remat
from dsjax.train.experiment import Experiment
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.schedule import BatchSize, Constant


def model() -> ModelConfig:
    """9 layers of width 1280, the first one dense; 64 experts of 896, 7 a token."""
    moe = Moe(num_experts=64, num_shared=1, top_k=7, width=896)
    return ModelConfig(
        name="moe_mla_2b",
        vocab_size=32000,
        d_model=1280,
        attention=Mla(
            num_heads=10,
            kv_rank=512,
            q_rank=None,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            rope=Rope(interleaved=True),
        ),
        segments=(
            Segment(count=1, feed_forward=Dense(width=3584)),
            Segment(count=8, feed_forward=moe),
        ),
        max_length=2048,
    )


def moe_mla_2b() -> Experiment:
    """Float32 master weights, gradients and moments; compute in bfloat16.

    Command: python -m benchmarks.train_speed experiments.speed.moe_mla_2b
    Hardware: one H200. Cost: a minute. Expect: see benchmarks/train_speed.md.
    """
    return Experiment(
        name="moe_mla_2b",
        model=model(),
        data=Data(sources=StandardLibrary()),
        length=2048,
        tokens=1000 * 16 * 2048,
        batch=BatchSize(sequences=16),
        microbatch=16,
        learning_rate=Constant(peak=3e-4),
        objective=Objective(expert_balance=0.01, chunk=16 * 2048),
        remat=Remat.V3,
        unroll=8,
    )


def moe_mla_2b_bf16() -> Experiment:
    """The same with weights, gradients and moments in bfloat16, logits in float16.

    Command: python -m benchmarks.train_speed experiments.speed.moe_mla_2b_bf16
    Hardware: one H200. Cost: a minute. Expect: see benchmarks/train_speed.md.
    """
    return replace(
        moe_mla_2b(),
        name="moe_mla_2b_bf16",
        optimizer=AdamW(moments=jnp.bfloat16),
        precision=Precision(
            params=jnp.bfloat16, gradients=jnp.bfloat16, logits=jnp.float16
        ),
    )
