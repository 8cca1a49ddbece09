"""Which collectives a program needs: those it names, and those its layouts imply.

Bytes are those of one device and one run of an operation: an all-gather's result, the
operand of a reduce-scatter, all-reduce, all-to-all or permutation, the smaller of operand
and result of a ragged all-to-all (what is sent depends on the data, the buffer does not).

What a layout implies is what XLA makes of it. A product over a cut dimension leaves
partial sums: they are reduced where they arise, so that all devices have the whole. If
the next thing is to cut the sum along the same axis, XLA makes a reduce-scatter of both;
it does not where more than one axis is summed over. A sum that is then rounded to a
narrower type is sent in that.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from dsjax.plan.graph import Op, Value

ALL_GATHER, ALL_REDUCE = "all-gather", "all-reduce"
REDUCE_SCATTER, ALL_TO_ALL = "reduce-scatter", "all-to-all"
RAGGED_ALL_TO_ALL, PERMUTE = "ragged-all-to-all", "collective-permute"

NAMED = {
    "all_gather": ALL_GATHER,
    "all_gather_invariant": ALL_GATHER,
    "psum": ALL_REDUCE,
    "psum2": ALL_REDUCE,
    "psum_invariant": ALL_REDUCE,
    "pmax": ALL_REDUCE,
    "pmin": ALL_REDUCE,
    "reduce_scatter": REDUCE_SCATTER,
    "all_to_all": ALL_TO_ALL,
    "ppermute": PERMUTE,
    "ragged_all_to_all": RAGGED_ALL_TO_ALL,
}
LANES = 128
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or")
# Behind these a sum still waits for the cut that makes a reduce-scatter of it.
PASS = (
    "convert_element_type",
    "copy",
    "name",
    "optimization_barrier",
    "reduce_precision",
    "reshape",
    "squeeze",
    "transpose",
    "view",
)

Sent = dict[tuple[str, tuple[str, ...]], float]  # (kind, mesh axes) -> bytes


@dataclass
class _Sum:
    """A sum over `axes` whose collective is not decided yet."""

    axes: frozenset[str]
    bytes: int
    rounded: bool = False
    decided: bool = False


@dataclass
class Collectives:
    """Follows the operations of one block, in order, and adds up what is sent.

    `sizes` are those of the mesh's axes, in order.
    """

    sizes: dict[str, int]
    sent: Sent = field(default_factory=lambda: defaultdict(float))
    waiting: dict[Value, _Sum] = field(default_factory=dict)

    def follow(self, op: Op) -> None:
        """Adds the collectives of the next operation."""
        if op.name == "reshard":
            self._reshard(*op.inputs, *op.outputs)
        elif op.name in PASS:
            for value, result in zip(op.inputs, op.outputs):
                if value in self.waiting:
                    waiting = self.waiting[result] = self.waiting[value]
                    if result.itemsize < value.itemsize and not waiting.decided:
                        size = waiting.bytes * result.itemsize // value.itemsize
                        waiting.bytes, waiting.rounded = size, True
        elif not self._added(op):
            for value in op.inputs:
                self._whole(value)
            if op.name in NAMED:
                self._named(op)
            elif summed := summed_over(op):
                (result,) = op.outputs
                self._partial(result, summed)

    def finish(self, outputs: Iterable[Value]) -> Sent:
        """What was sent in all; sums that the block returns are reduced before."""
        for value in outputs:
            self._whole(value)
        for waiting in self.waiting.values():  # nobody looked at these
            self._decide(waiting)
        return dict(self.sent)

    def _added(self, op: Op) -> bool:
        """Whether the operation adds two sums that wait for the same, and nothing
        was done to them yet: they wait as one.
        """
        if op.name not in ("add", "add_any"):
            return False
        pair = [self.waiting.get(value) for value in op.inputs]
        if None in pair or pair[0].axes != pair[1].axes or pair[0] is pair[1]:
            return False
        if any(waiting.decided or waiting.rounded for waiting in pair):
            return False
        for waiting in pair:
            waiting.decided = True
        (result,) = op.outputs
        self.waiting[result] = _Sum(pair[0].axes, max(w.bytes for w in pair))
        return True

    def _named(self, op: Op) -> None:
        named = op.params.get("axes", op.params.get("axis_name"))
        axes = (named,) if isinstance(named, str) else tuple(named or ())
        axes = frozenset(axis for axis in axes if self.sizes.get(axis, 1) > 1)
        if not axes:
            return
        match NAMED[op.name]:
            case kind if kind == ALL_REDUCE:
                for value, result in zip(op.inputs, op.outputs):
                    self.waiting[result] = _Sum(axes, value.bytes)
                return
            case kind if kind == ALL_GATHER:
                size = sum(value.bytes for value in op.outputs)
            case kind if kind == RAGGED_ALL_TO_ALL:
                size = min(_in_lanes(value) for value in op.inputs[:2])
            case kind:
                size = sum(value.bytes for value in op.inputs)
        if kind == REDUCE_SCATTER and _thin(op):
            kind = ALL_REDUCE
        self._send(kind, axes, size)

    def _partial(self, result: Value, summed: frozenset[str]) -> None:
        """A sum over a cut dimension, all of it or already cut along the axis."""
        waiting = summed - result.axes - result.unreduced
        if scattered := summed & result.axes:
            size = result.bytes
            for axis in scattered:
                size *= self.sizes[axis]
            self._send(REDUCE_SCATTER, scattered, size)
        if waiting:
            self.waiting[result] = _Sum(waiting, result.bytes)

    def _reshard(self, value: Value, result: Value) -> None:
        if value.auto or result.auto:  # the layout only begins or ends to be stated
            if value in self.waiting:
                self.waiting[result] = self.waiting[value]
            if value.axes == result.axes:
                return
        cut = result.axes - value.axes
        if value in self.waiting and not self.waiting[value].decided:
            waiting = self.waiting[value]
            if cut and waiting.axes == cut and len(cut) == 1:
                self._send(REDUCE_SCATTER, cut, waiting.bytes)
                waiting.decided = True
                return
            if cut and waiting.axes > cut:  # cut further by what follows
                self.waiting[result] = waiting
                return
            self._decide(waiting)
        if summed := value.unreduced - result.unreduced:
            kind = REDUCE_SCATTER if summed <= cut else ALL_REDUCE
            self._send(kind, summed, value.bytes)
        self._move(value, result)

    def _move(self, value: Value, result: Value) -> None:
        """Cuts come first, then axes that change their dimension, then gathers."""
        size = value.bytes
        for axis in result.axes - value.axes - value.unreduced:
            size //= self.sizes[axis]
        places = {axis: dim for dim, axes in enumerate(value.spec) for axis in axes}
        moved = frozenset(
            axis
            for dim, axes in enumerate(result.spec)
            for axis in axes
            if places.get(axis, dim) != dim
        )
        if moved:
            self._send(ALL_TO_ALL, moved, size)
        if gathered := frozenset(value.axes - result.axes):
            for axis in gathered:
                size *= self.sizes[axis]
            self._send(ALL_GATHER, gathered, size)

    def _whole(self, value: Value) -> None:
        if value in self.waiting:
            self._decide(self.waiting[value])

    def _decide(self, waiting: _Sum) -> None:
        if not waiting.decided:
            self._send(ALL_REDUCE, waiting.axes, waiting.bytes)
            waiting.decided = True

    def _send(self, kind: str, axes: Iterable[str], size: float) -> None:
        ordered = tuple(axis for axis in self.sizes if axis in set(axes))
        if ordered:
            self.sent[kind, ordered] += size


def _thin(op: Op) -> bool:
    """Whether a cut leaves less than whole lanes: XLA sends the sum to all instead."""
    (result,) = op.outputs
    last = op.params["scatter_dimension"] == len(result.shape) - 1
    return last and result.shape[-1] % LANES != 0


def _in_lanes(value: Value) -> int:
    """Bytes of rows that the TPU pads to its 128 lanes before it sends them."""
    *rows, width = value.shape
    return math.prod(rows) * -(-width // LANES) * LANES * value.itemsize


def summed_over(op: Op) -> frozenset[str]:
    """The mesh axes along which an operation leaves partial sums."""
    if op.name in ("dot_general", "ragged_dot_general"):
        return frozenset(_contracted(op))
    if op.name in REDUCTIONS:
        (value,) = op.inputs
        return frozenset(a for dim in op.params["axes"] for a in value.spec[dim])
    if op.name.startswith("scatter") and len(op.inputs) == 3:
        operand, _, updates = op.inputs
        (result,) = op.outputs
        return frozenset(updates.axes - operand.axes - result.axes)
    return frozenset()


def _contracted(op: Op) -> set[str]:
    numbers = op.params.get("dimension_numbers")
    if op.name == "ragged_dot_general":
        numbers = op.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    contracting, _ = numbers
    return {
        axis
        for value, dims in zip(op.inputs, contracting)
        for dim in dims
        for axis in value.spec[dim]
    }
