"""Arms times seeds: several small runs at once on one device, and what they measured.

A comparison (`experiments.granularity`, `experiments.balancing`) names its arms; this
runs each with each seed in a process of its own, which trains, measures the held-out
loss, and measures it again with each token's best routed experts masked.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsjax.config import ModelConfig, Moe
from dsjax.data.mixture import Source
from dsjax.train.experiment import Evaluation, Experiment

MASKED = (0, 1, 2, 3, 4)  # sixteenths of the routed experts

Arm = Callable[[], Experiment]


def main(description: str, arms: Sequence[Arm], report: Callable[[Path], str]) -> None:
    """The command line of a comparison."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--corpus", required=True, help="what experiments.corpus wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--steps", type=int, help="fewer, to try it out")
    args = parser.parse_args()
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in arms]
    with ThreadPoolExecutor(args.processes) as pool:
        waiting = pool.map(lambda job: _start(*job, args), jobs)
        for _ in tqdm(waiting, total=len(jobs), desc="runs"):
            pass
    print(report(args.out))


def _start(arm: Arm, seed: int, args: argparse.Namespace) -> None:
    """One run in a process of its own, with its share of the device's memory."""
    out = args.out / f"{arm.__name__}-{seed}"
    if (out / "result.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    job = {
        "arm": f"experiments.{Path(inspect.getfile(arm)).stem}.{arm.__name__}",
        "seed": seed,
        "corpus": args.corpus,
        "steps": args.steps,
        "out": str(out),
    }
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / args.processes:.2f}"}
    command = [sys.executable, "-m", "experiments.miniature", json.dumps(job)]
    with (out / "log.txt").open("w") as log:
        code = subprocess.call(
            command, env=share | os.environ, stdout=log, stderr=subprocess.STDOUT
        )
    if code:
        tqdm.write(f"{out}: exit code {code}, see log.txt")


def run_job(arm: str, seed: int, corpus: str, steps: int | None, out: str) -> None:
    """Trains one arm with one seed and writes result.json."""
    from dsjax.train.override import find
    from dsjax.train.run import train

    experiment = find(arm)
    source = Source(path=f"{corpus}/train")
    data = replace(experiment.data, sources=(source,), held_out=f"{corpus}/held_out")
    experiment = replace(experiment, data=data, seed=seed)
    if steps:
        tokens = steps * experiment.batch.sequences * experiment.length
        experiment = replace(experiment, tokens=tokens)
    folder = Path(out)
    trained = train(experiment, out=folder / "run")
    masked = masked_losses(experiment, folder / "run")
    result = {"arm": experiment.name, "seed": seed, "masked": masked}
    (folder / "result.json").write_text(json.dumps(result | trained, indent=2) + "\n")


def masked_losses(experiment: Experiment, run: Path) -> dict[str, float]:
    """Held-out loss of the run's model, in nats a token, with 0 to 4 sixteenths of the
    routed experts masked, for each token those of highest affinity (2401.06066, section
    4.5).
    """
    from dsjax.train.build import build, load_initial
    from dsjax.train.evaluate import score

    whole = replace(experiment, evaluation=Evaluation(sequences=1024))
    parts = build(whole, workdir=run / "data")
    losses = {}
    for sixteenths in MASKED:
        config = without_best(experiment.model, sixteenths)
        if config is None:
            continue
        changed = replace(experiment, model=config, initial=str(run / "model"))
        model = load_initial(changed, parts)
        losses[str(sixteenths)] = score(model, parts.held_out).nats_per_token
    return losses


def without_best(config: ModelConfig, sixteenths: int) -> ModelConfig | None:
    """The model without each token's best experts; None if it routes to none."""
    if not sixteenths:
        return config
    segments, routed = [], False
    for segment in config.segments:
        if isinstance(moe := segment.feed_forward, Moe):
            masked = round(moe.num_experts * sixteenths / 16)
            moe, routed = replace(moe, mask_best=masked), True
            segment = replace(segment, feed_forward=moe)
        segments.append(segment)
    return replace(config, segments=tuple(segments)) if routed else None


def results(out: Path) -> dict[str, list[dict]]:
    """Every arm's results, in the order of seeds; "folder" is where each came from."""
    arms: dict[str, list[dict]] = {}
    for path in sorted(out.glob("*/result.json")):
        result = json.loads(path.read_text()) | {"folder": path.parent}
        arms.setdefault(result["arm"], []).append(result)
    return arms


def write_table(
    out: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
    """A table in Markdown, also as `out`/table.md."""
    lines = [columns, *rows]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    text.insert(1, "|" + "---|" * len(columns))
    table = "\n".join(text) + "\n"
    (out / "table.md").write_text(table)
    return table


def losses(runs: Sequence[dict]) -> list[str]:
    """Two cells: the mean held-out loss of an arm, and that of each seed."""
    values = [run["masked"]["0"] for run in runs]
    return [f"{np.mean(values):.4f}", ", ".join(f"{value:.4f}" for value in values)]


def history(run: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric of a run; layers averaged."""
    lines = (run / "run/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row.get(key) is not None]
    values = [np.mean(row[key]) for row in rows]
    return np.array([row["step"] for row in rows]), np.array(values)


def canvas(panels: int):
    """(figure, its axes side by side)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)


def plot(axes, runs: Sequence[dict], key: str, label: str) -> None:
    """One metric of an arm over the steps."""
    steps = history(runs[0]["folder"], key)[0]
    band(axes, steps, [history(run["folder"], key)[1] for run in runs], label)


def band(axes, x: np.ndarray, series: Sequence[np.ndarray], label: str, **line) -> None:
    """The mean over seeds, and their range as a band."""
    values = np.stack(series)
    (drawn,) = axes.plot(x, values.mean(axis=0), label=label, **line)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(x, low, high, alpha=0.2, color=drawn.get_color())


def save(figure, out: Path) -> None:
    """Legends, and the figure as `out`/figure.png."""
    for axes in figure.axes:
        axes.legend()
    figure.savefig(out / "figure.png", dpi=120)


if __name__ == "__main__":
    run_job(**json.loads(sys.argv[1]))
