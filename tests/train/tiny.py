"""A tiny V3 on a small corpus: the experiment of the tests, `tests.train.tiny.run`."""

import asyncio
from dataclasses import replace
from pathlib import Path

from dsjax.config import (
    Dense,
    Groups,
    GroupScore,
    Mla,
    ModelConfig,
    Moe,
    Rope,
    Score,
    Segment,
)
from dsjax.data.mixture import Data, StandardLibrary
from dsjax.nn.options import Precision
from dsjax.train.experiment import (  # noqa: F401
    Checkpoints,
    Evaluation,
    Experiment,
    MeshShape,
)
from dsjax.train.objective import Objective
from dsjax.train.schedule import BatchSize, Cosine

CORPUS = str(Path(asyncio.__file__).parent)  # a few files that no edit changes

MOE = Moe(
    num_experts=8,
    num_shared=1,
    top_k=2,
    width=32,
    score=Score.SIGMOID,
    groups=Groups(count=4, kept=2, score=GroupScore.TOP2_SUM),
    renormalize=True,
    selection_bias=True,
)


def model() -> ModelConfig:
    return ModelConfig(
        name="tiny",
        vocab_size=320,
        d_model=64,
        attention=Mla(
            num_heads=2,
            kv_rank=32,
            q_rank=32,
            nope_dim=16,
            rope_dim=16,
            value_dim=16,
            rope=Rope(interleaved=True),
        ),
        segments=(
            Segment(count=1, feed_forward=Dense(width=128)),
            Segment(count=2, feed_forward=MOE),
        ),
        max_length=512,
        mtp=True,
        init_std=0.08,
    )


def run() -> Experiment:
    return Experiment(
        name="tiny",
        model=model(),
        data=Data(
            sources=StandardLibrary(vocab_size=320, held_out_percent=10, root=CORPUS)
        ),
        length=32,
        tokens=12 * 8 * 32,
        batch=BatchSize(sequences=8),
        microbatch=4,
        learning_rate=Cosine(peak=4e-3, warmup=4),
        objective=Objective(sequence_balance=1e-4, bias_speed=1e-2, mtp=0.3),
        precision=Precision(compute="float32"),
        evaluation=Evaluation(every_steps=5, sequences=8),
        checkpoints=Checkpoints(every_minutes=0, every_steps=2, keep=2),
    )


def dense() -> Experiment:
    """One dense layer: compiles in a moment."""
    experiment = run()
    segments = experiment.model.segments[:1]
    return replace(
        experiment,
        name="dense",
        model=replace(experiment.model, segments=segments, mtp=False),
        objective=Objective(),
        microbatch=8,
    )
