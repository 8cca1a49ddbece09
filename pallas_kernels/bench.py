"""Every operation, at the shapes of the models, against what else the machine has.

    python -m pallas_kernels.bench                     # all, a table in Markdown
    python -m pallas_kernels.bench mla_decode --json   # one operation, for machines
    python -m pallas_kernels.bench mla_decode --case "2 tokens" --clocks rested

Needs a Hopper GPU. One run draws fresh operands, poisons the memory that outputs may come
to lie in, compares each contestant with float32, and times kernels alone, without the
host: after a tenth of a second of the same, as in a long computation, or in bursts after
a rest (--clocks rested). Shares are of the ceilings that the same run measures.
"""

import argparse
import functools
import gc
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from pallas_kernels.measure import (
    ROUNDS,
    Case,
    Clocks,
    device_ms,
    poison,
    relative_error,
    torch_ms,
)

OPERATIONS = (
    "mla_decode",
    "flash_attention",
    "grouped_matmul",
    "fp8_matmul",
    "cross_entropy",
    "spread_rows",
)


class Ceilings(NamedTuple):
    """What this GPU does at best: of products FLOP/s, of reading bytes/s."""

    bfloat16: float
    float8: float
    read: float


class Row(NamedTuple):
    """One contestant at one shape; None where it could not run, with `note`."""

    operation: str
    case: str
    who: str
    ms: float | None = None
    error: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    share: float | None = None  # of the ceiling that binds
    ratio: float | None = None  # this one's time over ours
    note: str = ""


def measure_ceilings(clocks: Clocks) -> Ceilings:
    """A product of 8192 x 8192 x 8192 in both dtypes; the sum of 4 GiB."""
    size, keys = 8192, jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)

    def product(dtype):
        x, y = a.astype(dtype), b.astype(dtype)
        multiply = jax.jit(
            lambda x, y: jnp.einsum(
                "mk,nk->mn", x, y, preferred_element_type=jnp.bfloat16
            )
        )
        return 2 * size**3 / (device_ms(multiply, x, y, clocks=clocks) / 1e3)

    large = jax.random.normal(keys[0], (2**31,), jnp.bfloat16)
    read = large.nbytes / (device_ms(jax.jit(jnp.max), large, clocks=clocks) / 1e3)
    return Ceilings(product(jnp.bfloat16), product(jnp.float8_e4m3fn), read)


class Prepared(NamedTuple):
    """A case compiled: contestants, or why one could not be."""

    case: Case
    inputs: Callable
    exact: Callable
    contestants: dict[str, Callable | str]
    outputs: dict[str, tuple]


def prepare(case: Case) -> Prepared:
    """Compiles all of a case; nothing is computed but what XLA tries for its choices."""
    key = jax.eval_shape(jax.random.key, 0)
    operands = jax.eval_shape(case.inputs, key)
    contestants, outputs = {}, {}
    for who, function in case.contestants.items():
        try:
            contestants[who] = jax.jit(function).lower(*operands).compile()
            outputs[who] = jax.eval_shape(function, *operands)
        except Exception as problem:  # one that cannot must not end the others' run
            contestants[who] = _line(problem)
    inputs = jax.jit(case.inputs).lower(key).compile()
    exact = jax.jit(case.exact).lower(*operands).compile()
    return Prepared(case, inputs, exact, contestants, outputs)


class Contestant(NamedTuple):
    """Its first output, to be compared; and its time at some `clocks`, measured anew."""

    result: Callable[[], jax.Array]
    ms: Callable[..., float]


def run_case(
    prepared: Prepared, ceilings: Ceilings, key: jax.Array, clocks: Clocks
) -> Iterator[Row]:
    """A row for each contestant, ours first. They take turns, another one first each
    time, since clocks follow the GPU's power and temperature: a ratio is the median of
    those of single turns.
    """
    case = prepared.case
    operands = prepared.inputs(key)
    contestants = _of_jax(prepared, operands) | _of_torch(case, operands)
    exact = prepared.exact(*operands)
    errors, times, failed = _take_turns(contestants, exact, clocks)
    peak = ceilings.float8 if "fp8" in case.operation else ceilings.bfloat16
    floor_s = max(case.flops / peak, case.bytes / ceilings.read)
    ours = next((times[who] for who in contestants if who not in failed), [])
    for who in contestants:
        if who in failed:
            yield Row(case.operation, case.name, who, note=failed[who])
            continue
        ms = statistics.median(times[who])
        seconds = ms / 1e3
        yield Row(
            *(case.operation, case.name, who, ms, errors[who]),
            case.flops / seconds,
            case.bytes / seconds,
            floor_s / seconds,
            statistics.median(a / b for a, b in zip(times[who], ours)),
            case.target if times[who] is ours else "",
        )


def _take_turns(
    contestants: dict[str, Contestant | str], exact: jax.Array, clocks: Clocks
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, str]]:
    """By contestant: error, milliseconds of each turn, or why it could not."""
    failed = {who: why for who, why in contestants.items() if isinstance(why, str)}
    errors, times = {}, {who: [] for who in contestants}
    order = [who for who in contestants if who not in failed]
    for turn in range(1 + ROUNDS):
        first = turn % max(len(order), 1)
        for who in order[first:] + order[:first]:
            if who in failed:
                continue
            try:
                if turn:
                    times[who].append(contestants[who].ms(clocks=clocks))
                else:
                    found = contestants[who].result()
                    errors[who] = float(relative_error(found, exact))
            except Exception as problem:  # one that cannot must not end the others' run
                failed[who] = _line(problem)
    return errors, times, failed


def _of_jax(prepared: Prepared, operands) -> dict[str, Contestant | str]:
    def contestant(who: str, run: Callable) -> Contestant:
        def result() -> jax.Array:
            poison(prepared.outputs[who])
            return jax.tree.leaves(run(*operands))[0]

        return Contestant(result, functools.partial(device_ms, run, *operands))

    return {
        who: run if isinstance(run, str) else contestant(who, run)
        for who, run in prepared.contestants.items()
    }


def _line(problem: Exception) -> str:
    first, *_ = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {first[:80]}"


def _of_torch(case: Case, operands) -> dict[str, Contestant | str]:
    if case.torch is None:
        return {}
    try:
        import torch
    except ImportError:
        return {}
    try:
        tensors = [_tensor(torch, operand) for operand in operands]
        functions = case.torch()
    except Exception as problem:
        return {"torch": _line(problem)}

    def contestant(function: Callable) -> Contestant:
        def result() -> jax.Array:
            return jnp.from_dlpack(function(*tensors).contiguous())

        return Contestant(result, functools.partial(torch_ms, function, *tensors))

    return {who: contestant(function) for who, function in functions.items()}


def _tensor(torch, operand: jax.Array):
    """The same memory as a tensor; 8-bit floats travel as bytes."""
    if operand.dtype == jnp.float8_e4m3fn:
        as_bytes = jax.lax.bitcast_convert_type(operand, jnp.uint8)
        return torch.from_dlpack(as_bytes).view(torch.float8_e4m3fn)
    return torch.from_dlpack(operand)


def heading(ceilings: Ceilings) -> str:
    """What a table in Markdown begins with."""
    lines = [
        f"Ceilings: bfloat16 {ceilings.bfloat16 / 1e12:.0f} TFLOP/s, float8 "
        f"{ceilings.float8 / 1e12:.0f} TFLOP/s, reading {ceilings.read / 1e9:.0f} GB/s.",
        "",
        "| operation | shape | who | ms | TFLOP/s | GB/s | of the floor | time over ours "
        "| error | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines)


def line(r: Row) -> str:
    """One of its lines."""
    if r.ms is None:
        return f"| {r.operation} | {r.case} | {r.who} | | | | | | | {r.note} |"
    return (
        f"| {r.operation} | {r.case} | {r.who} | {r.ms:.4f} "
        f"| {r.flops_per_second / 1e12:.0f} | {r.bytes_per_second / 1e9:.0f} "
        f"| {r.share:.0%} | {r.ratio:.2f} | {r.error:.1e} | {r.note} |"
    )


def chosen(operations: list[str], words: str) -> list[Case]:
    """The cases of some operations, of all if none is named, with such words in the name."""
    return [
        case
        for name in operations or OPERATIONS
        for case in importlib.import_module(f"pallas_kernels.{name}.bench").CASES
        if words in case.name
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 2 where there is no Hopper GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operations", nargs="*", metavar="OPERATION")
    parser.add_argument("--json", action="store_true", help="a line of JSON a row")
    parser.add_argument(
        "--case",
        metavar="WORDS",
        default="",
        help="shapes whose names have these words",
    )
    parser.add_argument(
        "--clocks",
        type=Clocks,
        choices=list(Clocks),
        default=Clocks.SETTLED,
        help="settled by the same work (as by default), or rested",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.operations if name not in OPERATIONS]
    if unknown:
        print(f"operations are {', '.join(OPERATIONS)}, not {unknown}", file=sys.stderr)
        return 2
    cases = chosen(options.operations, options.case)
    if not cases:
        print(f"no shape's name has {options.case!r} in it", file=sys.stderr)
        return 2
    device = jax.devices()[0]
    if device.platform != "gpu" or not device.compute_capability.startswith("9."):
        print(f"needs a Hopper GPU, not {device.device_kind}", file=sys.stderr)
        return 2
    ready = [prepare(case) for case in tqdm(cases, desc="compiling", unit="case")]
    ceilings = measure_ceilings(options.clocks)
    if not options.json:
        print(f"{device.device_kind}, jax {jax.__version__}, clocks {options.clocks}\n")
        print(heading(ceilings))
    for number, prepared in enumerate(tqdm(ready, desc="running", unit="case")):
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        for row in run_case(prepared, ceilings, key, options.clocks):
            tqdm.write(json.dumps(row._asdict()) if options.json else line(row))
            sys.stdout.flush()  # a run that is cut short has what it measured
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
    if options.json:
        about = {"device": device.device_kind, "clocks": options.clocks}
        print(json.dumps(about | ceilings._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
