"""Several GPUs of one host: training, expert dispatch and decoding, over NCCL.

    python -m benchmarks.gpus train --gpus 1 2 4 8
    python -m benchmarks.gpus dispatch --gpus 8
    python -m benchmarks.gpus decode --gpus 8
    python -m benchmarks.gpus train --gpus 1 2 --tiny     # anywhere, to see that it runs

Each GPU has its own tokens and its own experts: `expert` cuts the batch, too. Training is
weak scaling, 16 sequences a GPU; a share of linear is tokens/s a GPU over those of the
first number of GPUs. Dispatch sends 4096 tokens a GPU through V3's routing to experts that
do nothing, and back. A line of JSON a result; leave NVLink multicast off
(`NCCL_NVLS_ENABLE=0`) where the driver cannot share it.

Letters: N tokens, D model, E experts, k chosen experts.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.dispatch import experts_of
from benchmarks.train_speed import timed
from dsjax import models
from dsjax.config import ModelConfig
from dsjax.decode import engine
from dsjax.decode.sample import Sampling, row_keys
from dsjax.nn.dispatch import dispatched
from dsjax.nn.options import Precision
from dsjax.nn.router import route
from dsjax.nn.transformer import Transformer
from dsjax.sharding import SERVING, make_mesh
from dsjax.train.schedule import BatchSize
from experiments import speed

BYTES = 2  # of a bfloat16


def main() -> None:
    """Prints a line of JSON for each number of GPUs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    works = {"train": train, "dispatch": dispatch, "decode": decode}
    parser.add_argument("work", choices=works)
    parser.add_argument("--gpus", type=int, nargs="+", default=[len(jax.devices())])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    args = parser.parse_args()
    for found in works[args.work](args.gpus, args.steps, tiny=args.tiny):
        print(json.dumps({"device": jax.devices()[0].device_kind} | found), flush=True)


def mesh_of(gpus: int) -> jax.sharding.Mesh:
    """The first `gpus` devices, along `expert`."""
    return make_mesh(expert=gpus, devices=jax.devices()[:gpus])


def train(numbers: list[int], steps: int, *, tiny: bool) -> Iterator[dict]:
    """The step of benchmarks.train_speed, 16 sequences a GPU."""
    experiment, sequences = speed.moe_mla_2b_bf16(), 16
    if tiny:
        experiment = replace(experiment, model=small(experiment.model), length=32)
        sequences = 2
    first = None
    for gpus in numbers:
        rows = sequences * gpus
        run = replace(experiment, batch=BatchSize(sequences=rows), microbatch=rows)
        found = timed(run, steps, mesh=mesh_of(gpus))
        each = rows * run.length / found.seconds / gpus
        first = first or each
        yield {
            "work": "train",
            "gpus": gpus,
            "tokens_per_second": round(each * gpus),
            "share_of_linear": round(each / first, 4),
        }


def small(config: ModelConfig) -> ModelConfig:
    """A model of the same architecture, for a test."""
    return models.shrink(config, vocab_size=128, width=16)


def dispatch(numbers: list[int], steps: int, *, tiny: bool) -> Iterator[dict]:
    """Tokens to V3's experts and back; the experts hand back what they are sent."""
    config, width = experts_of(models.v3()), 7168
    tokens = 4096
    if tiny:
        width, tokens = 64, 64
    for gpus in numbers:
        mesh = mesh_of(gpus)

        def echo(x_ND, chosen_Nk, affinity_Nk, weights, **_):
            here_Nk = (chosen_Nk >= 0) & (chosen_Nk < len(weights[0]))
            return x_ND.astype(jnp.float32) * here_Nk.any(axis=1, keepdims=True)

        def local(x_ND, chosen_Nk, affinity_Nk, weights_E1):
            return dispatched(
                echo, x_ND, chosen_Nk, affinity_Nk, (weights_E1,), config
            ).astype(x_ND.dtype)

        rows = P("expert", None)
        run = jax.jit(
            jax.shard_map(local, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)
        )
        with jax.set_mesh(mesh):
            put = functools.partial(jax.device_put, device=NamedSharding(mesh, rows))
            rng = np.random.default_rng(0)
            count = tokens * gpus
            scores = jax.nn.sigmoid(
                jnp.asarray(rng.standard_normal((1, count, config.num_experts)))
            )
            routing = route(scores, jnp.zeros(config.num_experts), config)
            x_ND = jnp.asarray(rng.standard_normal((count, width)), jnp.bfloat16)
            chosen_Nk = np.asarray(routing.indices_BTk[0])
            operands = (
                put(x_ND),
                put(chosen_Nk),
                put(routing.weights_BTk[0]),
                put(jnp.zeros((config.num_experts, 1), jnp.bfloat16)),
            )
            seconds = per_call(run, operands, steps)
        away = rows_that_leave(chosen_Nk, gpus, config.num_experts)
        sent = 2 * away * width * BYTES / gpus  # to the experts and back, of one GPU
        yield {
            "work": "dispatch",
            "gpus": gpus,
            "tokens_each": tokens,
            "ms": round(1e3 * seconds, 3),
            "sent_mb_each": round(sent / 1e6, 2),
            "gb_per_second_each": round(sent / seconds / 1e9, 2),
        }


def rows_that_leave(chosen_Nk: np.ndarray, gpus: int, experts: int) -> int:
    """Of all tokens, the pairs of a token and another GPU that has experts of it."""
    home_N = np.arange(len(chosen_Nk)) // (len(chosen_Nk) // gpus)
    gpu_Nk = chosen_Nk // (experts // gpus)
    visits = [(gpu_Nk == gpu).any(axis=1) & (home_N != gpu) for gpu in range(gpus)]
    return int(np.sum(visits))


def decode(numbers: list[int], steps: int, *, tiny: bool) -> Iterator[dict]:
    """V2-Lite, random bfloat16 weights, prompts of 512 tokens, 32 rows a GPU."""
    config, prompt, rows_each = models.v2_lite(), 512, 32
    if tiny:
        config, prompt, rows_each = models.tiny_v2_lite(), 16, 2
    for gpus in numbers:
        rows = rows_each * gpus
        model = Transformer.create(
            config,
            mesh=mesh_of(gpus),
            sharding=SERVING,
            precision=Precision(params=jnp.bfloat16),
        )
        rng = np.random.default_rng(0)
        prompts_BT = rng.integers(0, config.vocab_size, (rows, prompt), np.int32)
        options = {
            "sampling": Sampling(temperature=0.0),
            "keys_B": row_keys(0, rows),
            "stops": jnp.zeros(0, jnp.int32),
        }
        room = 2 * steps + 2
        begun = engine.start(
            model,
            jnp.asarray(prompts_BT),
            jnp.full(rows, prompt),
            slots=engine.bucket(prompt + room),
            room=room,
            **options,
        )
        begun = engine.run(model, begun, 2, **options)  # compiles
        jax.block_until_ready(begun)
        clock = time.perf_counter()
        jax.block_until_ready(engine.run(model, begun, 2 + steps, **options))
        seconds = (time.perf_counter() - clock) / steps
        yield {
            "work": "decode",
            "gpus": gpus,
            "rows": rows,
            "ms_a_step": round(1e3 * seconds, 3),
            "tokens_per_second": round(rows / seconds),
        }


def per_call(run, operands, calls: int) -> float:
    """Seconds of one of so many calls in a row, after one that compiles."""
    jax.block_until_ready(run(*operands))
    begun = time.perf_counter()
    for _ in range(calls):
        found = run(*operands)
    jax.block_until_ready(found)
    return (time.perf_counter() - begun) / calls


if __name__ == "__main__":
    main()
