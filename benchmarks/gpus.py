"""Several GPUs of one host: training, expert dispatch and decoding, over NCCL.

    python -m benchmarks.gpus train --gpus 1 2 4 8
    python -m benchmarks.gpus train --gpus 1 4 --data 2   # two halves with all experts each
    python -m benchmarks.gpus dispatch --gpus 8
    python -m benchmarks.gpus decode --gpus 8
    python -m benchmarks.gpus train --gpus 1 2 --tiny     # anywhere, to see that it runs

Each GPU has its own tokens and its own experts: `expert` cuts the batch, too. `--data`
cuts the GPUs into so many parts that have all experts each, if there are as many GPUs.
Training is weak scaling, 16 sequences a GPU; a share of linear is tokens/s a GPU over
those of the first number of GPUs. Dispatch sends 4096 tokens a GPU through V3's routing to experts that
do nothing, and back. A line of JSON a result; leave NVLink multicast off
(`NCCL_NVLS_ENABLE=0`) where the driver cannot share it.

Letters: N tokens, D model, E experts, k chosen experts.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.dispatch import experts_of
from benchmarks.train_speed import peak_bytes, timed
from dsjax import models
from dsjax.config import ModelConfig, Moe
from dsjax.decode import engine
from dsjax.decode.sample import Sampling, row_keys
from dsjax.nn import dispatch as expert_parallel
from dsjax.nn.exchange import exchange, spread
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
    parser.add_argument("--data", type=int, default=1, metavar="PARTS")
    parser.add_argument(
        "--whole-dense",
        action="store_true",
        help="train with weights outside the experts whole on every GPU",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    args = parser.parse_args()
    if args.whole_dense and args.work != "train":
        parser.error(f"--whole-dense is for train, not {args.work}")
    meshes = [mesh_of(gpus, args.data) for gpus in args.gpus]
    options = {"whole_dense": True} if args.whole_dense else {}
    for found in works[args.work](meshes, args.steps, tiny=args.tiny, **options):
        print(json.dumps({"device": jax.devices()[0].device_kind} | found), flush=True)


def mesh_of(gpus: int, data: int = 1) -> Mesh:
    """The first `gpus` devices, in `data` parts if there are as many."""
    data = math.gcd(data, gpus)
    return make_mesh(data=data, expert=gpus // data, devices=jax.devices()[:gpus])


def train(
    meshes: list[Mesh], steps: int, *, tiny: bool, whole_dense: bool = False
) -> Iterator[dict]:
    """The step of benchmarks.train_speed, 16 sequences a GPU."""
    experiment, sequences = speed.moe_mla_2b_bf16(), 16
    experiment = replace(experiment, whole_dense=whole_dense)
    if tiny:
        experiment = replace(experiment, model=small(experiment.model), length=32)
        sequences = 2
    first = None
    for mesh in meshes:
        gpus = mesh.size
        rows = sequences * gpus
        run = replace(experiment, batch=BatchSize(sequences=rows), microbatch=rows)
        found = timed(run, steps, mesh=mesh)
        each = rows * run.length / found.seconds / gpus
        first = first or each
        yield {
            "work": "train",
            "gpus": gpus,
            "experts_over": mesh.shape["expert"],
            "step_ms": round(1e3 * found.seconds, 2),
            "fastest_step_ms": round(1e3 * found.fastest, 2),
            "peak_gb": round(peak_bytes() / 1e9, 2),
            "tokens_per_second": round(each * gpus),
            "share_of_linear": round(each / first, 4),
        }


def small(config: ModelConfig) -> ModelConfig:
    """A model of the same architecture, for a test."""
    return models.shrink(config, vocab_size=128, width=16)


def dispatch(meshes: list[Mesh], steps: int, *, tiny: bool) -> Iterator[dict]:
    """Tokens to V3's experts and back, which hand back what they are sent; and of that
    the rows' way there alone, with the plan of who gets which.
    """
    config, width = experts_of(models.v3()), 7168
    tokens = 4096
    if tiny:
        width, tokens = 64, 64
    for mesh in meshes:
        rng = np.random.default_rng(0)
        count = tokens * mesh.size
        scores = jax.nn.sigmoid(rng.standard_normal((1, count, config.num_experts)))
        routing = route(scores, jnp.zeros(config.num_experts), config)
        chosen_Nk = np.asarray(routing.indices_BTk[0])
        operands = (
            jnp.asarray(rng.standard_normal((count, width)), jnp.bfloat16),
            chosen_Nk,
            routing.weights_BTk[0],
            jnp.zeros((config.num_experts, 1), jnp.bfloat16),
        )
        there, back = (
            _per_call(mesh, functools.partial(program, config), operands, steps)
            for program in (_there, _there_and_back)
        )
        parts = mesh.shape["expert"]
        away = rows_that_leave(chosen_Nk, tokens, parts, config.num_experts) / mesh.size
        with jax.set_mesh(mesh):
            to_all = expert_parallel.go_to_all(config, parts)
        row = width * BYTES / 1e6
        sent = row * (tokens * (parts - 1) if to_all else away)  # MB, one way
        yield {
            "work": "dispatch",
            "gpus": mesh.size,
            "experts_over": parts,
            "tokens_each": tokens,
            "needed_mb_each": round(row * away, 2),
            "sent_mb_each": round(sent, 2),
            "there_ms": round(1e3 * there, 3),
            "there_gb_per_second_each": round(sent / 1e3 / there, 2),
            "there_and_back_ms": round(1e3 * back, 3),
            "gb_per_second_each": round(2 * sent / 1e3 / back, 2),
        }


def _there_and_back(config: Moe, x_ND, chosen_Nk, affinity_Nk, weights_E1):
    def echo(x_MD, here_Mk, affinity_Mk, weights, **_):
        some_M1 = ((here_Mk >= 0) & (here_Mk < len(weights[0]))).any(1, keepdims=True)
        return x_MD.astype(jnp.float32) * some_M1

    weights = (weights_E1,)
    y_ND = expert_parallel.dispatched(
        echo, x_ND, chosen_Nk, affinity_Nk, weights, config, at_once=True
    )
    return y_ND.astype(x_ND.dtype)


def _there(config: Moe, x_ND, chosen_Nk, *_):
    """The first round's rows, as a device receives them. They go as they lie, without
    being gathered. Of as many as it has itself the largest values, so that all are used.
    """
    plan, size = expert_parallel._plan(chosen_Nk, config), x_ND.shape
    if isinstance(plan, expert_parallel._ToAll):
        found_MD = spread(x_ND, expert_parallel.AXIS)
    else:
        x_JD = jnp.resize(x_ND, (len(plan.token_J), size[1]))
        found_MD = exchange(x_JD, plan.lanes(0))
    whole = len(found_MD) // size[0] * size[0]
    return found_MD[:whole].reshape(-1, *size).max(axis=0)


def _per_call(mesh: Mesh, program: Callable, operands: tuple, calls: int) -> float:
    """Seconds of one of so many calls in a row, by one program: the host, which has all
    devices to tell, would take as long. All operands are cut by tokens but the last, which
    is cut by experts.
    """

    def many(*operands):
        def one(x_ND, _):  # what a call gives is what the next one takes
            return program(x_ND, *operands[1:]), None

        return jax.lax.scan(one, operands[0], length=calls)[0]

    rows = P(("data", "expert"), None)
    specs = (rows, rows, rows, P("expert", None))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(operands, specs)
        ]
        run = jax.jit(
            jax.shard_map(many, in_specs=specs, out_specs=rows, check_vma=False)
        )
        jax.block_until_ready(run(*placed))
        begun = time.perf_counter()
        jax.block_until_ready(run(*placed))
        return (time.perf_counter() - begun) / calls


def rows_that_leave(
    chosen_Nk: np.ndarray, tokens: int, parts: int, experts: int
) -> int:
    """Of all tokens, so many a GPU, the pairs of a token and another part that has
    experts of it.
    """
    home_N = np.arange(len(chosen_Nk)) // tokens % parts
    part_Nk = chosen_Nk // (experts // parts)
    visits = [(part_Nk == part).any(axis=1) & (home_N != part) for part in range(parts)]
    return int(np.sum(visits))


def decode(meshes: list[Mesh], steps: int, *, tiny: bool) -> Iterator[dict]:
    """V2-Lite, random bfloat16 weights, prompts of 512 tokens, 32 rows a GPU."""
    config, prompt, rows_each = models.v2_lite(), 512, 32
    if tiny:
        config, prompt, rows_each = models.tiny_v2_lite(), 16, 2
    for mesh in meshes:
        gpus = mesh.size
        rows = rows_each * gpus
        model = Transformer.create(
            config,
            mesh=mesh,
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


if __name__ == "__main__":
    main()
