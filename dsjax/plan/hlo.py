"""What a compiled program sends, read off its HLO: to check a plan with.

Loops are resolved by the constant that their condition compares the counter with, less
the counter's start; the TPU compiler states no trip count. A loop without such a constant
counts as not entered, as in `dsjax.plan.costs`. Bytes follow the convention of
`dsjax.plan.collectives`. Groups of devices are told by the mesh axes that they span.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dsjax.plan.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    RAGGED_ALL_TO_ALL,
    REDUCE_SCATTER,
    Sent,
)

KINDS = (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    RAGGED_ALL_TO_ALL,
    REDUCE_SCATTER,
)
BITS = {"pred": 8, "token": 0}  # of types whose name does not end in their width

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}"
)
_NAMES = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line. `rest` is what follows the opening bracket of its operands."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names."""
        return _NAMES.findall(self.rest.partition(")")[0])

    def attribute(self, name: str) -> str | None:
        """The name of the computation given as `name=`."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found and found[1]


@dataclass
class Module:
    """Computations by name, and the type of every instruction."""

    entry: str = ""
    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Module":
        """From `Compiled.as_text()`. Lines inside of strings are left out."""
        module, current, inside = cls(), None, False
        for line in text.splitlines():
            opened = (line.count('"') - line.count('\\"')) % 2 == 1
            within, inside = inside, inside != opened
            if within:
                continue
            if found := _COMPUTATION.match(line):
                current = module.computations.setdefault(found[2], [])
                if found[1]:
                    module.entry = found[2]
            elif current is not None and (found := _INSTRUCTION.match(line)):
                name, kind, opcode, rest = found.groups()
                current.append(
                    Instruction(name=name, type=kind, opcode=opcode, rest=rest)
                )
                module.types[name] = kind
        return module


def collectives(text: str, sizes: dict[str, int]) -> Sent:
    """Bytes by kind and mesh axes that one run of the program `text` sends a device.

    `sizes`: of the mesh's axes in order, of which the program's devices are the
    row-major numbers.
    """
    module = Module.parse(text)
    return dict(_Reader(module, sizes).of(module.entry))


@dataclass
class _Reader:
    module: Module
    sizes: dict[str, int]
    known: dict[str, Counter] = field(default_factory=dict)

    def of(self, computation: str) -> Counter:
        """What a computation and all that it calls send."""
        if computation not in self.known:
            total: Counter = Counter()
            for instruction in self.module.computations.get(computation, ()):
                total.update(self.instruction(instruction, computation))
            self.known[computation] = total
        return self.known[computation]

    def instruction(self, line: Instruction, inside: str) -> Counter:
        opcode = line.opcode.removesuffix("-start")
        if opcode in KINDS:
            return self.collective(line, opcode, inside)
        if opcode == "while":
            return self.loop(line)
        if opcode == "conditional":
            ways = [self.of(name) for name in _branches(line)]
            return max(ways, key=lambda way: sum(way.values()), default=Counter())
        if opcode.endswith("-done") or opcode in ("reduce", "sort", "scatter"):
            return Counter()
        total: Counter = Counter()
        for name in _CALLED.findall(line.rest):
            total.update(self.of(name))
        return total

    def collective(self, line: Instruction, kind: str, inside: str) -> Counter:
        members = self.members(line)
        axes = self.axes(members)
        if not axes:
            return Counter()
        size = result = _bytes(_result(line, kind))
        if kind == REDUCE_SCATTER:
            size = result * len(members)
        elif kind == RAGGED_ALL_TO_ALL:
            size = min(result, _bytes(self.module.types[line.operands[0]]))
        elif kind == ALL_REDUCE and inside.startswith("all-reduce-scatter"):
            kind = REDUCE_SCATTER  # the TPU's fusion of a sum and a cut
        return Counter({(kind, axes): size})

    def members(self, line: Instruction) -> list[int]:
        """The first group of devices."""
        if line.opcode.startswith(PERMUTE):
            pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line.rest)
            return [int(pairs[1]), int(pairs[2])]
        return next(groups(line.rest, math.prod(self.sizes.values())))

    def axes(self, members: list[int]) -> tuple[str, ...]:
        """The mesh axes along which the members of a group differ."""
        places = np.unravel_index(np.array(members), tuple(self.sizes.values()))
        return tuple(
            axis for axis, place in zip(self.sizes, places) if len(set(place)) > 1
        )

    def loop(self, line: Instruction) -> Counter:
        body, condition = line.attribute("body"), line.attribute("condition")
        count = self.trips(condition, line.operands[0])
        return Counter({key: count * size for key, size in self.of(body).items()})

    def trips(self, condition: str, start: str) -> int:
        """How often a loop runs; 0 if data decide."""
        lines = {line.name: line for line in self.module.computations[condition]}
        compares = [line for line in lines.values() if self.compares(line)]
        if len(compares) != 1 or any(
            name not in lines for name in compares[0].operands
        ):
            return 0
        counter, limit = (lines[name] for name in compares[0].operands)
        place = re.search(r"index=(\d+)", counter.rest)
        if limit.opcode != "constant" or place is None:
            return 0
        first = self.element(start, int(place[1]))
        if first is None or first.opcode != "constant":
            return 0
        return max(_number(limit) - _number(first), 0)

    def compares(self, line: Instruction) -> bool:
        """Whether it is `first operand < second operand`, or a fusion of just that."""
        if line.opcode != "fusion":
            return line.opcode == "compare" and "direction=LT" in line.rest
        inside = self.module.computations.get(line.attribute("calls"), [])
        return any("direction=LT" in inner.rest for inner in inside)

    def element(self, name: str, index: int) -> Instruction | None:
        """The instruction behind an element of a tuple, copies left out."""
        line = self.find(name)
        if line is not None and line.opcode == "tuple":
            line = self.find(line.operands[index])
        while line is not None and line.opcode in ("copy", "bitcast"):
            line = self.find(line.operands[0])
        return line

    def find(self, name: str) -> Instruction | None:
        if not hasattr(self, "lines"):
            self.lines = {
                line.name: line
                for lines in self.module.computations.values()
                for line in lines
            }
        return self.lines.get(name)


def groups(attributes: str, devices: int) -> Iterator[list[int]]:
    """The groups of devices that a line's `replica_groups` writes in one of its forms:
    {{0,1},{2,3}}, [2,2]<=[4], [2,2]<=[2,2]T(1,0), mesh['a'=2,'b'=2] {'b'}, and the last
    with the order of its devices, mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}.
    """
    if found := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes):
        count, size, shape, turned = found.groups()
        numbers = _iota(shape, turned).reshape(int(count), int(size))
        yield from numbers.tolist()
    elif found := _MESH.search(attributes):
        names = re.findall(r"'([^']+)'=(\d+)", found[1])
        spanned = re.findall(r"'([^']+)'", found[4])
        numbers = _iota(found[2] or str(devices), found[3])
        numbers = numbers.reshape([int(size) for _, size in names])
        across = [i for i, (name, _) in enumerate(names) if name in spanned]
        numbers = np.moveaxis(numbers, across, range(-len(across), 0))
        size = math.prod(numbers.shape[-len(across) :])
        yield from numbers.reshape(-1, size).tolist()
    elif found := re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", attributes):
        for group in re.findall(r"\{([\d,]+)\}", found[1]):
            yield list(_integers(group))
    else:
        yield list(range(devices))


def _iota(shape: str, turned: str | None) -> np.ndarray:
    """0, 1, 2, ... in `shape`, its dimensions permuted."""
    sizes = _integers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_integers(turned)) if turned else numbers


def _result(line: Instruction, kind: str) -> str:
    """The type of what a collective gives; a start's tuple has its operand in front."""
    if line.opcode.endswith("-start") and kind in (ALL_GATHER, PERMUTE):
        arrays = [found[0] for found in re.finditer(_ARRAY, line.type)]
        arrays = [array for array in arrays if not array.startswith("u32[]")]
        return " ".join(arrays[len(arrays) // 2 :])
    return line.type


def _bytes(kind: str) -> int:
    """Of all arrays in a type."""
    total = 0
    for name, shape in _ARRAY.findall(kind):
        digits = re.search(r"\d+", name)
        bits = BITS[name] if name in BITS else int(digits[0]) if digits else 0
        total += math.prod(_integers(shape)) * bits // 8
    return total


def _branches(line: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", line.rest):
        return _NAMES.findall(found[1])
    pair = (line.attribute("true_computation"), line.attribute("false_computation"))
    return [name for name in pair if name]


def _number(line: Instruction) -> int:
    return int(line.rest.partition(")")[0])


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
