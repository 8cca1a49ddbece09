"""An experiment as text: complete, the same for equal ones, different for others."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from dsjax.nn.options import Precision, Remat
from dsjax.train.experiment import describe
from dsjax.train.schedule import BatchSize, Constant, HoldCosine, Piecewise
from tests.train import tiny


def test_every_value_has_a_line():
    lines = describe(tiny.run()).splitlines()
    for line in (
        "name = 'tiny'",
        "model = ModelConfig",
        "model.attention.rope.scaling = None",
        "model.segments.0.feed_forward = Dense",
        "model.segments.1 = Segment",
        "model.segments.1.feed_forward.groups.score = TOP2_SUM",
        "data.sources = StandardLibrary",
        "data.documents = JOINED",
        "learning_rate = Cosine",
        "learning_rate.peak = 0.004",
        "objective.bias_speed = 0.01",
        "precision.compute = float32",
        "remat = NONE",
        "mesh.fsdp = 1",
        "initial = None",
    ):
        assert line in lines
    assert len({line.split(" = ")[0] for line in lines}) == len(lines)


def test_a_dtype_reads_the_same_however_it_was_written():
    texts = [
        describe(replace(tiny.run(), precision=Precision(compute=dtype)))
        for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"))
    ]
    assert len(set(texts)) == 1
    assert "precision.compute = bfloat16" in texts[0]
    assert "precision.params = float32" in describe(
        replace(tiny.run(), precision=Precision(params=np.float32))
    )


def test_other_experiments_read_differently():
    tail = ((10, 1e-4), (20, 2e-5))
    hold = HoldCosine(peak=1e-3, hold_tokens=10, decay_tokens=5, final=1e-4, tail=tail)
    others = [
        replace(tiny.run(), learning_rate=Constant(peak=4e-3, warmup=4)),
        replace(tiny.run(), learning_rate=hold),
        replace(tiny.run(), learning_rate=0.004),
        replace(tiny.run(), remat=Remat.V3),
    ]
    texts = [describe(other) for other in others]
    assert len({describe(tiny.run()), *texts}) == 5
    assert "learning_rate.tail = ((10, 0.0001), (20, 2e-05))\n" in texts[1]


def test_a_whole_number_for_a_float_reads_as_the_float():
    experiment = tiny.run()
    whole, split = (
        replace(experiment, ema=zero, learning_rate=one, batch=BatchSize(sequences=8))
        for zero, one in ((0, 1), (0.0, 1.0))
    )
    assert describe(whole) == describe(split)
    assert "ema = 0.0\nmesh" in describe(whole)
    assert "batch.sequences = 8\n" in describe(whole)
    piecewise = Piecewise(values=(1, 0), boundaries=(100,))
    text = describe(replace(experiment, learning_rate=piecewise))
    assert (
        "learning_rate.values = (1.0, 0.0)\nlearning_rate.boundaries = (100,)\n" in text
    )
