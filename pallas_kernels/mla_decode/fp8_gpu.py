"""Absorbed MLA decoding on FP8 latents, for Hopper GPUs: `pallas_gpu` with one thing more.

Wgmma multiplies FP8 only where both matrices lie along the sum, which the values do not:
latents have to be 16 bits wide in shared memory. So each of the warpgroups that multiply
values converts its half of the next block while this one's softmax is found: e4m3 is exact
in float16, and so is its product with a slot's scale where that is a power of two. What
multiplies scores waits for that instead of for the copy. Queries and weights are float16
as well; the rotary part stays bfloat16, since sums do not mind.

float16 ends at 65504 and at 2 ** -24: of queries, and of latents times scales, what is
larger is lost, and what is smaller counts as nothing.

Shared memory is full, and there are two ways for a quarter of a block to arrive:

    in place  in the upper half of the place that it will fill, its scales in the lower:
              what lies in the way is in registers before it is written over
    ahead     where a tile has at most 32 queries of 64, a block has room in the rows that
              it lacks: products of these are never looked at

Letters as in `pallas_gpu`.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode import pallas_gpu
from pallas_kernels.mla_decode.combine_gpu import LOG2E, LOWEST
from pallas_kernels.mla_decode.pallas_gpu import (
    BLOCK,
    COLUMN,
    GROWTH,
    HALF,
    MATRIX,
    QUARTER,
    QUARTERS,
    ROPE,
    SCORES,
    SLOTS,
    TALL,
    TILED,
    L,
    R,
    _Kernel,
    _quarter,
    _rows,
    _Shared,
    _Sizes,
    _Stretch,
    launched,
)
from pallas_kernels.mla_decode.quantize import E4M3

PLACE = BLOCK * QUARTER * 2  # bytes of a quarter in float16
HEADROOM = 7  # powers of 2 by which weights are larger: float16 ends at 2 ** -24


def lacks(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
    rope_YXRZ: Float[Array, "Y X R Z"],
) -> str:
    """Why the kernel does not take these, or nothing."""
    dtypes = [x.dtype.name for x in (q_BTNL, q_BTNR, rope_YXRZ, latent_YXZL)]
    if dtypes != ["bfloat16"] * 3 + ["float8_e4m3fn"]:
        return f"takes bfloat16 and latents of float8_e4m3fn, not {', '.join(dtypes)}"
    return pallas_gpu.lacks_sizes(q_BTNL, q_BTNR, latent_YXZL)


def decode(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
    rope_YXRZ: Float[Array, "Y X R Z"],
    lengths_B: Int[Array, " B"],
    layer: Int[Array, ""],
    pages_BP: Int[Array, "B P"] | None,
    latent_scale_YXZ: Float[Array, "Y X Z"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N L"], Float[Array, "B T N"]]:
    """See `pallas_kernels.mla_decode.api`."""
    return pallas_gpu.decode(
        *(q_BTNL, q_BTNR, latent_YXZL, rope_YXRZ, lengths_B, layer, pages_BP),
        latent_scale_YXZ,
        scale=scale,
        kernel=_call,
    )


def _call(sizes: _Sizes):
    """The kernel, of arguments and results as `decode` has them."""

    def kernel(*refs):
        *arguments, latent_scale = refs[:8]

        def run(converted, arrived, taken, *shared):
            shared = _Shared(*shared)
            latents, results, codes, scales, places = shared.latents
            q, q_rope = shared.q, shared.q_rope
            q, q_narrow, (q_bytes, *ahead) = q
            if _is_ahead(sizes):
                (codes,) = ahead
                q_rope, (_, scales) = q_rope
            _Fp8Kernel(
                sizes,
                *arguments,
                *refs[8:],
                shared._replace(latents=latents, q=q, q_rope=q_rope),
                latent_scale=latent_scale,
                q_narrow=q_narrow,
                q_bytes=q_bytes,
                results=results,
                codes=codes,
                scales=scales,
                places=places,
                converted=converted,
                arrived=arrived,
                taken=taken,
            ).run()

        types = _shared_types(sizes)
        pl.run_scoped(run, *types, collective_axes="warpgroup")

    slot_bytes = L + 4 + 2 * R
    return launched(kernel, sizes, name="mla_decode_fp8", slot_bytes=slot_bytes)


def _is_ahead(sizes: _Sizes) -> bool:
    """Whether a tile lacks so many rows that a block in e4m3 has room in their place."""
    return sizes.rows <= TALL // 2


def _shared_types(sizes: _Sizes) -> tuple:
    """What to allocate: barriers for quarters that are converted, that have arrived ahead
    and that have been taken there; then what `_Shared` is made of.
    """
    shared, quarters = _Shared.types(clustered=sizes.clustered), (SLOTS, 2, 2)
    matrix = functools.partial(plgpu.SMEM, dtype=jnp.float16, transforms=TILED)
    shared = shared._replace(
        # One memory: as products read it, as copies fill it, and as bytes.
        latents=plgpu.RefUnion(
            matrix((*quarters, BLOCK, QUARTER)),
            shared.latents,
            plgpu.SMEM((*quarters, 2, BLOCK, QUARTER), E4M3),
            plgpu.SMEM((*quarters, PLACE // 4), jnp.float32),
            plgpu.SMEM((*quarters, PLACE), jnp.int8),
        ),
        weights=matrix((2, TALL, BLOCK)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=ROPE + 1),
    )
    rows, ahead = TALL, []
    if _is_ahead(sizes):
        rows = TALL // 2
        ahead = [plgpu.SMEM((2, 2, BLOCK, QUARTER), E4M3)]
        own_rope = plgpu.SMEM((rows * 2 * R,), jnp.int8)
        scales = plgpu.SMEM((2, 2, BLOCK), jnp.float32)
        q_rope = plgpu.RefUnion(shared.q_rope, (own_rope, scales))
        shared = shared._replace(q_rope=q_rope)
    own = plgpu.SMEM((rows * 2 * L,), jnp.int8)
    q = plgpu.RefUnion(shared.q, matrix((1, TALL, L)), (own, *ahead))
    shared = shared._replace(q=q)
    return (
        plgpu.Barrier(num_barriers=ROPE),
        plgpu.Barrier(num_arrivals=2, num_barriers=len(QUARTERS)),
        plgpu.Barrier(num_barriers=len(QUARTERS)),
        *shared,
    )


class _Landing(NamedTuple):
    """Where a quarter arrives."""

    codes: Any
    scales: Any
    full: Any
    free: Any
    used: Any  # whether another was there before


@dataclass(frozen=True, kw_only=True)
class _Fp8Kernel(_Kernel):
    """One block of threads."""

    registers: ClassVar[dict[str, int]] = {"values": 192, "weights": 96, "copies": 32}

    latent_scale: Any
    q_narrow: Any  # [1, 64, L]: the queries in float16
    q_bytes: Any  # of the rows that are queries
    results: Any  # [SLOTS, 2, 2, 64, L / 4], in bfloat16
    codes: Any  # [SLOTS, 2, 2, 2, 64, L / 4], of the last 2 the 1; or [2, 2, 64, L / 4]
    scales: Any  # [SLOTS, 2, 2, ..], the first 64; or [2, 2, 64]
    places: Any  # [SLOTS, 2, 2, bytes]
    converted: Any  # quarters
    arrived: Any  # ahead
    taken: Any  # from there

    def landing(self, step, half: int, quarter: int) -> _Landing:
        if _is_ahead(self.sizes):
            at, barrier = (half, quarter), 2 * half + quarter
            there = self.codes.at[at], self.scales.at[at]
            barriers = self.arrived.at[barrier], self.taken.at[barrier]
            return _Landing(*there, *barriers, step > 0)
        at, barrier = (
            (lax.rem(step, SLOTS), half, quarter),
            _quarter(step, half, quarter),
        )
        there = self.codes.at[(*at, 1)], self.scales.at[(*at, pl.ds(0, BLOCK))]
        barriers = self.shared.full.at[barrier], self.shared.free.at[barrier]
        return _Landing(*there, *barriers, step >= SLOTS)

    # --- copies

    def copy_block(self, stretch: _Stretch, block, latents, rope, scales) -> None:
        """In the order in which it is used: the rotary part last."""
        shared, step = self.shared, stretch.done + block - stretch.first
        pair = ("pair",) if self.sizes.clustered else None

        def copy(source, target, barrier):
            plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=pair)

        for half, quarter in QUARTERS:
            columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
            there = self.landing(step, half, quarter)
            pl.when(there.used)(functools.partial(plgpu.barrier_wait, there.free))
            copy(latents.at[:, columns], there.codes, there.full)
            copy(scales, there.scales, there.full)

        @pl.when(step > 0)
        def _():
            plgpu.barrier_wait(shared.free.at[ROPE])

        # In two, since the quarters' barriers take two arrivals.
        for part in pl.ds(0, R // 2), pl.ds(R // 2, R // 2):
            copy(rope.at[part], shared.rope.at[part], shared.full.at[ROPE])

    def fetch(self, latents, rope, scales) -> None:
        super().fetch(latents, rope)

    def cached(self, stretch: _Stretch, layer, block):
        """Also the scales [64]."""
        latents, rope = super().cached(stretch, layer, block)
        return latents, rope, self.latent_scale.at[self.spot(stretch, layer, block)]

    # --- scores

    def multiply_latents(self, acc, stretch: _Stretch, step) -> None:
        shared = self.shared
        zero = lax.shift_right_logical(stretch.row, 30) * step
        for half, quarter in QUARTERS:
            plgpu.barrier_wait(self.converted.at[_quarter(step, half, quarter)])
            columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
            latents = shared.latents.at[lax.rem(step, SLOTS), half, quarter]
            plgpu.wgmma(acc, self.q_narrow.at[zero, :, columns], latents.T)

    def weigh_stretch(self, stretch: _Stretch) -> None:
        plgpu.barrier_wait(self.shared.q_full)
        _to_float16(self.q_bytes)
        plgpu.commit_smem()
        highest = plgpu.layout_cast(jnp.full((TALL,), LOWEST, jnp.float32), COLUMN)
        # What weights sum up to, in 8 parts a row: added up at the end.
        total = plgpu.layout_cast(jnp.zeros((TALL, 8), jnp.float32), MATRIX)
        weigh = functools.partial(self.weigh_block, stretch)
        lax.fori_loop(stretch.first, stretch.last, weigh, (highest, total))

    def weigh_block(self, stretch: _Stretch, block, state):
        """One at a time: the next is converted while this one's weights are found."""
        step = stretch.done + block - stretch.first

        def multiply(acc):
            self.multiply_latents(acc, stretch, step)
            self.multiply_rope(acc)
            return acc[...]

        scores = pl.run_scoped(multiply, SCORES)
        plgpu.barrier_arrive(self.shared.free.at[ROPE])
        ends = block + 1 == stretch.last
        pl.when(ends)(lambda: plgpu.barrier_arrive(self.shared.q_free))
        state = self.soften(stretch, block, scores, state)
        pl.when(ends)(lambda: self.finish(stretch, state))
        self.publish(step)
        return state

    def soften(self, stretch: _Stretch, block, scores, state):
        """Writes 2 ** (HEADROOM + scores - highest), at most 2 ** 15: `pallas_gpu`."""
        shared, (highest, total) = self.shared, state
        step = stretch.done + block - stretch.first
        scale = self.sizes.scale * LOG2E
        scores = self.masked(stretch, block, scores if scale >= 0 else -scores)
        scale, before = abs(scale), highest
        highest = jnp.maximum(before, scores.max(axis=1) * scale - HEADROOM)
        highest = jnp.where(highest > before + GROWTH, highest, before)
        factor = jnp.exp2(before - highest)
        weights = jnp.exp2(scores * scale - _rows(highest, scores))
        total = total * _rows(factor, total)
        for column in range(0, BLOCK, 8):
            total = total + weights[:, column : column + 8]
        at = lax.rem(step, 2)

        @pl.when(step > 1)
        def _():
            plgpu.barrier_wait(shared.weights_free.at[at])

        shared.weights[at] = weights.astype(jnp.float16)
        shared.factors[at] = factor
        return highest, total

    # --- values

    def add_stretch(self, half: int, stretch: _Stretch) -> None:
        self.convert(half, stretch.done)
        super().add_stretch(half, stretch)

    def store(self, half: int, stretch: _Stretch, acc) -> None:
        as_results = replace(self, shared=self.shared._replace(latents=self.results))
        super(_Fp8Kernel, as_results).store(half, stretch, acc)

    def convert(self, half: int, step) -> None:
        """A block's half of the columns."""
        for quarter in range(2):
            there = self.landing(step, half, quarter)
            plgpu.barrier_wait(there.full)
            place = self.places.at[lax.rem(step, SLOTS), half, quarter]
            convert = _convert if _is_ahead(self.sizes) else _convert_in_place
            convert(place, there.codes, there.scales)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.converted.at[_quarter(step, half, quarter)])
            if _is_ahead(self.sizes):
                plgpu.barrier_arrive(there.free)

    def await_values(self, half: int, step, more) -> None:
        """They are there: what is converted now is the next block."""
        pl.when(more)(lambda: self.convert(half, step + 1))


def _converter(*, in_place: bool):
    """Of a quarter: e4m3 times scales to float16. Each lane has 8 columns of 4 rows, twice.

    In bytes: rows of 128 values follow each other; so do the result's tiles of 8 rows and
    64 columns, whose 16 bytes are swizzled by the row. In place, the second half of them
    lies over the values, the first over the scales.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
    def convert(_, place, codes, scales) -> None:
        i32 = ir.IntegerType.get_signless(32)

        def number(value: int):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        def at(ref, *terms):
            start = llvm.ptrtoint(i32, utils.memref_ptr(ref))
            offsets = (arith.muli(x, number(size)) for x, size in terms)
            return functools.reduce(arith.addi, offsets, start)

        lane = arith.remui(utils.thread_idx(), number(128))
        strip = arith.shrui(lane, number(4))  # of 4 rows
        column = arith.andi(lane, number(15))
        odd = arith.andi(strip, number(1))
        unit = arith.xori(arith.andi(column, number(7)), arith.muli(odd, number(4)))
        unit = arith.muli(unit, number(16))
        above = arith.shrui(strip, number(1))
        right = arith.shrui(column, number(3))
        tile = at(place, (above, 2048), (right, 1024), (odd, 512))
        source = at(codes, (strip, 512), (column, 8))
        factors = at(scales, (strip, 16))
        factors = [_load(4, factors, 128 * part) for part in range(2)]
        for part in range(2):
            found = [_load(2, source, 4096 * part + 128 * row) for row in range(4)]
            if in_place:
                utils.warpgroup_barrier()
            for row, (eight, factor) in enumerate(zip(found, factors[part])):
                pair = _asm(1, _PAIR, factor)[0]
                low, high = (_asm(2, _E4M3_TO_FLOAT16, four, pair) for four in eight)
                target = arith.addi(tile, arith.xori(unit, number(16 * row)))
                _store([*low, *high], target, 8192 * part + 128 * row)

    return convert


_convert, _convert_in_place = (_converter(in_place=over) for over in (False, True))


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def _to_float16(_, ref) -> None:
    """bfloat16 to float16, in place."""
    i32 = ir.IntegerType.get_signless(32)
    (size,) = ir.MemRefType(ref.type).shape
    lane = arith.remui(utils.thread_idx(), arith.constant(i32, 128))
    start = llvm.ptrtoint(i32, utils.memref_ptr(ref))
    start = arith.addi(start, arith.muli(lane, arith.constant(i32, 16)))
    for offset in range(0, size, 16 * 128 * 4):
        offsets = [offset + 16 * 128 * k for k in range(4)]
        found = [_load(4, start, place) for place in offsets]
        for eight, place in zip(found, offsets):
            narrow = [_asm(1, _BFLOAT16_TO_FLOAT16, pair)[0] for pair in eight]
            _store(narrow, start, place)


_PAIR = """{
.reg .f32 s;
mov.b32 s, $1;
cvt.rn.f16x2.f32 $0, s, s;
}"""
_E4M3_TO_FLOAT16 = """{
.reg .b16 a<2>;
.reg .b32 p<2>;
mov.b32 {a0, a1}, $2;
cvt.rn.f16x2.e4m3x2 p0, a0;
cvt.rn.f16x2.e4m3x2 p1, a1;
mul.rn.f16x2 $0, p0, $3;
mul.rn.f16x2 $1, p1, $3;
}"""
_BFLOAT16_TO_FLOAT16 = """{
.reg .b32 a<2>;
.reg .f32 f<2>;
shl.b32 a0, $1, 16;
and.b32 a1, $1, 0xffff0000;
mov.b32 f0, a0;
mov.b32 f1, a1;
cvt.rn.f16x2.f32 $0, f1, f0;
}"""


def _asm(results: int, code: str, *operands) -> list:
    """Results of 32 bits, of operands of 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] * results + ["r"] * len(operands))
    if results == 1:
        return [llvm.inline_asm(i32, operands, code, constraints)]
    struct = llvm.StructType.get_literal([i32] * results)
    found = llvm.inline_asm(struct, operands, code, constraints)
    return [llvm.extractvalue(i32, found, [k]) for k in range(results)]


def _load(count: int, address, offset: int) -> list:
    """`count` neighbouring 32 bits of shared memory."""
    i32 = ir.IntegerType.get_signless(32)
    names = ", ".join(f"${k}" for k in range(count))
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * count),
        [address],
        f"ld.shared.v{count}.b32 {{{names}}}, [${count}+{offset}];",
        ",".join(["=r"] * count + ["r", "~{memory}"]),
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32, result, [k]) for k in range(count)]


def _store(values, address, offset: int) -> None:
    """16 bytes to shared memory."""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [*values, address],
        f"st.shared.v4.b32 [$4+{offset}], {{$0, $1, $2, $3}};",
        "r,r,r,r,r,~{memory}",
        has_side_effects=True,
    )
