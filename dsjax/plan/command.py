"""`dsjax plan`: from the command line's words to a report."""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp

from dsjax import count
from dsjax.errors import UserError
from dsjax.nn.options import Remat
from dsjax.plan.meshes import rank
from dsjax.plan.plan import compile, estimate, mesh_of
from dsjax.plan.programs import Mode, Work
from dsjax.plan.progress import progress
from dsjax.plan.report import mesh, report, summaries, table
from dsjax.plan.topology import topology
from dsjax.sharding import parse_sizes

LENGTH = 4096  # of pre-training, throughout the family
COMPILES = 3  # of the candidates for a mesh, at most


def plan(args: argparse.Namespace) -> None:
    """Prints the plan that `dsjax plan` was asked for."""
    work = _work(args)
    hardware = topology(args.topology)
    name = f"{work.config.name}, {work.mode.value}, {hardware.name}"

    def note(what: str, sizes: dict[str, int]):
        return progress(f"{name}, {mesh(sizes)}: {what}")

    work.batch(len(hardware.devices))  # what is wrong shows before anything is traced
    if args.mesh is not None and args.mesh != "auto":
        sizes = parse_sizes(args.mesh)
        mesh_of(hardware, sizes)
        with note("tracing", sizes):
            planned = estimate(work, hardware, sizes)
        with note("compiling", planned.sizes):
            planned = compile(planned, look=_writer(args.hlo))
        ranking = None
    else:
        enough = 1 if args.mesh is None else COMPILES
        ranking = rank(
            work,
            hardware,
            compiles=COMPILES,
            enough=enough,
            look=_writer(args.hlo),
            note=note,
        )
        planned = ranking.compiled[0]
    if args.json:
        listed = {} if ranking is None else {"meshes": summaries(ranking)}
        print(json.dumps(planned.as_dict() | listed))
    else:
        print(report(planned))
        if ranking is not None:
            print(table(ranking))


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
        cache=jnp.dtype(args.cache_dtype or "bfloat16"),
    )


def _writer(path: str | None):
    if path is None:
        return None
    return lambda compiled: Path(path).write_text(compiled.as_text(), "utf-8")
