"""An estimate of the bytes that a block moves between HBM and a core.

The model: matrix products, kernels, gathers, sorts and collectives read their operands
from memory and write their results. What lies between them (elementwise operations,
broadcasts, reductions) is fused: a group of such operations reads what is stored once
and writes what others need once. A group ends where a reduction's result is used, since
that takes another pass over the operand; what a second pass needs is computed again
from what is stored, or stored, whichever is less. A product's only consumer, if it is
such a group, takes the product before it is written. Slices are read where they lie;
updates in place write the update alone. Values of one element cost nothing.

What a loop carries is read and written in each iteration as far as the body touches it,
the slices it scans over likewise. Caches and registers keep nothing from one operation
to the next: a real step may move less, and, where layouts differ or fusions fail, more.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from dsjax.plan.graph import KERNELS, Block, Op, Value

SAME = (
    "copy",
    "name",
    "optimization_barrier",
    "pvary",
    "reduce_precision",
    "reshape",
    "squeeze",
    "stop_gradient",
    "view",
)
PARTS = ("slice", "dynamic_slice", "split")  # read where they lie
INNER = ("scan", "while", "cond")  # count themselves
PRODUCTS = ("dot_general", "ragged_dot_general")
FREE = ("iota", "axis_index", "platform_index", "empty", "empty2")
HEAVY = frozenset(
    """device_put gather sort top_k approx_top_k all_gather all_gather_invariant psum psum2
    psum_invariant pmax pmin reduce_scatter all_to_all ppermute ragged_all_to_all
    conv_general_dilated""".split()  # noqa: SIM905
)
REDUCTIONS = ("reduce_", "arg", "cum")


def traffic(block: Block, *, fraction: Callable[[Op], float]) -> float:
    """Bytes of one run of the block, without those of the loops and branches in it.

    `fraction`: the part of a grouped product's rows that are there.
    """
    return _Traffic(fraction).of(block)


@dataclass
class _Group:
    """A fused group: what it reads, and what of it is written."""

    reads: set[Value] = field(default_factory=set)
    writes: set[Value] = field(default_factory=set)


@dataclass
class _Traffic:
    fraction: Callable[[Op], float]
    origin: dict[Value, Value] = field(default_factory=dict)  # of the same bytes
    parent: dict[int, int] = field(default_factory=dict)  # union-find over groups
    group: dict[Value, int] = field(default_factory=dict)  # fused values
    level: dict[Value, int] = field(default_factory=dict)  # passes before them
    leaves: dict[Value, frozenset[Value]] = field(default_factory=dict)
    product: set[Value] = field(default_factory=set)
    readers: dict[Value, set[int]] = field(default_factory=lambda: defaultdict(set))
    stored: set[Value] = field(default_factory=set)  # someone needs it in memory
    moved: float = 0.0

    def of(self, block: Block) -> float:
        self.reads: dict[int, set[Value]] = defaultdict(set)
        for op in block.ops:
            self._follow(op)
        for value in block.outputs:
            self.stored.add(self._root(value))
        return self.moved + self._groups() + self._products()

    def _follow(self, op: Op) -> None:
        if op.name in SAME or _reshards_nothing(op):
            for value, result in zip(op.inputs, op.outputs):
                self.origin[result] = self._root(value)
        elif op.name in FREE:
            return
        elif op.name in PARTS:
            self.stored |= {self._root(value) for value in op.inputs[:1]}
        elif op.name in INNER:
            self.stored |= set(map(self._root, op.inputs))
        elif op.name in PRODUCTS:
            self._reads_all(op)
            self.product |= set(op.outputs)
            self.level |= dict.fromkeys(op.outputs, 0)
        elif op.name == "dynamic_update_slice":
            self._updates(op, op.inputs[1])
        elif op.name.startswith("scatter"):
            self._updates(op, op.inputs[2])
            self.moved += op.inputs[1].bytes + op.inputs[2].bytes
        elif op.name == "reshard" or op.name in HEAVY or op.name in KERNELS:
            self._reads_all(op)
            self.moved += sum(value.bytes for value in op.outputs)
        else:
            self._fuse(op)

    def _reads_all(self, op: Op) -> None:
        """Reads the operands; of a gather, what it takes of them."""
        if (estimate := op.params.get("cost_estimate")) is not None:
            results = sum(value.bytes for value in op.outputs)
            self.moved += estimate.bytes_accessed - results
        elif op.name == "gather":
            self.moved += op.outputs[0].bytes + op.inputs[1].bytes
        elif op.name == "ragged_dot_general":
            self.moved += self._grouped(op)
        else:
            self.moved += sum(v.bytes for v in set(map(self._root, op.inputs)))
        self.stored |= set(map(self._root, op.inputs))

    def _grouped(self, op: Op) -> float:
        """What a grouped product reads: the rows that are there, and the matrices of
        groups that have any, if the rows choose evenly.
        """
        rows, other, _ = op.inputs
        numbers = op.params["ragged_dot_dimension_numbers"]
        filled = self.fraction(op)
        if not (dims := numbers.rhs_group_dimensions):  # rows times rows
            return filled * (rows.bytes + other.bytes)
        count = other.shape[dims[0]]
        choices = filled * rows.shape[numbers.lhs_ragged_dimensions[0]]
        missed = (1 - 1 / count) ** choices
        return filled * rows.bytes + (1 - missed) * other.bytes

    def _updates(self, op: Op, update: Value) -> None:
        self.moved += 2 * update.bytes  # read the update, write it
        self.stored |= {self._root(value) for value in op.inputs}
        self.origin[op.outputs[0]] = self._root(op.inputs[0])

    def _fuse(self, op: Op) -> None:
        inputs = [self._root(value) for value in op.inputs if value.size > 1]
        level = max((self.level.get(value, 0) for value in inputs), default=0)
        mine = len(self.parent)
        self.parent[mine] = mine
        leaves: set[Value] = set()
        for value in inputs:
            if value not in self.group:  # in memory, or a product on its way there
                self.reads[mine].add(value)
                leaves.add(value)
            elif self.level[value] == level:
                self._join(mine, self.group[value])
                leaves |= self.leaves[value]
            else:
                leaves |= self._again(value, mine)
        reduces = op.name.startswith(REDUCTIONS)
        for result in op.outputs:
            self.level[result] = level + reduces
            if reduces:
                self.readers[result].add(mine)
                self.reads[mine] |= set()
                self.moved += result.bytes
            else:
                self.group[result] = mine
                self.leaves[result] = frozenset(leaves)

    def _again(self, value: Value, mine: int) -> frozenset[Value]:
        """What a later pass reads in order to have an earlier pass's value."""
        leaves = self.leaves[value]
        if sum(leaf.bytes for leaf in leaves) <= value.bytes:
            self.reads[mine] |= leaves
            return leaves
        self.stored.add(value)
        self.reads[mine].add(value)
        return frozenset([value])

    def _groups(self) -> float:
        """Reads and writes of all fused groups; a stored member is written once."""
        groups: dict[int, _Group] = defaultdict(_Group)
        for number, values in self.reads.items():
            groups[self._find(number)].reads |= values
        for value in self.stored:
            if value in self.group:
                groups[self._find(self.group[value])].writes.add(value)
        for number, group in groups.items():
            for value in group.reads:
                self.readers[value].add(number)
        self.absorbed = self._absorbed(groups)
        total = 0.0
        for number, group in groups.items():
            read = group.reads - {self.absorbed.get(number)}
            total += sum(value.bytes for value in read)
            total += sum(value.bytes for value in group.writes)
        return total

    def _absorbed(self, groups: dict[int, _Group]) -> dict[int, Value]:
        """For each group the largest product that only this group takes."""
        found: dict[int, Value] = {}
        for number, group in groups.items():
            alone = [
                value
                for value in group.reads
                if value in self.product
                and value not in self.stored
                and self.readers[value] == {number}
            ]
            if alone:
                found[number] = max(alone, key=lambda value: value.bytes)
        return found

    def _products(self) -> float:
        """Writes of the products that no group takes from the core."""
        taken = set(self.absorbed.values())
        return sum(value.bytes for value in self.product - taken)

    def _root(self, value: Value) -> Value:
        return self.origin.get(value, value)

    def _join(self, one: int, other: int) -> None:
        self.parent[self._find(one)] = self._find(other)

    def _find(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number


def _reshards_nothing(op: Op) -> bool:
    """Whether a change of layout moves nothing: it cuts, or only states the layout."""
    return op.name == "reshard" and not op.inputs[0].axes - op.outputs[0].axes
