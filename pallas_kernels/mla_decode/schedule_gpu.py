"""Who decodes what on a GPU: the blocks of all rows, shared out to the multiprocessors.

Rows are laid end to end, each with what it costs to start one, and cut into equal parts,
so that each multiprocessor has as much to do as any other, whatever the lengths. A row
that lies in several parts has to be put together again; rows that are all about as long
are therefore left whole, or all cut into as many pieces, where that costs less than 5%.

Every warp finds out for itself, in less time than a kernel takes to start: lanes share
the rows, so what is a scalar here may differ from lane to lane until it is added up.

Letters: B rows.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike
from jaxtyping import Array, Int

BLOCK = 64  # slots that are worked on together
START_COST = 2  # what a row costs beside its blocks, in blocks
LANES = 32


class Division(NamedTuple):
    """What a part takes; and what each row takes, if all are to take the same, or 0."""

    length: Int[Array, ""]
    stride: Int[Array, ""]

    def start(self, row: ArrayLike, cost: ArrayLike) -> Array:
        """Where a row begins, before which others cost so much."""
        return jnp.where(self.stride > 0, row * self.stride, cost)

    def step(self, count: ArrayLike) -> Array:
        """From where a row begins to where the next does."""
        return jnp.where(self.stride > 0, self.stride, count + START_COST)


def division(longest: Array, total: Array, *, rows: int, parts: int) -> Division:
    """Of the longest row's blocks, and of all."""
    each, cuts = -(-rows // parts), max(1, parts // rows)
    length = lax.div(total + (START_COST * rows + parts - 1), jnp.int32(parts))
    if cuts == 1:
        stride = longest + START_COST
        equal = each * stride
    else:
        equal = lax.div(longest + (cuts - 1), jnp.int32(cuts))
        stride = cuts * equal
    even = 20 * equal <= 21 * length
    return Division(jnp.where(even, equal, length), jnp.where(even, stride, 0))


class Share(NamedTuple):
    """What a part takes: the rows from `first` to `last`, without it, the first of them
    from block `ahead` on, and so many blocks as `divided` says.
    """

    divided: Division
    first: Any
    last: Any
    ahead: Any

    def blocks(self, ahead, count):
        """(first block of a row, block after its last)."""
        end = ahead + self.divided.length
        return jnp.clip(ahead, 0, count), jnp.clip(end, 0, count)


def divide(lengths, *, slots: int, parts: int) -> tuple[Division, Any]:
    """How rows of these lengths, still to be clipped to `slots`, are divided; and how many
    blocks the rows of each lane have.
    """
    B = lengths.shape[0]
    each = -(-B // LANES)

    def add(i, found):
        (longest, total), row = found, lane() * each + i
        count = jnp.where(row < B, blocks_of(lengths, row, slots), 0)
        return jnp.maximum(longest, count), total + count

    nothing = 0 * lane()
    longest, own = lax.fori_loop(0, each, add, (nothing, nothing))
    return division(highest_of(longest), sum_of(own), rows=B, parts=parts), own


def share(lengths, part, *, slots: int, parts: int) -> Share:
    """What a part takes; `lengths` as in `divide`."""
    B = lengths.shape[0]
    each = -(-B // LANES)
    divided, own = divide(lengths, slots=slots, parts=parts)
    cost = sum_before(own + START_COST * jnp.clip(B - lane() * each, 0, each))
    begin = part * divided.length
    end = begin + divided.length

    def count(i, found):
        (cost, over, begun, passed), row = found, lane() * each + i
        blocks = blocks_of(lengths, row, slots)
        start, one = divided.start(row, cost), blocks + START_COST
        before = (row < B) & (start + blocks <= begin)
        return (
            cost + one,
            over + jnp.where(before, 1, 0),
            begun + jnp.where((row < B) & (start < end), 1, 0),
            passed + jnp.where(before, one, 0),
        )

    nothing = 0 * lane()
    found = cost, nothing, nothing, nothing
    _, over, begun, passed = lax.fori_loop(0, each, count, found)
    first = sum_of(over)
    ahead = begin - divided.start(first, sum_of(passed))
    return Share(divided, first, sum_of(begun), ahead)


def place_of(lengths, row, *, slots: int, parts: int):
    """(the part where a row begins, how many parts it lies in)."""
    B = lengths.shape[0]
    divided, _ = divide(lengths, slots=slots, parts=parts)

    def add(i, cost):
        other = i * LANES + lane()
        one = blocks_of(lengths, other, slots) + START_COST
        return cost + jnp.where(other < row, one, 0)

    cost = sum_of(lax.fori_loop(0, -(-B // LANES), add, 0 * lane()))
    start = divided.start(row, cost)
    first = lax.div(start, divided.length)
    last = lax.div(start + blocks_of(lengths, row, slots) - 1, divided.length)
    return first, last - first + 1


def blocks_of(lengths, row, slots: int) -> Array:
    """Every row has a block at least: somebody has to write its zeros. Rows behind the
    last are taken for the last.
    """
    length = jnp.clip(lengths[jnp.minimum(row, lengths.shape[0] - 1)], 0, slots)
    return jnp.maximum(1, lax.div(length + (BLOCK - 1), jnp.int32(BLOCK)))


# --- what the lanes of a warp do together

SCALAR = plgpu.Layout.WG_SPLAT(())
_INT = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)


def _assembly(code: str, *values) -> mgpu.FragmentedArray:
    i32 = ir.IntegerType.get_signless(32)
    values = [value.registers.item() for value in values]
    inputs = ",".join(["=r", *("r" for _ in values)])
    found = llvm.inline_asm(i32, values, code, inputs, has_side_effects=True)
    return mgpu.FragmentedArray.splat(found, (), is_signed=True)


@plgpu.inline_mgpu(return_type=_INT)
def lane(_) -> mgpu.FragmentedArray:
    """A lane's number among 32."""
    return _assembly("mov.u32 $0, %laneid;")


@plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=_INT)
def hidden(_, value) -> mgpu.FragmentedArray:
    """The same; the compiler does not know that it is."""
    return _assembly("mov.b32 $0, $1;", value)


@plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=_INT)
def sum_of(_, value) -> mgpu.FragmentedArray:
    """Over the lanes of a warp."""
    return _assembly("redux.sync.add.s32 $0, $1, 0xffffffff;", value)


@plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=_INT)
def highest_of(_, value) -> mgpu.FragmentedArray:
    """Over the lanes of a warp."""
    return _assembly("redux.sync.max.s32 $0, $1, 0xffffffff;", value)


@plgpu.inline_mgpu(arg_types=(SCALAR,), return_type=_INT)
def sum_before(_, value) -> mgpu.FragmentedArray:
    """Over the lanes of a warp below each."""
    found = value
    for distance in (1, 2, 4, 8, 16):
        code = (
            "{ .reg .pred some; .reg .b32 other; "
            f"shfl.sync.up.b32 other|some, $1, {distance}, 0, 0xffffffff; "
            "@!some mov.b32 other, 0; add.s32 $0, other, $1; }"
        )
        found = _assembly(code, found)
    return found - value
