"""`dsjax plan`: from the command line's words to a report."""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp

from dsjax import count
from dsjax.errors import UserError
from dsjax.nn.options import Remat
from dsjax.plan.plan import Plan, compile, estimate
from dsjax.plan.programs import Mode, Work
from dsjax.plan.progress import progress
from dsjax.plan.report import mesh, report
from dsjax.plan.topology import topology
from dsjax.sharding import parse_sizes

LENGTH = 4096  # of pre-training, throughout the family


def plan(args: argparse.Namespace) -> None:
    """Prints the plan that `dsjax plan` was asked for."""
    work = _work(args)
    hardware = topology(args.topology)
    name = f"{work.config.name}, {work.mode.value}, on {hardware.name}"
    sizes = parse_sizes(args.mesh or f"fsdp={len(hardware.devices)}")
    with progress(f"{name}: tracing, mesh {mesh(sizes)}"):
        planned = estimate(work, hardware, sizes)
    with progress(f"{name}: compiling, mesh {mesh(sizes)}"):
        planned = compile(planned, look=_writer(args.hlo))
    _print(planned, as_json=args.json)


def _work(args: argparse.Namespace) -> Work:
    config = count.find(args.model)
    remats = {choice.value: choice for choice in Remat}
    if args.remat not in remats:
        raise UserError(f"remat {args.remat!r} is not one of {', '.join(remats)}")
    return Work(
        config=config,
        mode=Mode(args.mode),
        batch_per_device=args.batch_per_device,
        length=args.length or min(LENGTH, config.max_length),
        remat=remats[args.remat],
        mtp=not args.no_mtp,
        moments=jnp.dtype(args.moments),
    )


def _writer(path: str | None):
    if path is None:
        return None
    return lambda compiled: Path(path).write_text(compiled.as_text(), "utf-8")


def _print(planned: Plan, *, as_json: bool) -> None:
    print(json.dumps(planned.as_dict()) if as_json else report(planned))
