"""The pre-training runs of the papers, with the papers' numbers.

Model, tokens, batch, rates, losses and their schedules are the papers'. The papers'
data is not public: `dsjax tokenize` prepares one's own, and `--set` names it. Mesh,
microbatch and rematerialisation are ours, for the TPU slice that a docstring names;
`--set mesh.fsdp=...` adapts them. Costs are operations alone: 6 for each parameter that
is active for a token, and attention's, at 40% of the chips' peak.
"""

from dataclasses import replace

from dsjax import models
from dsjax.config import Mla, ModelConfig
from dsjax.data.mixture import Data, Source
from dsjax.nn.options import Remat
from dsjax.train.experiment import Experiment, MeshShape
from dsjax.train.objective import Dropping, Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.schedule import (
    BatchSize,
    Constant,
    HoldCosine,
    MultiStep,
    Piecewise,
)

T = 10**12
B = 10**9
DATA = Data(sources=(Source(path="tokens/train"),), held_out="tokens/held_out")


def before_extension(model: ModelConfig, length: int = 4096) -> ModelConfig:
    """The model as it was pre-trained: YaRN came after (V2, section 3.1.4)."""
    if isinstance(model.attention, Mla):
        rope = replace(model.attention.rope, scaling=None)
        model = replace(model, attention=replace(model.attention, rope=rope))
    return replace(model, max_length=length)


def pretrain_llm_7b() -> Experiment:
    """DeepSeek LLM 7B (2401.02954, table 2 and section 2.3).

    Command: dsjax train experiments.pretrain_llm_7b --set data.sources.0.path=DIR
    Hardware: v5p:4x4x4 (64 chips). Cost: 8.4e22 FLOPs, about 83 days there.
    Expect: HellaSwag 75.4, MMLU 48.2, GSM8K 17.4 (the paper's base model).
    """
    return Experiment(
        name="pretrain_llm_7b",
        model=models.llm_7b(),
        data=DATA,
        length=4096,
        tokens=2 * T,
        batch=BatchSize(sequences=2304),
        microbatch=256,
        learning_rate=MultiStep(peak=4.2e-4),
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=64),
    )


def pretrain_llm_67b() -> Experiment:
    """DeepSeek LLM 67B (2401.02954, table 2 and section 2.3).

    Command: dsjax train experiments.pretrain_llm_67b --set data.sources.0.path=DIR
    Hardware: v5p:8x8x8 (512 chips). Cost: 8.4e23 FLOPs, about 103 days there.
    Expect: HellaSwag 84.0, MMLU 71.3, GSM8K 63.4 (the paper's base model).
    """
    return Experiment(
        name="pretrain_llm_67b",
        model=models.llm_67b(),
        data=DATA,
        length=4096,
        tokens=2 * T,
        batch=BatchSize(sequences=4608),
        microbatch=512,
        learning_rate=MultiStep(peak=3.2e-4),
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=512),
    )


# DeepSeekMoE lowers its rate by the same factor twice.
TWICE = (0.316, 0.316 * 0.316)


def pretrain_moe_2b() -> Experiment:
    """DeepSeekMoE's validation model (2401.06066, section 4.1): vocabulary of 8,192.

    Command: dsjax train experiments.pretrain_moe_2b --set data.sources.0.path=DIR
    Hardware: v5p:2x2x1 (4 chips). Cost: 2.1e20 FLOPs, about 3 days there.
    Expect: Pile loss 1.808 (GShard 1.867, dense of one expert's FLOPs 2.060).
    """
    return Experiment(
        name="pretrain_moe_2b",
        model=models.moe_2b(),
        data=DATA,
        length=2048,
        tokens=25_000 * 2048 * 2048,
        batch=BatchSize(sequences=2048),
        microbatch=64,
        learning_rate=MultiStep(peak=1.08e-3, factors=TWICE),
        objective=Objective(expert_balance=0.01),
        mesh=MeshShape(fsdp=4),
    )


def pretrain_moe_16b() -> Experiment:
    """DeepSeekMoE 16B (2401.06066, section 5.1.2).

    Command: dsjax train experiments.pretrain_moe_16b --set data.sources.0.path=DIR
    Hardware: v5p:4x4x4 (64 chips). Cost: 3.4e22 FLOPs, about 34 days there.
    Expect: HellaSwag 77.1, MMLU 45.0, GSM8K 18.8 (the paper's base model).
    """
    return Experiment(
        name="pretrain_moe_16b",
        model=models.moe_16b(),
        data=DATA,
        length=4096,
        tokens=106_449 * 4608 * 4096,
        batch=BatchSize(sequences=4608),
        microbatch=256,
        learning_rate=MultiStep(peak=4.2e-4, factors=TWICE),
        objective=Objective(expert_balance=0.001),
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=16, expert=4),
    )


def pretrain_moe_145b() -> Experiment:
    """DeepSeekMoE 145B (2401.06066, section 7.1): constant rate, 245B tokens.

    Command: dsjax train experiments.pretrain_moe_145b --set data.sources.0.path=DIR
    Hardware: v5p:8x8x8 (512 chips). Cost: 3.4e22 FLOPs, about 4 days there.
    Expect: Pile loss 1.876 (the paper's).
    """
    return Experiment(
        name="pretrain_moe_145b",
        model=models.moe_145b(),
        data=DATA,
        length=4096,
        tokens=13_000 * 4608 * 4096,
        batch=BatchSize(sequences=4608),
        microbatch=512,
        learning_rate=Constant(peak=3.0e-4),
        objective=Objective(expert_balance=0.003, device_balance=0.05, devices=4),
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=128, expert=4),
    )


def pretrain_v2_lite() -> Experiment:
    """DeepSeek-V2-Lite (2405.04434, appendix B): 5.7T tokens, no device limits.

    Command: dsjax train experiments.pretrain_v2_lite --set data.sources.0.path=DIR
    Hardware: v5p:4x4x4 (64 chips). Cost: 9.4e22 FLOPs, about 92 days there.
    Expect: MMLU 58.3, GSM8K 41.1, HumanEval 29.9 (the paper's base model).
    """
    return Experiment(
        name="pretrain_v2_lite",
        model=before_extension(models.v2_lite()),
        data=DATA,
        length=4096,
        tokens=5_700 * B,
        batch=BatchSize(sequences=4608),
        microbatch=256,
        learning_rate=MultiStep(peak=4.2e-4, factors=TWICE),
        objective=Objective(sequence_balance=0.001),
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=16, expert=4),
    )


def pretrain_v2() -> Experiment:
    """DeepSeek-V2 (2405.04434, section 3.1): three balance losses and token dropping.

    Command: dsjax train experiments.pretrain_v2 --set data.sources.0.path=DIR
    Hardware: v5p:8x8x8 (512 chips). Cost: 1.26e24 FLOPs, about 155 days there.
    Expect: MMLU 78.5, GSM8K 79.2, HumanEval 48.8 (the paper's base model).
    The paper does not say in which steps the batch grew: ten sizes here.
    """
    return Experiment(
        name="pretrain_v2",
        model=before_extension(models.v2()),
        data=DATA,
        length=4096,
        tokens=8_100 * B,
        batch=BatchSize(sequences=9216, start=2304, ramp_tokens=225 * B, increment=768),
        microbatch=768,
        learning_rate=MultiStep(peak=2.4e-4, fractions=(0.6, 0.9), factors=TWICE),
        objective=Objective(
            sequence_balance=0.003,
            device_balance=0.05,
            communication_balance=0.02,
            devices=8,
            dropping=Dropping(devices=8, capacity=1.0, protected=0.1),
        ),
        remat=Remat.FULL,
        mesh=MeshShape(fsdp=32, expert=8, tensor=2),
    )


def pretrain_v3() -> Experiment:
    """DeepSeek-V3 (2412.19437, section 4.2): no auxiliary loss to speak of, and MTP.

    Command: dsjax train experiments.pretrain_v3 --set data.sources.0.path=DIR
    Hardware: v5p:8x8x16 (1,024 chips). Cost: 3.7e24 FLOPs, about 228 days there (the
    paper: 2.664M H800 hours).
    Expect: MMLU 87.1, GSM8K 89.3, HumanEval 65.2 (the paper's base model).
    The paper does not say in which steps the batch grew (thirteen sizes here), nor the
    decay of its average of parameters (`--set ema=...`).
    """
    return Experiment(
        name="pretrain_v3",
        model=before_extension(models.v3()),
        data=replace(DATA, fim_rate=0.1),
        length=4096,
        tokens=14_800 * B,
        batch=BatchSize(
            sequences=15360, start=3072, ramp_tokens=469 * B, increment=1024
        ),
        microbatch=1024,
        learning_rate=HoldCosine(
            peak=2.2e-4,
            hold_tokens=10 * T,
            decay_tokens=4_300 * B,
            final=2.2e-5,
            tail=((333 * B, 2.2e-5), (167 * B, 7.3e-6)),
        ),
        optimizer=AdamW(moments="bfloat16"),
        objective=Objective(
            sequence_balance=1e-4,
            bias_speed=Piecewise(values=(0.001, 0.0), boundaries=(14_300 * B,)),
            mtp=Piecewise(values=(0.3, 0.1), boundaries=(10 * T,)),
        ),
        remat=Remat.V3,
        mesh=MeshShape(fsdp=128, expert=8),
    )
