"""What one run of a program costs a device: FLOPs, HBM bytes, bytes by collective.

From the jaxpr and its layouts alone, loops multiplied by their length. Of a branch that
data decide the dearest way counts. A loop whose length data decide counts as not entered
(`skipped_loops`): here those hold what unbalanced routing brings. Routing is taken as
balanced: a grouped product counts the rows that are there on average, not its buffer.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from dsjax.plan.collectives import Collectives, Sent
from dsjax.plan.graph import KERNELS, Block, Op
from dsjax.plan.traffic import traffic

# One FLOP for each element of the result, as XLA counts them.
ARITHMETIC = frozenset(
    """abs add add_any and ceil clamp convert_element_type cos div eq exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
    nextafter not or pow rem round rsqrt select_n sign sin sqrt square sub tanh
    xor""".split()  # noqa: SIM905
)
REDUCTIONS = ("reduce_", "arg", "cum")  # one for each element of the operand


@dataclass(frozen=True, kw_only=True)
class Routed:
    """How many rows grouped products have: `rows` a layer of a device, if the experts
    are chosen evenly. A layer is one iteration of a loop over `layers`, or outside
    such loops.
    """

    rows: float = math.inf
    layers: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one device. `flops`: all; `products`: those of matrix products and kernels.
    `sent`: bytes by kind of collective and mesh axes, see `dsjax.plan.collectives`.
    `uncounted`: kernels that do not say what they cost; their FLOPs are missing.
    """

    flops: float = 0.0
    products: float = 0.0
    traffic: float = 0.0
    sent: Sent = field(default_factory=dict)
    skipped_loops: int = 0
    uncounted: frozenset[str] = frozenset()

    def __add__(self, other: "Cost") -> "Cost":
        sent = Counter(self.sent)
        sent.update(other.sent)
        return Cost(
            flops=self.flops + other.flops,
            products=self.products + other.products,
            traffic=self.traffic + other.traffic,
            sent=dict(sent),
            skipped_loops=self.skipped_loops + other.skipped_loops,
            uncounted=self.uncounted | other.uncounted,
        )

    def times(self, count: int) -> "Cost":
        """Of `count` runs."""
        return replace(
            self,
            flops=count * self.flops,
            products=count * self.products,
            traffic=count * self.traffic,
            sent={key: count * size for key, size in self.sent.items()},
        )


def cost(
    block: Block, sizes: dict[str, int], *, routed: Routed = Routed(), share: float = 1
) -> Cost:
    """Of a block on a mesh whose axes have `sizes`. `share`: the part of a layer's
    routed rows that one run of the block sees.
    """
    total = Cost()
    collectives = Collectives(sizes)
    for op in block.ops:
        collectives.follow(op)
        total += _of_op(op, sizes, routed, share)
    sent = collectives.finish(block.outputs)
    rows = routed.rows * share
    moved = traffic(block, fraction=lambda op: filled(op, rows))
    return total + Cost(sent=sent, traffic=moved)


def _of_op(op: Op, sizes: dict[str, int], routed: Routed, share: float) -> Cost:
    if op.name == "scan":
        length = op.params["length"]
        of_layers = share == 1 and length in routed.layers
        inner = share if of_layers else share / max(length, 1)
        layers = frozenset() if of_layers else routed.layers
        below = replace(routed, layers=layers)
        return cost(op.bodies[0], sizes, routed=below, share=inner).times(length)
    if op.name == "while":
        return Cost(skipped_loops=1)
    if op.name == "cond":
        ways = [cost(way, sizes, routed=routed, share=share) for way in op.bodies]
        return max(ways, key=lambda way: (way.flops, way.traffic))
    if op.name in KERNELS and op.params.get("cost_estimate") is None:
        name = op.params.get("name") or op.name
        return Cost(uncounted=frozenset([str(name)]))
    products = product_flops(op) * filled(op, routed.rows * share)
    return Cost(flops=products + _elementwise(op), products=products)


def product_flops(op: Op) -> float:
    """Two for each multiplication and addition of a product's operands as they lie."""
    if op.name == "dot_general":
        (contracting, _), (batch, _) = op.params["dimension_numbers"]
        left, right = op.inputs
        inner = math.prod(left.shape[dim] for dim in (*contracting, *batch))
        (_, contracting), (_, batch) = op.params["dimension_numbers"]
        both = math.prod(right.shape[dim] for dim in (*contracting, *batch))
        # Where one operand alone is cut, each device multiplies that part.
        return 2.0 * left.size * right.size / max(inner, both)
    if op.name == "ragged_dot_general":
        return _ragged_flops(op)
    if (estimate := op.params.get("cost_estimate")) is not None:
        return float(estimate.flops)
    return 0.0


def _ragged_flops(op: Op) -> float:
    """Rows times the matrix of their group, whichever dimension the groups cut."""
    left, right, _ = op.inputs
    numbers = op.params["ragged_dot_dimension_numbers"]
    (of_left, of_right), (batch, _) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    inner = math.prod(right.shape[d] for d in (*of_right, *groups))
    outer = right.size / inner
    del of_left, batch
    return 2.0 * left.size * outer


def filled(op: Op, rows: float) -> float:
    """The part of a grouped product's buffer that `rows` fill: 1 of other operations."""
    if op.name == "ragged_dot_general":
        numbers = op.params["ragged_dot_dimension_numbers"]
        (dim,) = numbers.lhs_ragged_dimensions
        return min(1.0, rows / max(op.inputs[0].shape[dim], 1))
    return 1.0


def _elementwise(op: Op) -> float:
    if op.name in ARITHMETIC:
        return float(op.outputs[0].size)
    if op.name.startswith(REDUCTIONS):
        return float(op.inputs[0].size)
    return 0.0
