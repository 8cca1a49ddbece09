"""Which meshes are worth a try, and which of them are best."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsjax.config import ModelConfig, Moe
from dsjax.errors import UserError
from dsjax.plan.memory import groups
from dsjax.plan.plan import Plan, compile, estimate
from dsjax.plan.programs import Mode, Work
from dsjax.plan.topology import Topology

TENSOR = 8  # ways at most: beyond, parts of a matrix are too thin for a core


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Meshes by what they promise. `compiled`: the best first, those that do not fit
    last. `estimated`: the rest, the best first. `hopeless`: those whose arrays alone
    are more than the memory.
    """

    compiled: tuple[Plan, ...]
    estimated: tuple[Plan, ...]
    hopeless: tuple[Plan, ...]


def candidates(work: Work, devices: int) -> list[dict[str, int]]:
    """The sensible meshes, by axis.

    Experts lie on as many devices as their number allows, in any division. Training
    cuts the weights over all the rest (fsdp), and matrices by `tensor` only as far as
    there are fewer sequences than devices. Without a backward pass both are open: the
    rest holds copies (data) or cuts them (fsdp).
    """
    found = []
    for expert in _divisors(devices, of=_experts(work.config)):
        for tensor in _tensors(work, devices // expert):
            rest = devices // (expert * tensor)
            ways = ("fsdp",) if work.mode is Mode.TRAIN else ("fsdp", "data")
            for axis in ways[: 1 if rest == 1 else None]:
                found.append({axis: rest, "expert": expert, "tensor": tensor})
    return found


def _tensors(work: Work, devices: int) -> Iterator[int]:
    heads = getattr(work.config.attention, "num_kv_heads", None)
    heads = heads or work.config.attention.num_heads
    least = 1
    if work.mode is Mode.TRAIN:
        least = max(1, -(-1 // work.batch_per_device))
    for size in _divisors(devices, of=heads):
        if least <= size <= TENSOR:
            yield size
            if work.mode is Mode.TRAIN:
                return


def _experts(config: ModelConfig) -> int:
    """How many devices can have experts of their own."""
    parts = [segment.feed_forward for segment in config.segments]
    return min((p.num_experts for p in parts if isinstance(p, Moe)), default=1)


def _divisors(number: int, *, of: int) -> list[int]:
    """The common divisors."""
    return [d for d in range(1, number + 1) if number % d == 0 and of % d == 0]


def rank(
    work: Work,
    topology: Topology,
    *,
    compiles: int,
    enough: int,
    look: Callable | None = None,
    note: Callable[[str, dict[str, int]], object],
) -> Ranking:
    """Estimates all candidates, then compiles the most promising: at most `compiles`, or
    until `enough` of them fit. `look` is called with each that does.

    `note(what, mesh)` gives a context manager around each step that takes long. Raises
    UserError if no mesh is possible.
    """
    plans = []
    for sizes in candidates(work, len(topology.devices)):
        with note("tracing", sizes):
            plans.append(estimate(work, topology, sizes))
    if not plans:
        raise UserError(
            f"no mesh of {len(topology.devices)} devices suits {work.config.name} with "
            f"{work.batch_per_device} sequences a device; give one with --mesh"
        )
    plans.sort(key=lambda plan: plan.roofline.bound)
    hopeless = [plan for plan in plans if _least(plan) > topology.chip.memory]
    open_ = [plan for plan in plans if plan not in hopeless] or hopeless[:1]
    compiled: list[Plan] = []
    while open_ and len(compiled) < compiles:
        if sum(bool(plan.fits) for plan in compiled) == enough:
            break
        plan = open_.pop(0)
        with note("compiling", plan.sizes):
            compiled.append(compile(plan, look=look))
    compiled.sort(key=lambda plan: (not plan.fits, plan.roofline.bound))
    return Ranking(
        compiled=tuple(compiled),
        estimated=tuple(open_),
        hopeless=tuple(plan for plan in hopeless if plan not in compiled),
    )


def _least(plan: Plan) -> int:
    """Bytes that are surely needed: the arrays that are given."""
    sizes = groups(plan.program)
    return sum(size for name, size in sizes.items() if name in plan.program.arguments)
