"""Longer contexts with YaRN, after pre-training (V2, section 3.1.4; V3, section 4.3).

`initial` names the weights to go on from: `--set initial=DIR`, a checkpoint of the run
before. The rotary keys' frequencies change, no weight does.
"""

from dataclasses import replace

from dsjax import models
from dsjax.nn.options import Remat
from dsjax.train.experiment import Experiment, MeshShape
from dsjax.train.schedule import BatchSize, Constant
from experiments.pretrain import pretrain_v2, pretrain_v3

STEPS = 1000  # of every phase, in both papers


def v2_32k() -> Experiment:
    """V2 at 32K for 1,000 steps of 576 sequences; the model then works to 128K.

    Command: dsjax train experiments.v2_32k --set initial=runs/pretrain_v2/model
    Hardware: v5p:8x8x8 (512 chips). Cost: 6.9e21 FLOPs, about 0.9 days there.
    Expect: needles found at every depth up to 128K (the paper's figure 4).
    The paper gives no learning rate: the last one of pre-training here.
    """
    before = pretrain_v2()
    return replace(
        before,
        name="v2_32k",
        model=replace(models.v2(), max_length=32768),
        length=32768,
        tokens=STEPS * 576 * 32768,
        batch=BatchSize(sequences=576),
        microbatch=64,
        learning_rate=Constant(peak=2.4e-4 * 0.316**2, warmup=0),
        mesh=MeshShape(fsdp=8, expert=8, tensor=8),
        initial="runs/pretrain_v2/model",
    )


def v3_32k() -> Experiment:
    """V3's first phase: 32K for 1,000 steps of 1,920 sequences.

    Command: dsjax train experiments.v3_32k --set initial=runs/pretrain_v3/model
    Hardware: v5p:8x8x16 (1,024 chips). Cost: 2.9e22 FLOPs, about 1.8 days there (the
    paper: both phases 119K H800 hours).
    Expect: the loss at positions below 4K as before, and lower beyond.
    """
    return _v3_phase(
        "v3_32k",
        length=32768,
        sequences=1920,
        before="pretrain_v3",
        mesh=MeshShape(fsdp=16, expert=8, tensor=8),
    )


def v3_128k() -> Experiment:
    """V3's second phase: 128K for 1,000 steps of 480 sequences.

    Command: dsjax train experiments.v3_128k --set initial=runs/v3_32k/model
    Hardware: v5p:8x8x16 (1,024 chips). Cost: 7.6e22 FLOPs, about 4.7 days there.
    Expect: needles found at every depth up to 128K (the paper's figure 8).
    """
    return _v3_phase(
        "v3_128k",
        length=131072,
        sequences=480,
        before="v3_32k",
        mesh=MeshShape(fsdp=4, expert=8, tensor=32),
    )


def _v3_phase(
    name: str, *, length: int, sequences: int, before: str, mesh: MeshShape
) -> Experiment:
    run = pretrain_v3()
    return replace(
        run,
        name=name,
        model=replace(models.v3(), max_length=length),
        length=length,
        tokens=STEPS * sequences * length,
        batch=BatchSize(sequences=sequences),
        microbatch=min(sequences, 2**22 // length),
        learning_rate=Constant(peak=7.3e-6, warmup=0),
        # as pre-training ended: the biases rest, MTP weighs 0.1
        objective=replace(run.objective, bias_speed=0.0, mtp=0.1),
        remat=Remat.FULL,
        mesh=mesh,
        initial=f"runs/{before}/model",
    )
