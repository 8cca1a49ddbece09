"""A plan: what a program takes and what it can reach on hardware that is not here."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from jax.sharding import Mesh

from dsjax import count
from dsjax.config import ModelConfig, Moe
from dsjax.errors import UserError
from dsjax.plan.costs import Cost, Routed, cost
from dsjax.plan.graph import graph
from dsjax.plan.memory import Memory, OverfullError, compiled, groups, memory
from dsjax.plan.network import network
from dsjax.plan.programs import Mode, Program, Work, trace
from dsjax.plan.topology import Topology
from dsjax.sharding import AXES, BATCH, make_mesh


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of one run, each resource by itself at its peak."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> float:
        """Seconds if the network waits for the rest, and the rest for it."""
        return max(self.compute, self.memory) + self.network

    @property
    def overlapped(self) -> float:
        """Seconds if everything overlaps."""
        return max(self.compute, self.memory, self.network)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known of a program on a mesh. Bytes and FLOPs are of one device and
    one run; `model_flops` are those the model itself needs, without what is computed
    again. `memory` is None until it is compiled.
    """

    work: Work
    topology: Topology
    sizes: dict[str, int]
    program: Program
    cost: Cost
    roofline: Roofline
    model_flops: float
    memory: Memory | None = None
    fits: bool | None = None
    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return len(self.topology.devices)

    def mfu(self, seconds: float) -> float:
        """The share of the peak that a run of `seconds` would reach."""
        return self.model_flops / (self.topology.chip.flops * seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, if nothing overlaps with the network."""
        return self.work.tokens(self.devices) / self.roofline.bound

    def as_dict(self) -> dict:
        """For JSON: every number in base units, under its name."""
        memory = self.memory
        chip = self.topology.chip
        return {
            "model": self.work.config.name,
            "mode": self.work.mode.value,
            "topology": self.topology.name,
            "mesh": self.sizes,
            "devices": self.devices,
            "batch": self.work.batch(self.devices),
            "length": self.work.length,
            "precision": self.program.precision,
            "remat": self.work.remat.value if self.work.mode is Mode.TRAIN else None,
            "mtp": self.work.trains_mtp,
            "arguments_bytes": memory and memory.arguments,
            "temporaries_bytes": memory and memory.temporaries,
            "outputs_bytes": memory and memory.outputs,
            "aliased_bytes": memory and memory.aliased,
            "peak_bytes": memory and memory.peak,
            "host_bytes": memory and memory.host,
            "hbm_bytes": int(chip.memory),
            "fits": self.fits,
            "groups_bytes": groups(self.program),
            "flops": self.cost.flops,
            "product_flops": self.cost.products,
            "model_flops": self.model_flops,
            "hbm_traffic_bytes": self.cost.traffic,
            "collectives": [
                {"kind": kind, "axis": ",".join(axes), "bytes": size}
                for (kind, axes), size in sorted(self.cost.sent.items())
            ],
            "loops_not_entered": self.cost.skipped_loops,
            "uncounted_kernels": sorted(self.cost.uncounted),
            "roofline_seconds": {
                "compute": self.roofline.compute,
                "memory": self.roofline.memory,
                "network": self.roofline.network,
            },
            "mfu_bound": self.mfu(self.roofline.bound),
            "mfu_bound_overlapped": self.mfu(self.roofline.overlapped),
            "tokens_per_second": self.tokens_per_second,
            "compile_seconds": self.compile_seconds,
            "compile_cpu_seconds": self.compile_cpu_seconds,
        }


def estimate(work: Work, topology: Topology, sizes: dict[str, int]) -> Plan:
    """The plan without what only a compiler knows. `sizes`: of the mesh, by axis.

    Raises UserError when the mesh is not one of all devices.
    """
    mesh = mesh_of(topology, sizes)
    program = trace(work, mesh)
    shape = dict(mesh.shape)
    block = graph(program.traced.jaxpr, platform=topology.platform)
    found = cost(block, shape, routed=routed(work, mesh))
    chip = topology.chip
    roofline = Roofline(
        compute=found.flops / chip.flops,
        memory=found.traffic / chip.bandwidth,
        network=network(topology, mesh).seconds(found.sent),
    )
    return Plan(
        work=work,
        topology=topology,
        sizes=shape,
        program=program,
        cost=found,
        roofline=roofline,
        model_flops=model_flops(work) * work.tokens(mesh.size) / mesh.size,
    )


def compile(plan: Plan, *, look: Callable | None = None) -> Plan:
    """The plan with what the compiler says of memory.

    `look` is called with the compiled program, if it fits.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    built = None
    try:
        built = compiled(plan.program)
        found = memory(built)
    except OverfullError as error:
        found = _overfull(plan.program, error.peak)
    done = replace(
        plan,
        memory=found,
        fits=built is not None and found.peak <= plan.topology.chip.memory,
        compile_seconds=time.perf_counter() - wall,
        compile_cpu_seconds=time.process_time() - cpu,
    )
    if look is not None and built is not None:
        look(built)
    return done


def _overfull(program: Program, peak: int) -> Memory:
    """Arguments are known without a compiler; what it gave up on is its peak."""
    arguments = sum(
        size for name, size in groups(program).items() if name in program.arguments
    )
    return Memory(
        arguments=arguments,
        temporaries=max(peak - arguments, 0),
        outputs=0,
        aliased=0,
        peak=peak,
    )


def mesh_of(topology: Topology, sizes: dict[str, int]) -> Mesh:
    """All devices as a mesh. Raises UserError when the product is another number."""
    devices = list(topology.devices)
    product = 1
    for size in sizes.values():
        product *= size
    if product != len(devices):
        written = ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "of one"
        raise UserError(
            f"mesh {written} is {product} devices, {topology.name} has {len(devices)}"
        )
    return make_mesh(**{axis: sizes.get(axis, 1) for axis in AXES}, devices=devices)


def routed(work: Work, mesh: Mesh) -> Routed:
    """Rows of a device's grouped products if routing is even: an expert axis shares
    all rows of its group, the other axes that cut the batch keep theirs.
    """
    moe = [(s.count, s.feed_forward) for s in work.config.segments]
    moe = [(layers, part) for layers, part in moe if isinstance(part, Moe)]
    if not moe:
        return Routed()
    rows = work.batch(mesh.size)
    shards = 1
    for axis in BATCH:
        if axis == "expert" or rows % (shards * mesh.shape[axis]) == 0:
            shards *= mesh.shape[axis]
    tokens = work.tokens(mesh.size) / shards
    return Routed(
        rows=tokens * max(part.top_k for _, part in moe),
        layers=frozenset(layers for layers, _ in moe),
    )


def model_flops(work: Work) -> float:
    """FLOPs a token: 6 for each active parameter but the input embedding's, and causal
    attention; without a backward pass a third of it.
    """
    config: ModelConfig = work.config
    match work.mode:
        case Mode.TRAIN:
            return count.training_flops(config, length=work.length, mtp=work.trains_mtp)
        case Mode.PREFILL:
            return count.training_flops(config, length=work.length, mtp=False) / 3
        case Mode.DECODE:
            return count.count(config, context=work.length).flops
