"""Tokens a second of `dsjax train`'s own step, and where its time goes.

    python -m benchmarks.train_speed experiments.speed.moe_mla_2b_bf16
    python -m benchmarks.train_speed experiments.speed.moe_mla_2b --kernels 25

Random tokens and fresh weights; whole batches of the experiment. `--kernels` adds the
GPU kernels of one step, the longest first. `--compile-only`, with JAX_PLATFORMS=cpu, needs
no GPU: it compiles for an H200 that is not there and prints the memory it takes.
"""

import argparse
import collections
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.count import training_flops
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer
from dsjax.sharding import make_mesh
from dsjax.train.build import sharding_of
from dsjax.train.experiment import Experiment
from dsjax.train.override import find
from dsjax.train.schedule import is_zero
from dsjax.train.step import Batch, Rates, Step, TrainState, init_state, make_step

WARM_UP = 2  # steps before the clock starts


def main() -> None:
    """Prints one line, and the kernels if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", help="such as experiments.speed.moe_mla_2b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--hlo", type=Path, help="where to write the compiled program")
    args = parser.parse_args()
    try:
        experiment = find(args.experiment)
        compiled = compile_for_h200(experiment) if args.compile_only else None
    except UserError as error:
        print(f"train_speed: {error}", file=sys.stderr)
        sys.exit(2)
    if compiled:
        memory = compiled.memory_analysis()
        print(f"arguments {memory.argument_size_in_bytes / 1e9:.2f} GB, ", end="")
        print(f"temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB")
    else:
        compiled = measure(experiment, args.steps, args.kernels, as_json=args.json)
    if args.hlo:
        args.hlo.write_text(compiled.as_text(), "utf-8")


def parts(experiment: Experiment, **options) -> tuple[Transformer, Step, Rates]:
    """The abstract model, the step that `dsjax train` makes, and rates of a late step."""
    model = Transformer.abstract(
        experiment.model,
        sharding=sharding_of(experiment),
        precision=experiment.precision,
        remat=experiment.remat,
        unroll=experiment.unroll,
        **options,
    )
    step = make_step(
        model,
        optimizer=experiment.optimizer,
        objective=experiment.objective,
        ema=experiment.ema,
    )
    rates = Rates(learning_rate=1e-4, mtp=0.0, bias_speed=0.0)
    return model, step, jax.tree.map(np.float32, rates)


def shape(experiment: Experiment) -> tuple[int, int, int]:
    """Of a batch's tokens: microbatches, sequences of one, window."""
    microbatches = experiment.batch.sequences // experiment.microbatch
    return microbatches, experiment.microbatch, experiment.length + 1


def compile_for_h200(experiment: Experiment) -> jax.stages.Compiled:
    """The step for a GPU that need not be here."""
    from dsjax.plan.topology import topology

    mesh = make_mesh(devices=list(topology("h200").devices))
    model, step, rates = parts(experiment, mesh=mesh)
    tokens = jax.ShapeDtypeStruct(shape(experiment), jnp.int32)
    state = init_state(model, experiment.optimizer, ema=experiment.ema)
    return step.lower(state, {"tokens": tokens}, rates).compile()


class Timed(NamedTuple):
    """A step that ran, what it needs to run again, and how long it took."""

    run: Step
    state: TrainState
    batch: Batch
    rates: Rates
    seconds: float  # of a step, on average
    fastest: float
    compile_seconds: float
    loss: float


def timed(experiment: Experiment, steps: int, **options) -> Timed:
    """Times the steps one after the other, as a run does: a step's figures are waited
    for when the next one is under way.
    """
    model, step, rates = parts(experiment, **options)
    state = fresh_state(experiment, model)
    rng, size = np.random.default_rng(0), shape(experiment)
    batches = [
        {"tokens": rng.integers(0, experiment.model.vocab_size, size, np.int32)}
        for _ in range(4)
    ]
    begun = time.perf_counter()
    run = Step(step.lower(state, batches[0], rates).compile(), model.mesh)
    compile_seconds = time.perf_counter() - begun
    for batch in batches[:WARM_UP]:
        state, metrics = run(state, batch, rates)
    jax.block_until_ready(metrics)
    times = [time.perf_counter()]
    for number in range(steps):
        before = metrics
        state, metrics = run(state, batches[number % len(batches)], rates)
        jax.device_get(before)
        times.append(time.perf_counter())
    loss = float(metrics.loss)
    seconds = (time.perf_counter() - times[0]) / steps
    fastest = float(np.diff(times[1:]).min()) if steps > 1 else seconds
    return Timed(run, state, batches[0], rates, seconds, fastest, compile_seconds, loss)


def measure(
    experiment: Experiment, steps: int, kernels: int, *, as_json: bool
) -> jax.stages.Compiled:
    """Prints what a step takes, and its kernels."""
    found = timed(experiment, steps)
    tokens = experiment.batch.sequences * experiment.length
    flops = training_flops(
        experiment.model,
        length=experiment.length,
        mtp=not is_zero(experiment.objective.mtp),
    )
    figures = {
        "experiment": experiment.name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tokens_per_second": round(tokens / found.seconds),
        "step_ms": round(1e3 * found.seconds, 2),
        "fastest_step_ms": round(1e3 * found.fastest, 2),
        "model_tflops": round(flops * tokens / found.seconds / 1e12, 1),
        "loss": found.loss,
        "compile_s": round(found.compile_seconds, 1),
        "peak_gb": round(peak_bytes() / 1e9, 2),
    }
    if as_json:
        print(json.dumps(figures), flush=True)
    else:
        print(", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
    if kernels:
        print(longest_kernels(found, kernels), flush=True)
    return found.run.compiled


def fresh_state(experiment: Experiment, model: Transformer) -> TrainState:
    """The state of step 0 on the device."""
    options = {"precision": experiment.precision, "remat": experiment.remat}
    options["sharding"] = sharding_of(experiment)
    real = Transformer.create(experiment.model, mesh=model.mesh, **options)
    return init_state(real, experiment.optimizer, ema=experiment.ema)


def peak_bytes() -> int:
    """What the device had in use at most."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def longest_kernels(timed: Timed, number: int) -> str:
    """A table of one step's kernels, each with the operation of the program that it is
    of, names without their numbers.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(timed.run(timed.state, timed.batch, timed.rates))
        (path,) = Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    ms, counts = collections.Counter(), collections.Counter()
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                operation = dict(event.stats).get("hlo_op", "")
                names = (
                    re.sub(r"[._]\d+", "", str(n)) for n in (operation, event.name)
                )
                kind = " ".join(dict.fromkeys(names))[:90]
                ms[kind] += event.duration_ns / 1e6
                counts[kind] += 1
    total = sum(ms.values())
    lines = ["| ms | share | times | kernel |", "|---|---|---|---|"]
    lines += [
        f"| {each:.2f} | {each / total:.1%} | {counts[kind]} | {kind} |"
        for kind, each in ms.most_common(number)
    ]
    return "\n".join([*lines, f"| {total:.2f} | | {sum(counts.values())} | all |"])


if __name__ == "__main__":
    main()
