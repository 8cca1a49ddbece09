"""Absorbed MLA decoding on FP8 latents, for Hopper GPUs: `pallas_gpu` with one thing more.

Wgmma multiplies FP8 only where both matrices lie along the sum, which the values do not:
latents have to be 16 bits wide in shared memory. So each of the warpgroups that multiply
values converts its half of a block: e4m3 times the scale of a slot, in bfloat16, which is
exact where scales are powers of two. What multiplies scores waits for that instead of for
the copy; from there on all is as in `pallas_gpu`.

Shared memory is full, and there are two ways to let a quarter of a block arrive:

    in place  in the upper half of the place that it will fill, its scales in the lower:
              all of it is in registers before the first of it is written
    ahead     where a tile has 16 or 32 queries of 64, the rows that it lacks are the
              places of blocks to come; the products of such rows are never looked at

Letters as in `pallas_gpu`.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode import pallas_gpu
from pallas_kernels.mla_decode.combine_gpu import combine
from pallas_kernels.mla_decode.pallas_gpu import (
    BLOCK,
    COLUMN,
    HALF,
    QUARTER,
    QUARTERS,
    ROPE,
    SLOTS,
    TALL,
    L,
    R,
    _any_below_one,
    _Kernel,
    _quarter,
    _rows,
    _Shared,
    _Sizes,
    _Stretch,
    _zero_behind,
)
from pallas_kernels.mla_decode.quantize import E4M3
from pallas_kernels.mla_decode.schedule_gpu import schedule
from pallas_kernels.mosaic import load

PLACE = BLOCK * QUARTER * 2  # bytes of a quarter in bfloat16
FETCH_AHEAD = int(os.environ.get("FP8_FETCH", "0"))
OVERLAP = bool(int(os.environ.get("FP8_OVERLAP", "0")))
AHEAD = bool(int(os.environ.get("FP8_AHEAD", "0")))


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
    (B, T, N, _), (Y, X, Z, _) = q_BTNL.shape, latent_YXZL.shape
    slots = Z if pages_BP is None else Z * pages_BP.shape[1]
    sizes = _Sizes(B, T, N, X, Z, slots, paged=pages_BP is not None, scale=scale)
    lengths_B = jnp.clip(lengths_B, 0, slots).astype(jnp.int32)
    plan = schedule(lengths_B, parts=sizes.parts)
    if pages_BP is None:
        pages_BP = jnp.zeros((1, 1))
    out, lse, sums, lses = _call(sizes)(
        *plan,
        lengths_B,
        jnp.asarray(layer, jnp.int32)[None],
        jnp.clip(pages_BP, 0, X - 1).astype(jnp.int32),
        q_BTNL.reshape(B, T * N, L),
        q_BTNR.reshape(B, T * N, R),
        latent_YXZL.reshape(Y * X, Z, L),
        rope_YXRZ.reshape(Y * X, R, Z),
        latent_scale_YXZ.reshape(Y * X, Z),
    )
    out, lse = combine(plan, out, lse, sums, lses, parts=sizes.parts)
    return out.reshape(q_BTNL.shape), lse[:, :, : sizes.rows].reshape(B, T, N)


def _call(sizes: _Sizes):
    """The kernel, of arguments and results as `decode` has them."""
    s, tiles, places = sizes, sizes.tiles, 2 * sizes.parts

    def kernel(*refs):
        *arguments, latent_scale = refs[:13]

        def run(converted, arrived, taken, *shared):
            shared = _Shared(*shared)
            latents, codes, scales, places = shared.latents
            q, q_rope = shared.q, shared.q_rope
            if _is_ahead(s):
                (q, (_, codes)), (q_rope, (_, scales)) = q, q_rope
            _Fp8Kernel(
                sizes,
                *arguments,
                *refs[13:],
                shared._replace(latents=latents, q=q, q_rope=q_rope),
                latent_scale=latent_scale,
                codes=codes,
                scales=scales,
                places=places,
                converted=converted,
                arrived=arrived,
                taken=taken,
            ).run()

        types = _shared_types(s)
        pl.run_scoped(run, *types, collective_axes="warpgroup")

    grid: dict[str, Any] = dict(grid=(tiles, s.parts), grid_names=("tile", "part"))
    if s.clustered:
        grid |= dict(grid=(tiles // 2, s.parts), cluster=(2,), cluster_names=("pair",))
    queries = s.B * s.T * s.N
    return pl.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((s.B, s.T * s.N, L), jnp.bfloat16),
            jax.ShapeDtypeStruct((s.B, tiles, TALL), jnp.float32),
            jax.ShapeDtypeStruct((places, tiles, TALL, L), jnp.float32),
            jax.ShapeDtypeStruct((places, tiles, TALL), jnp.float32),
        ),
        mesh=plgpu.Mesh(**grid, num_threads=4, thread_name="warpgroup"),
        name="mla_decode_fp8",
        cost_estimate=pl.CostEstimate(  # of full rows
            flops=2 * s.slots * queries * (L + R + L),
            transcendentals=s.slots * queries,
            bytes_accessed=s.B * s.slots * (L + 4 + 2 * R) + 2 * queries * (L + R + L),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=1024,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # there is one wherever one is needed
        ),
    )


def _is_ahead(sizes: _Sizes) -> bool:
    """Whether a tile lacks so many rows that a block in e4m3 has room in their place."""
    return AHEAD and sizes.rows <= TALL // 2


def _shared_types(sizes: _Sizes) -> tuple:
    """What to allocate: barriers for quarters that are converted, that have arrived ahead
    and that have been taken there; then what `_Shared` is made of.
    """
    shared, quarters = _Shared.types(clustered=sizes.clustered), (SLOTS, 2, 2)
    shared = shared._replace(
        # One memory: as products read it, as copies fill it, and as bytes.
        latents=plgpu.RefUnion(
            shared.latents,
            plgpu.SMEM((*quarters, 2, BLOCK, QUARTER), E4M3),
            plgpu.SMEM((*quarters, PLACE // 4), jnp.float32),
            plgpu.SMEM((*quarters, PLACE), jnp.int8),
        ),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=ROPE + 1),
    )
    if _is_ahead(sizes):
        rows = TALL // 2
        own, own_rope = (plgpu.SMEM((rows * 2 * size,), jnp.int8) for size in (L, R))
        codes = plgpu.SMEM((2, 2, BLOCK, QUARTER), E4M3)
        scales = plgpu.SMEM((2, 2, BLOCK), jnp.float32)
        shared = shared._replace(
            q=plgpu.RefUnion(shared.q, (own, codes)),
            q_rope=plgpu.RefUnion(shared.q_rope, (own_rope, scales)),
        )
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

    latent_scale: Any
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
        """In the order in which it is used: of every second block, the rotary part last."""
        shared, step = self.shared, stretch.done + block - stretch.first
        second = lax.rem(block - stretch.first, 2) == 1
        pair = ("pair",) if self.sizes.clustered else None

        def copy(source, target, barrier):
            plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=pair)

        def copy_rope():
            @pl.when(step > 0)
            def _():
                plgpu.barrier_wait(shared.free.at[ROPE])

            # In two, since the quarters' barriers take two arrivals.
            for part in pl.ds(0, R // 2), pl.ds(R // 2, R // 2):
                copy(rope.at[part], shared.rope.at[part], shared.full.at[ROPE])

        pl.when(~second)(copy_rope)
        for half, quarter in QUARTERS:
            columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
            there = self.landing(step, half, quarter)
            pl.when(there.used)(functools.partial(plgpu.barrier_wait, there.free))
            copy(latents.at[:, columns], there.codes, there.full)
            copy(scales, there.scales, there.full)
        pl.when(second)(copy_rope)

    def fetch(self, latents, rope, scales) -> None:
        super().fetch(latents, rope)

    def cached(self, stretch: _Stretch, layer, block):
        """Also the scales [64]."""
        s, place, slot = self.sizes, stretch.row, block * BLOCK
        if s.paged:
            place = self.pages[place, lax.div(slot, s.Z)]
            slot = lax.rem(slot, s.Z)
        place += layer
        slots = pl.ds(pl.multiple_of(slot, BLOCK), BLOCK)
        rope, scales = self.rope.at[place, :, slots], self.latent_scale.at[place, slots]
        return self.latent.at[place, slots], rope, scales

    # --- scores

    def multiply_latents(self, acc, stretch: _Stretch, step) -> None:
        shared = self.shared
        zero = lax.shift_right_logical(stretch.length, 30) * step
        for half, quarter in QUARTERS:
            plgpu.barrier_wait(self.converted.at[_quarter(step, half, quarter)])
            columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
            latents = shared.latents.at[lax.rem(step, SLOTS), half, quarter]
            plgpu.wgmma(acc, shared.q.at[zero, :, columns], latents.T)

    # --- values

    def add_stretch(self, half: int, stretch: _Stretch) -> None:
        self.convert(half, stretch.done)
        second = stretch.done + 1
        pl.when(second < stretch.end)(lambda: self.convert(half, second))
        super().add_stretch(half, stretch)

    def convert(self, half: int, step) -> None:
        """A block's half of the columns."""
        for quarter in range(2):
            there = self.landing(step, half, quarter)
            plgpu.barrier_wait(there.full)
            place = self.places.at[lax.rem(step, SLOTS), half, quarter]
            _convert(place, there.codes, there.scales)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.converted.at[_quarter(step, half, quarter)])
            if _is_ahead(self.sizes):
                plgpu.barrier_arrive(there.free)

    def add_block(self, half: int, stretch: _Stretch, step, acc):
        shared, at, more = self.shared, lax.rem(step, 2), step + 1 < stretch.end
        numbers = [_quarter(step, half, quarter) for quarter in range(2)]
        latents = shared.latents.at[lax.rem(step, SLOTS), half]
        second = lax.rem(step - stretch.done, 2) == 1
        plgpu.barrier_wait(shared.weights_full.at[at])
        left = stretch.length - (stretch.last - 1) * BLOCK
        pl.when(~more & (left < BLOCK))(lambda: _zero_behind(latents, left))
        factor = load(shared.factors.at[at], layout=COLUMN)
        acc = lax.cond(
            _any_below_one(factor) > 0,
            lambda acc: acc * _rows(factor, acc),
            lambda acc: acc,
            acc,
        )
        if half == 1:
            plgpu.barrier_wait(shared.turn.at[at])

        def multiply(acc):
            for quarter in range(2):
                columns = pl.ds(quarter * QUARTER, QUARTER)
                plgpu.wgmma(
                    acc.at[:, columns], shared.weights.at[at], latents.at[quarter]
                )
            plgpu.wgmma_wait(1)
            if half == 0:
                plgpu.barrier_arrive(shared.turn.at[at])
            pl.when(more)(lambda: plgpu.barrier_arrive(shared.free.at[numbers[0]]))
            if OVERLAP:
                pl.when(second & more)(lambda: self.convert(half, step + 1))

        acc = pl.run_state(multiply)(plgpu.ACC.init(acc))

        @pl.when(more)
        def _():
            plgpu.barrier_arrive(shared.weights_free.at[at])
            plgpu.barrier_arrive(shared.free.at[numbers[1]])

        if not OVERLAP:
            pl.when(second & more)(lambda: self.convert(half, step + 1))
        following = step + 2
        pl.when(second & (following < stretch.end))(
            lambda: self.convert(half, following)
        )
        return acc


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
def _convert(_, place, codes, scales) -> None:
    """A quarter's e4m3 to bfloat16, times scales: each lane has 8 columns of 8 rows. All
    is read before anything is written: it may lie where that goes.

    In bytes: rows of 128 values follow each other; so do the result's tiles of 8 rows and
    64 columns, whose 16 bytes are swizzled by the row.
    """
    i32 = ir.IntegerType.get_signless(32)

    def number(value: int):
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def at(ref, *terms):
        start = llvm.ptrtoint(i32, utils.memref_ptr(ref))
        offsets = (arith.muli(x, number(size)) for x, size in terms)
        return functools.reduce(arith.addi, offsets, start)

    lane = arith.remui(utils.thread_idx(), number(128))
    strip = arith.shrui(lane, number(4))  # of 8 rows
    column = arith.andi(lane, number(15))
    factors = [_load(4, at(scales, (strip, 32)), 16 * part) for part in range(2)]
    factors = [factor for four in factors for factor in four]
    source = at(codes, (strip, 1024), (column, 8))
    found = [_load(2, source, 128 * row) for row in range(8)]
    utils.warpgroup_barrier()
    tile = at(place, (strip, 2048), (arith.shrui(column, number(3)), 1024))
    unit = arith.shli(arith.andi(column, number(7)), number(4))
    for row, (eight, factor) in enumerate(zip(found, factors)):
        wide = [pair for four in eight for pair in _four_to_bfloat16(four, factor)]
        target = arith.addi(tile, arith.xori(unit, number(16 * row)))
        _store(wide, target, 128 * row)


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


_FOUR_TO_BFLOAT16 = """{
.reg .b16 a<2>, h<4>;
.reg .b32 p<2>;
.reg .f32 f<4>, s;
mov.b32 s, $3;
mov.b32 {a0, a1}, $2;
cvt.rn.f16x2.e4m3x2 p0, a0;
cvt.rn.f16x2.e4m3x2 p1, a1;
mov.b32 {h0, h1}, p0;
mov.b32 {h2, h3}, p1;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
cvt.f32.f16 f2, h2;
cvt.f32.f16 f3, h3;
mul.f32 f0, f0, s;
mul.f32 f1, f1, s;
mul.f32 f2, f2, s;
mul.f32 f3, f3, s;
cvt.rn.bf16x2.f32 $0, f1, f0;
cvt.rn.bf16x2.f32 $1, f3, f2;
}"""


def _four_to_bfloat16(four, scale) -> list:
    """Four e4m3 in 32 bits, times a float32 in 32 bits: two pairs."""
    i32 = ir.IntegerType.get_signless(32)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 2),
        [four, scale],
        _FOUR_TO_BFLOAT16,
        "=r,=r,r,r",
        has_side_effects=False,
    )
    return [llvm.extractvalue(i32, result, [k]) for k in range(2)]
