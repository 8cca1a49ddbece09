"""DeepSeekMoE's claim in miniature: many small experts and a shared one beat few large.

Three models see the same tokens in the same order. GShard routes each token to 2 of 16
experts; DeepSeekMoE cuts each into four, shares one, and routes to 7 of 63: the same
parameters in all and in use. The dense model spends the same operations. Measured: the
held-out loss, and how it rises when each token loses its best routed experts (2401.06066,
sections 4.2 and 4.5; there 1.808, 1.867 and, with half the operations, 2.060).

    python -m experiments.granularity --corpus DIR --out DIR
"""

from dsjax.config import Dense, Gqa, ModelConfig, Moe, Segment
from dsjax.data.mixture import Data, Source
from dsjax.models import small_init_std
from dsjax.train.experiment import Checkpoints, Evaluation, Experiment
from dsjax.train.objective import Objective
from dsjax.train.schedule import BatchSize, MultiStep

D_MODEL, LAYERS, VOCABULARY, LENGTH = 512, 8, 8192, 1024
WIDTH = 1408  # of a standard feed-forward: 8/3 of d_model, divisible by 4
SEQUENCES, STEPS = 32, 1500
CORPUS = Data(
    sources=(Source(path="corpus/train"),),
    held_out="corpus/held_out",
)


def deepseek_moe() -> Experiment:
    """One shared and 63 routed experts of a quarter width, 7 for each token.

    Command: python -m experiments.granularity (all arms and seeds)
    Hardware, cost, result: LOG.md.
    """
    width = WIDTH // 4
    return _arm("deepseek_moe", Moe(num_experts=63, num_shared=1, top_k=7, width=width))


def gshard() -> Experiment:
    """Sixteen experts of the standard width, 2 for each token, gates that add up to 1.

    Command: python -m experiments.granularity (all arms and seeds)
    Hardware, cost, result: LOG.md.
    """
    moe = Moe(num_experts=16, num_shared=0, top_k=2, width=WIDTH, renormalize=True)
    return _arm("gshard", moe)


def dense() -> Experiment:
    """Twice the standard width for every token: what the other two spend on one.

    Command: python -m experiments.granularity (all arms and seeds)
    Hardware, cost, result: LOG.md.
    """
    return _arm("dense", Dense(width=2 * WIDTH))


def small_model(name: str, feed_forward: Dense | Moe) -> ModelConfig:
    """A decoder of 8 equal layers, as in the paper's validation runs."""
    return ModelConfig(
        name=name,
        vocab_size=VOCABULARY,
        d_model=D_MODEL,
        attention=Gqa(num_heads=8, num_kv_heads=8, head_dim=64),
        segments=(Segment(count=LAYERS, feed_forward=feed_forward),),
        max_length=LENGTH,
        init_std=small_init_std(D_MODEL),
    )


def small_run(name: str, model: ModelConfig, objective: Objective) -> Experiment:
    """What all arms of both comparisons share: data, batch, rates."""
    return Experiment(
        name=name,
        model=model,
        data=CORPUS,
        length=LENGTH,
        tokens=STEPS * SEQUENCES * LENGTH,
        batch=BatchSize(sequences=SEQUENCES),
        microbatch=SEQUENCES,
        learning_rate=MultiStep(peak=1.5e-3, warmup=150, factors=(0.316, 0.0999)),
        objective=objective,
        evaluation=Evaluation(every_steps=500),
        checkpoints=Checkpoints(every_minutes=0),
    )


def _arm(name: str, feed_forward: Dense | Moe) -> Experiment:
    routed = isinstance(feed_forward, Moe)
    objective = Objective(expert_balance=0.01 if routed else 0.0)
    return small_run(name, small_model(name, feed_forward), objective)
