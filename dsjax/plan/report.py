"""A plan for a reader: memory, work, time, in one screen."""

from dsjax.plan.plan import Plan
from dsjax.plan.programs import Mode

GB = 1e9


def report(plan: Plan) -> str:
    """Lines of text. GB are 10^9 bytes; figures are of one device."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_work(plan), *_time(plan)])


def mesh(sizes: dict[str, int]) -> str:
    """ "fsdp=64,expert=8": the axes that are longer than one."""
    axes = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    return ",".join(axes) or "of one device"


def _head(plan: Plan) -> list[str]:
    work = plan.work
    batch = f"{work.batch(plan.devices):,} sequences of {work.length:,}"
    if work.mode is Mode.DECODE:
        batch = f"one token for each of {work.batch(plan.devices):,} sequences, "
        batch += f"caches of {work.length:,}"
    options = []
    if work.mode is Mode.TRAIN:
        options = [
            f"remat {work.remat.value}",
            f"MTP {'on' if work.trains_mtp else 'off'}",
        ]
    kinds = ", ".join(
        f"{name} {dtype}" for name, dtype in plan.program.precision.items()
    )
    return [
        f"{work.config.name}, {work.mode.value}, {plan.topology.name}: "
        f"{plan.devices} devices, mesh {mesh(plan.sizes)}",
        f"{batch}{''.join(', ' + option for option in options)}",
        kinds,
    ]


def _memory(plan: Plan) -> list[str]:
    memory, hbm = plan.memory, plan.topology.chip.memory
    if memory is None:
        return ["not compiled: memory unknown"]
    parts = _largest(plan)
    lines = [
        f"memory a device      {memory.peak / GB:10.2f} GB at its peak, of {hbm / GB:.2f}: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
        f"  arguments          {memory.arguments / GB:10.2f}     "
        f"{memory.aliased / GB:.2f} of them donated",
        f"  temporaries        {memory.temporaries / GB:10.2f}     not all at once",
        f"  new outputs        {memory.outputs / GB:10.2f}",
    ]
    if memory.host:
        lines.append(f"  on the host        {memory.host / GB:10.2f}")
    lines.append("  largest            " + parts)
    return lines


def _largest(plan: Plan) -> str:
    from dsjax.plan.memory import groups

    sizes = sorted(groups(plan.program).items(), key=lambda item: -item[1])
    found = [f"{name} {size / GB:.2f}" for name, size in sizes if size > 0.005 * GB]
    rest = plan.memory.peak - sum(
        size for name, size in sizes if name in plan.program.arguments
    )
    return ", ".join([*found, f"all else at the peak {rest / GB:.2f}"])


def _work(plan: Plan) -> list[str]:
    cost = plan.cost
    lines = [
        f"FLOPs                {cost.flops / 1e12:10.2f} T   "
        f"{plan.model_flops / 1e12:.2f} of them the model's own",
        f"HBM traffic          {cost.traffic / GB:10.2f} GB  estimated",
    ]
    for (kind, axes), size in sorted(cost.sent.items(), key=lambda item: -item[1]):
        lines.append(f"{kind:20} {size / GB:10.3f} GB  over {', '.join(axes)}")
    if cost.skipped_loops:
        lines.append(
            f"loops not entered    {cost.skipped_loops:10}     "
            "data decide their length; balanced routing needs none"
        )
    return lines


def _time(plan: Plan) -> list[str]:
    roofline = plan.roofline
    lines = [
        f"roofline             {1e3 * roofline.compute:10.2f} ms compute, "
        f"{1e3 * roofline.memory:.2f} memory, {1e3 * roofline.network:.2f} network",
        f"MFU at most          {plan.mfu(roofline.bound):10.1%}     "
        f"{plan.mfu(roofline.overlapped):.1%} if all overlaps",
        f"tokens/s at most     {plan.tokens_per_second:10,.0f}     "
        f"{plan.tokens_per_second / plan.devices:,.1f} a device",
    ]
    if plan.memory is not None:
        lines.append(
            f"compiled in          {plan.compile_seconds:10.1f} s   "
            f"{plan.compile_cpu_seconds:.1f} s of CPU"
        )
    return lines
