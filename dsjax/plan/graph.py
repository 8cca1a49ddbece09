"""A traced program as one device runs it: calls written out, dead parts left out.

A jaxpr nests calls (`jit`, `custom_vjp`, `checkpoint`, `shard_map`, a branch for each
platform). Here they are one list of operations on values of one device's shape; only
loops and branches that data decide stay nested. Shapes follow from the shardings that
every abstract value carries on a mesh of Explicit axes; inside `shard_map` they are one
device's already.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType

Spec = tuple[tuple[str, ...], ...]  # the mesh axes that cut each dimension

CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
COPIES = ("view", "broadcast_in_dim", "reshape", "squeeze", "name")
KERNELS = ("pallas_call", "mpmd_map", "core_map", "run_state")


@dataclass(frozen=True, eq=False, kw_only=True)
class Value:
    """An array on one device: its part's shape, and the mesh axes that cut the whole.

    Axes of size one are not mentioned. `auto`: the compiler chooses the layout.
    """

    shape: tuple[int, ...]
    whole: tuple[int, ...]
    itemsize: int
    spec: Spec = ()
    auto: bool = False
    unreduced: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """Elements on one device."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of one device, without padding to tiles."""
        return self.size * self.itemsize

    @property
    def axes(self) -> set[str]:
        """All mesh axes that cut it."""
        return {axis for entry in self.spec for axis in entry}


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """One operation. `bodies`: of a loop its body, of a branch all that may be taken."""

    name: str
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    bodies: tuple["Block", ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """Operations in order, from `inputs` to `outputs`."""

    inputs: tuple[Value, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Value, ...]


def graph(closed: ClosedJaxpr, *, platform: str) -> Block:
    """The program of one device on `platform` ("tpu", "cuda"), dead operations left
    out.
    """
    block = _merged(_Builder(platform).block(closed))
    return _alive(block, [True] * len(block.outputs))[0]


@dataclass
class _Builder:
    platform: str
    ops: list[Op] = field(default_factory=list)
    branches: dict[Value, int] = field(default_factory=dict)  # chosen by the platform
    constants: dict[tuple[str, str], Value] = field(default_factory=dict)

    def block(
        self,
        closed: ClosedJaxpr | Jaxpr,
        outside: Sequence[Value] = (),
        results: Sequence[Value] = (),
    ) -> Block:
        """A body of its own: its inputs are new values, which stand for those outside."""
        jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
        inner = _Builder(
            self.platform, branches=self.branches, constants=self.constants
        )
        inputs = tuple(_value(var.aval) for var in jaxpr.invars)
        for outer, own in zip(outside, inputs):
            self.same(outer, own)
        outputs = inner.inline(closed, inputs)
        for own, outer in zip(outputs, results):
            self.same(own, outer)
        return Block(inputs=inputs, ops=tuple(inner.ops), outputs=outputs)

    def same(self, source: Value, target: Value) -> None:
        """What the platform chose is known of a copy, too."""
        if source in self.branches:
            self.branches[target] = self.branches[source]

    def inline(
        self, closed: ClosedJaxpr | Jaxpr, inputs: Sequence[Value]
    ) -> tuple[Value, ...]:
        """Appends a jaxpr's operations on `inputs`; returns what it returns."""
        jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: _value(var.aval) for var in jaxpr.constvars}

        def read(atom) -> Value:
            if isinstance(atom, Literal):
                key = (str(atom.aval), str(atom.val))
                return self.constants.setdefault(key, _value(atom.aval))
            return known[atom]

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, tuple(map(read, eqn.invars)))
            known |= zip(eqn.outvars, results, strict=True)
        return tuple(map(read, jaxpr.outvars))

    def equation(self, eqn, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """Appends what one equation stands for; returns its results."""
        name, params = eqn.primitive.name, eqn.params
        outputs = tuple(_value(var.aval, inputs) for var in eqn.outvars)
        bodies = ()
        if name == "platform_index":
            self.branches[outputs[0]] = _branch(params["platforms"], self.platform)
        elif name == "cond":
            branches = params["branches"]
            if (index := self.branches.get(inputs[0])) is not None:
                return self.inline(branches[index], inputs[1:])
            bodies = tuple(self.block(branch, inputs[1:]) for branch in branches)
        elif name == "scan":
            bodies = (self.block(params["jaxpr"], inputs, outputs),)
        elif name == "while":
            consts = params["cond_nconsts"]
            bodies = (self.block(params["body_jaxpr"], inputs[consts:]),)
        elif name == "shard_map":
            return self.shard_map(params["jaxpr"], inputs, outputs)
        elif name not in KERNELS and (inner := _called(params)) is not None:
            return self.inline(inner, inputs)
        self.add(name, inputs, outputs, params, bodies)
        return outputs

    def shard_map(self, jaxpr, inputs, outputs) -> tuple[Value, ...]:
        """What is cut by a spec outside is whole inside: views lead in and out."""
        inside = tuple(_value(var.aval) for var in jaxpr.invars)
        for outer, inner in zip(inputs, inside, strict=True):
            self.add("view", (outer,), (inner,))
        for inner, outer in zip(self.inline(jaxpr, inside), outputs, strict=True):
            self.add("view", (inner,), (outer,))
        return outputs

    def add(self, name, inputs, outputs, params=None, bodies=()) -> None:
        if name in COPIES:
            self.same(inputs[0], outputs[0])
        self.ops.append(
            Op(
                name=name,
                params=params or {},
                inputs=inputs,
                outputs=outputs,
                bodies=bodies,
            )
        )


def _value(aval, inputs: Sequence[Value] = ()) -> Value:
    """One device's part of an abstract value; what is no array has no size."""
    if not isinstance(aval, jax.core.ShapedArray):
        return Value(shape=(0,), whole=(0,), itemsize=0)
    sharding = aval.sharding
    sizes = dict(sharding.mesh.shape)
    auto = AxisType.Auto in sharding.mesh.axis_types
    spec = tuple(_axes(entry, sizes) for entry in sharding.spec)
    if auto:
        spec = _like(aval.shape, inputs)
    spec += ((),) * (len(aval.shape) - len(spec))
    shape = tuple(
        -(-size // math.prod(sizes[axis] for axis in axes))
        for size, axes in zip(aval.shape, spec)
    )
    unreduced = getattr(sharding.spec, "unreduced", frozenset())
    return Value(
        shape=shape,
        whole=aval.shape,
        itemsize=aval.dtype.itemsize,
        spec=spec,
        auto=auto,
        unreduced=frozenset(axis for axis in unreduced if sizes[axis] > 1),
    )


def _like(shape: tuple[int, ...], inputs: Sequence[Value]) -> Spec:
    """Where the compiler chooses: cut as operands are whose first sizes, or last, are
    the result's.
    """
    spec = [()] * len(shape)
    for value in inputs:
        cuts = [place for place, axes in enumerate(value.spec) if axes]
        if cuts and value.whole[: cuts[0] + 1] == shape[: cuts[0] + 1]:
            spec[cuts[0]] = spec[cuts[0]] or value.spec[cuts[0]]
        if cuts and cuts[-1] > 0:
            after = len(value.whole) - cuts[-1]
            if value.whole[-after:] == shape[-after:]:
                spec[-after] = spec[-after] or value.spec[-after]
    return tuple(spec)


def _axes(entry: str | tuple[str, ...] | None, sizes: dict[str, int]):
    axes = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def _branch(platforms: Iterable[tuple[str, ...] | None], platform: str) -> int:
    """Which branch of `platform_dependent` a platform takes; None is the default."""
    names = {"cuda": ("cuda", "gpu")}.get(platform, (platform,))
    platforms = list(platforms)
    for index, listed in enumerate(platforms):
        if listed is not None and set(listed) & set(names):
            return index
    return platforms.index(None)


def _called(params: dict[str, Any]) -> ClosedJaxpr | Jaxpr | None:
    for key in CALLS:
        if isinstance(params.get(key), ClosedJaxpr | Jaxpr):
            return params[key]
    return None


def _merged(block: Block) -> Block:
    """The block with equal operations on equal operands done once, as XLA does it: it
    takes back what is computed again outside of loops.
    """
    first: dict[tuple, Op] = {}
    same: dict[Value, Value] = {}
    ops = []
    for op in block.ops:
        inputs = tuple(same.get(value, value) for value in op.inputs)
        bodies = tuple(map(_merged, op.bodies))
        op = replace(op, inputs=inputs, bodies=bodies)
        known = op if bodies else first.setdefault(_key(op), op)
        if known is op:
            ops.append(op)
        else:
            same |= zip(op.outputs, known.outputs)
    outputs = tuple(same.get(value, value) for value in block.outputs)
    return Block(inputs=block.inputs, ops=tuple(ops), outputs=outputs)


def _key(op: Op) -> tuple:
    """Equal for equal operations."""
    operands = tuple(map(id, op.inputs))
    places = tuple((value.whole, value.itemsize, value.spec) for value in op.outputs)
    return op.name, repr(sorted(op.params.items(), key=str)), operands, places


def _alive(block: Block, wanted: Sequence[bool]) -> tuple[Block, list[bool]]:
    """The block without what nobody wants, and which of its inputs are needed."""
    needed = {value for value, want in zip(block.outputs, wanted) if want}
    kept = []
    for op in reversed(block.ops):
        if not any(value in needed for value in op.outputs):
            continue
        used = op.inputs
        if op.name == "scan":
            op, used = _alive_scan(op, needed)
        needed |= set(used)
        kept.append(op)
    outputs = tuple(v for v, want in zip(block.outputs, wanted) if want)
    alive = Block(inputs=block.inputs, ops=tuple(reversed(kept)), outputs=outputs)
    return alive, [value in needed for value in block.inputs]


def _of_one_rank(outside: Sequence[Value], inside: Sequence[Value]) -> int:
    """How many values have as many axes on both sides."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(a.shape) == len(b.shape) for a, b in pairs)


def _alive_scan(op: Op, needed: set[Value]) -> tuple[Op, list[Value]]:
    """A carry is wanted if it is wanted after the loop, or by the next iteration."""
    # Told by ranks, since JAX has changed how it says it: what the loop goes over and what
    # it stacks has an axis more outside.
    (body,) = op.bodies
    carries = _of_one_rank(op.outputs, body.outputs)
    consts = _of_one_rank(op.inputs, body.inputs) - carries
    wanted = [value in needed for value in op.outputs]
    while True:
        body, used = _alive(op.bodies[0], wanted)
        grown = list(wanted)
        for i in range(carries):
            grown[i] |= used[consts + i]
        if grown == wanted:
            break
        wanted = grown
    inputs = [value for value, use in zip(op.inputs, used) if use]
    return replace(op, bodies=(body,)), inputs
