"""A plan for a reader: memory, work and time in one screen; a table of meshes."""

from dsjax.plan.memory import groups
from dsjax.plan.meshes import Ranking
from dsjax.plan.plan import Plan
from dsjax.plan.programs import Mode


def report(plan: Plan) -> str:
    """Lines of text. Figures are of one device; GB are 10^9 bytes."""
    parts = (_head(plan), _memory(plan), _work(plan), _time(plan))
    return "\n".join(line for part in parts for line in [*part, ""]).rstrip()


def mesh(sizes: dict[str, int]) -> str:
    """fsdp=64,expert=8: the axes that are longer than one."""
    axes = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    return ",".join(axes) or "one device"


def table(ranking: Ranking) -> str:
    """All meshes that were looked at, the best first."""
    lines = ["", f"{'mesh':32}{'time':>10}{'MFU':>8}{'peak':>11}"]
    lines += [_row(plan) for plan in ranking.compiled]
    lines += [_row(plan, "not compiled") for plan in ranking.estimated]
    lines += [_row(plan, "too large: its arrays alone") for plan in ranking.hopeless]
    return "\n".join(lines)


def summaries(ranking: Ranking) -> list[dict]:
    """The same for JSON; what was not compiled has no peak."""
    plans = (*ranking.compiled, *ranking.estimated, *ranking.hopeless)
    return [
        {
            "mesh": plan.sizes,
            "seconds": plan.roofline.bound,
            "mfu_bound": plan.mfu(plan.roofline.bound),
            "peak_bytes": plan.memory and plan.memory.peak,
            "fits": False if plan in ranking.hopeless else plan.fits,
        }
        for plan in plans
    ]


def _row(plan: Plan, state: str = "") -> str:
    peak = ""
    if plan.memory is not None:
        peak = _bytes(plan.memory.peak) if plan.memory.peak else "?"
        state = "fits" if plan.fits else "does not fit"
    seconds = plan.roofline.bound
    return (
        f"{mesh(plan.sizes):32}{_time_of(seconds):>10}{plan.mfu(seconds):8.1%}"
        f"{peak:>11}  {state}"
    )


def _head(plan: Plan) -> list[str]:
    work, rows = plan.work, plan.work.batch(plan.devices)
    what = f"{rows:,} sequences of {work.length:,}"
    if work.mode is Mode.DECODE:
        what = f"a token for each of {rows:,} sequences, caches of {work.length:,}"
    if work.mode is Mode.TRAIN:
        what += f", remat {work.remat.value}"
        what += f", MTP {'on' if work.trains_mtp else 'off'}"
    precision = plan.program.precision.items()
    return [
        f"{work.config.name}, {work.mode.value}, {plan.topology.name}: "
        f"{plan.devices} devices as {mesh(plan.sizes)}",
        what,
        ", ".join(f"{name} {dtype}" for name, dtype in precision),
    ]


def _memory(plan: Plan) -> list[str]:
    memory, hbm = plan.memory, plan.topology.chip.memory
    if memory is None:
        return ["not compiled: its memory is not known"]
    fits = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        _line("memory at its peak", _bytes(memory.peak), f"of {_bytes(hbm)}: {fits}"),
        _line("  arguments", _bytes(memory.arguments), _donated(plan)),
        _line("  temporaries", _bytes(memory.temporaries), "not all at once"),
        _line("  further outputs", _bytes(memory.outputs)),
    ]
    if memory.host:
        lines.append(_line("  on the host", _bytes(memory.host), "beside these"))
    return [*lines, "  largest: " + _largest(plan)]


def _donated(plan: Plan) -> str:
    aliased = plan.memory.aliased
    return f"{_bytes(aliased)} of them donated" if aliased else "none donated"


def _largest(plan: Plan) -> str:
    """The groups of arrays by size, and what the peak has beside the arguments."""
    sizes = sorted(groups(plan.program).items(), key=lambda item: -item[1])
    given = sum(size for name, size in sizes if name in plan.program.arguments)
    found = [f"{name} {_bytes(size)}" for name, size in sizes if size > given / 100]
    rest = plan.memory.peak - plan.memory.arguments
    beside = "activations and all else" if plan.program.gradients else "activations"
    if plan.program.gradients:
        beside = "gradients, activations and the rest"
    return ", ".join([*found, f"beside the arguments {_bytes(rest)} ({beside})"])


def _work(plan: Plan) -> list[str]:
    cost = plan.cost
    own = f"{_number(plan.model_flops)} of them the model's own"
    lines = [
        _line("FLOPs", _number(cost.flops), own),
        _line("HBM traffic", _bytes(cost.traffic), "estimated"),
    ]
    for (kind, axes), size in sorted(cost.sent.items(), key=lambda item: -item[1]):
        lines.append(_line(kind, _bytes(size), f"over {', '.join(axes)}"))
    if cost.skipped_loops:
        lines.append(
            f"  routing is taken as balanced: {cost.skipped_loops} loops for what is "
            "over are not entered"
        )
    if cost.uncounted:
        kernels = ", ".join(sorted(cost.uncounted))
        lines.append(f"  without the FLOPs of {kernels}: no cost estimate")
    return lines


def _time(plan: Plan) -> list[str]:
    roofline = plan.roofline
    parts = [
        f"{name} {_time_of(getattr(roofline, name))}"
        for name in ("compute", "memory", "network")
    ]
    rate = plan.tokens_per_second
    lines = [
        _line("time at least", _time_of(roofline.bound), ", ".join(parts)),
        _line(
            "MFU at most",
            f"{plan.mfu(roofline.bound):.1%}",
            f"{plan.mfu(roofline.overlapped):.1%} if the network overlaps with the rest",
        ),
        _line(
            "tokens/s at most", f"{rate:,.0f}", f"{rate / plan.devices:,.1f} a device"
        ),
    ]
    if plan.memory is not None:
        cpu = f"{plan.compile_cpu_seconds:.1f} s of CPU"
        lines.append(_line("compiled in", f"{plan.compile_seconds:.1f} s", cpu))
    return lines


def _line(name: str, figure: str, note: str = "") -> str:
    return f"{name:20}{figure:>12}  {note}".rstrip()


def _bytes(size: float) -> str:
    return _scaled(size, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def _number(count: float) -> str:
    return _scaled(count, (("T", 1e12), ("G", 1e9), ("M", 1e6)), "")


def _time_of(seconds: float) -> str:
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)), "s")


def _scaled(number: float, units: tuple[tuple[str, float], ...], least: str) -> str:
    for unit, size in units:
        if abs(number) >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f} {least}".rstrip()
