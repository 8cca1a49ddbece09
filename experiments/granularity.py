"""DeepSeekMoE's claim in miniature: many small experts and a shared one beat few large.

Three models see the same tokens in the same order. GShard routes each token to 2 of 16
experts; DeepSeekMoE cuts each into four, shares one, and routes to 7 of 63: the same
parameters in all and in use. The dense model spends the same operations. Measured: the
held-out loss, and how it rises when each token loses its best routed experts (2401.06066,
sections 4.2 and 4.5; there 1.808, 1.867 and, with half the operations, 2.060).

    python -m experiments.granularity --corpus DIR --out DIR
"""

from pathlib import Path

import numpy as np

from dsjax import count
from dsjax.config import Dense, Gqa, ModelConfig, Moe, Segment
from dsjax.data.mixture import Data, Source
from dsjax.models import small_init_std
from dsjax.train.experiment import Checkpoints, Evaluation, Experiment
from dsjax.train.objective import Objective
from dsjax.train.schedule import BatchSize, MultiStep
from experiments import miniature

D_MODEL, LAYERS, VOCABULARY, LENGTH = 384, 6, 8192, 1024
WIDTH = 1024  # of a standard feed-forward: 8/3 of d_model
SEQUENCES, STEPS = 32, 800
CORPUS = Data(
    sources=(Source(path="corpus/train"),),
    held_out="corpus/held_out",
)


def deepseek_moe() -> Experiment:
    """One shared and 63 routed experts of a quarter width, 7 for each token.

    Command: python -m experiments.granularity (all arms and seeds)
    Hardware: one H200. Cost: 26 M tokens, 40 s a run with three at once.
    Expect: 2.371 nats a token held out (seeds within 0.010).
    """
    width = WIDTH // 4
    return _arm("deepseek_moe", Moe(num_experts=63, num_shared=1, top_k=7, width=width))


def gshard() -> Experiment:
    """Sixteen experts of the standard width, 2 for each token, gates that add up to 1.

    Command: python -m experiments.granularity (all arms and seeds)
    Hardware: one H200. Cost: 26 M tokens, 40 s a run with three at once.
    Expect: 2.512 nats a token held out (seeds within 0.030).
    """
    moe = Moe(num_experts=16, num_shared=0, top_k=2, width=WIDTH, renormalize=True)
    return _arm("gshard", moe)


def dense() -> Experiment:
    """Twice the standard width for every token: what the other two spend on one.

    Command: python -m experiments.granularity (all arms and seeds)
    Hardware: one H200. Cost: 26 M tokens, 40 s a run with three at once.
    Expect: 2.413 nats a token held out (seeds within 0.042).
    """
    return _arm("dense", Dense(width=2 * WIDTH))


def small_model(name: str, feed_forward: Dense | Moe) -> ModelConfig:
    """A decoder of equal layers, as in the paper's validation runs."""
    return ModelConfig(
        name=name,
        vocab_size=VOCABULARY,
        d_model=D_MODEL,
        attention=Gqa(num_heads=6, num_kv_heads=6, head_dim=64),
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
        learning_rate=MultiStep(peak=2e-3, warmup=100, factors=(0.316, 0.0999)),
        objective=objective,
        evaluation=Evaluation(every_steps=150, sequences=256),
        checkpoints=Checkpoints(every_minutes=0),
    )


def _arm(name: str, feed_forward: Dense | Moe) -> Experiment:
    routed = isinstance(feed_forward, Moe)
    objective = Objective(expert_balance=0.01 if routed else 0.0)
    return small_run(name, small_model(name, feed_forward), objective)


ARMS = (deepseek_moe, gshard, dense)


def report(out: Path) -> str:
    """A table of the arms; writes it and the figure beside the runs."""
    arms = miniature.results(out)
    columns = "arm", "parameters", "in use", "held-out loss", "by seed"
    rows = [_row(arm, arms[arm.__name__]) for arm in ARMS if arm.__name__ in arms]
    _figure(arms, out)
    return miniature.write_table(out, (*columns, "with 4/16 masked"), rows)


def _row(arm: miniature.Arm, runs: list[dict]) -> list[str]:
    counted = count.count(arm().model)
    rises = [rise[-1] for rise in map(_rises, runs) if len(rise) > 1]
    masked = f"{np.mean(rises):+.3f} (spread {np.ptp(rises):.3f})" if rises else "-"
    sizes = [f"{size / 1e6:.1f} M" for size in (counted.parameters, counted.active)]
    return [arm.__name__, *sizes, *miniature.losses(runs), masked]


def _rises(run: dict) -> np.ndarray:
    """How far each share of masked experts lifts the held-out loss, none first."""
    losses = [
        run["masked"][n] for n in map(str, miniature.MASKED) if n in run["masked"]
    ]
    return np.array(losses) - losses[0]


def _figure(arms: dict[str, list[dict]], out: Path) -> None:
    figure, (left, right) = miniature.canvas(2)
    shares = np.array(miniature.MASKED) / 16
    for name, runs in arms.items():
        miniature.plot(left, runs, "held_out_loss", name)
        if len(_rises(runs[0])) > 1:
            miniature.band(
                right, shares, [_rises(run) for run in runs], name, marker="o"
            )
    left.set(xlabel="step", ylabel="held-out loss (nats a token)")
    right.set(xlabel="share of routed experts masked", ylabel="rise of held-out loss")
    miniature.save(figure, out)


if __name__ == "__main__":
    miniature.main(__doc__, ARMS, report)
