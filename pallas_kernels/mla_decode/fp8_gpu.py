"""Absorbed MLA decoding on FP8 latents, for Hopper GPUs: `pallas_gpu` with one thing more.

Wgmma multiplies FP8 only where both matrices lie along the sum, which the values do not:
latents have to be 16 bits wide in shared memory. The warpgroup that copies converts them,
a quarter of a block at a time: e4m3 is exact in float16, and its product with a slot's
scale is, too, where that is a power of two. Queries and weights are float16 as well; the
rotary part stays bfloat16, since sums do not mind.

Shared memory is full, and there are two ways for a quarter to arrive:

    in place  in the upper half of the place that it will fill, its scales in the lower:
              what lies in the way is in registers before it is written over
    ahead     where a tile has at most 32 queries of 64, a block has room in the rows that
              it lacks: products of these are never looked at

Letters as in `pallas_gpu`.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode import pallas_gpu
from pallas_kernels.mla_decode.combine_gpu import LOG2E, LOWEST, combine
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
)
from pallas_kernels.mla_decode.quantize import E4M3
from pallas_kernels.mla_decode.schedule_gpu import schedule

PLACE = BLOCK * QUARTER * 2  # bytes of a quarter in float16
ROW = MATRIX.reduce(0)
TURNED = plgpu.Layout.WGMMA_TRANSPOSED
FETCH = 0
OWN = (1,)  # quarters that the warpgroup of their values converts
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

        def run(arrived, taken, ahead, *shared):
            shared = _Shared(*shared)
            q_narrow, q_wide, q_bytes = shared.q
            latents, results, codes, scales, places = shared.latents
            if ahead is not None:
                codes, scales = ahead
            shared = shared._replace(latents=latents, q=q_narrow)
            kernel = _FewKernel if _is_ahead(s) else _Fp8Kernel
            kernel(
                sizes,
                *arguments,
                *refs[13:],
                shared,
                latent_scale=latent_scale,
                q_wide=q_wide,
                q_bytes=q_bytes,
                results=results,
                codes=codes,
                scales=scales,
                places=places,
                arrived=arrived,
                taken=taken,
            ).run()

        pl.run_scoped(run, *_shared_types(s), collective_axes="warpgroup")

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
            reduction_scratch_bytes=128 * s.rows if _is_ahead(s) else 1024,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # there is one wherever one is needed
        ),
    )


def _is_ahead(sizes: _Sizes) -> bool:
    """Whether a tile lacks so many rows that a block in e4m3 has room in their place."""
    return sizes.rows <= TALL // 2


def _shared_types(sizes: _Sizes) -> tuple:
    """What to allocate: barriers of quarters that have arrived; what `_Shared` is made of,
    where several views of the same memory are in the order of `_call`.
    """
    shared, quarters = _Shared.types(clustered=sizes.clustered), (SLOTS, 2, 2)
    matrix = functools.partial(plgpu.SMEM, dtype=jnp.float16, transforms=TILED)
    wide = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TILED)
    rows, ahead = TALL, None
    if _is_ahead(sizes):
        rows = sizes.rows
        ahead = (
            plgpu.SMEM((2, 2, BLOCK, QUARTER), E4M3),
            plgpu.SMEM((2, 2, BLOCK), jnp.float32),
        )
    shared = shared._replace(
        q=plgpu.RefUnion(
            matrix((1, rows, L)),
            wide((1, rows, L)),
            plgpu.SMEM((rows * 2 * L,), jnp.int8),
        ),
        q_rope=wide((rows, R)),
        latents=plgpu.RefUnion(
            matrix((*quarters, BLOCK, QUARTER)),
            shared.latents,
            plgpu.SMEM((*quarters, 2, BLOCK, QUARTER), E4M3),
            plgpu.SMEM((*quarters, PLACE // 4), jnp.float32),
            plgpu.SMEM((*quarters, PLACE), jnp.int8),
        ),
        weights=matrix((2, TALL, BLOCK)),
    )
    arrived = plgpu.Barrier(num_arrivals=2, num_barriers=ROPE)
    return arrived, plgpu.Barrier(num_barriers=4), ahead, *shared


@dataclass(frozen=True, kw_only=True)
class _Fp8Kernel(_Kernel):
    """One block of threads. "Full" says of quarters that they are converted."""

    registers: ClassVar[dict[str, int]] = {"values": 192, "weights": 88, "copies": 40}

    latent_scale: Any
    q_wide: Any  # [1, 64, L]: queries in bfloat16, as they arrive
    q_bytes: Any
    results: Any  # [SLOTS, 2, 2, 64, L / 4]: bfloat16, as they leave
    codes: Any  # [SLOTS, 2, 2, 2, 64, L / 4], of the last 2 the 1; or [2, 2, 64, L / 4]
    scales: Any  # [SLOTS, 2, 2, ..], the first 64; or [2, 2, 64]
    places: Any  # [SLOTS, 2, 2, bytes]
    arrived: Any
    taken: Any

    scores: ClassVar[Any] = SCORES

    # --- copies

    def copy_stretch(self, stretch: _Stretch) -> None:
        cached = functools.partial(self.cached, stretch, self.layer[0] * self.sizes.X)
        first, step = cached(stretch.first), stretch.done
        for half, quarter in QUARTERS:
            self.send(step, half, quarter, first)
        self.send_queries(stretch)
        self.send_rope(step, first)

        @pl.loop(stretch.first, stretch.last)
        def _(block):
            step, more = stretch.done + block - stretch.first, block + 1 < stretch.last
            following = cached(jnp.minimum(block + 1, stretch.last - 1))
            for half, quarter in QUARTERS:
                if quarter in OWN:
                    continue
                self.convert(step, half, quarter)
                if _is_ahead(self.sizes):
                    send = functools.partial(self.send, step + 1, half, quarter)
                    pl.when(more)(functools.partial(send, following))
            current = cached(block)
            pl.when(block > stretch.first)(lambda: self.send_rope(step, current))
            if self.sizes.clustered or FETCH:
                far = FETCH or 2
                latest = cached(jnp.minimum(block + far, stretch.last - 1))
                pl.when(block + far < stretch.last)(lambda: self.fetch(*latest))

            @pl.when(more)
            def _():
                for half, quarter in QUARTERS:
                    if not _is_ahead(self.sizes) or quarter in OWN:
                        self.send(step + 1, half, quarter, following)

    def send_queries(self, stretch: _Stretch) -> None:
        shared = self.shared
        there = (slice(None),) if _is_ahead(self.sizes) else self.there
        pl.when(stretch.done > 0)(lambda: plgpu.barrier_wait(shared.q_free))
        for source, target in (
            (self.q, self.q_wide.at[(0, *there)]),
            (self.q_rope, shared.q_rope.at[there]),
        ):
            source = source.at[stretch.row, self.queries]
            plgpu.copy_gmem_to_smem(source, target, shared.q_full)

    def send_rope(self, step, block) -> None:
        barrier = self.shared.free.at[ROPE]
        pl.when(step > 0)(lambda: plgpu.barrier_wait(barrier))
        self.copy_to(self.shared.full.at[ROPE], (block.rope, self.shared.rope))

    def send(self, step, half: int, quarter: int, block) -> None:
        """Has a quarter of a block, and its scales, copied to where it is converted."""
        if not _is_ahead(self.sizes):
            self.wait_for_place(step, half, quarter)
        elif quarter in OWN:
            taken = self.taken.at[2 * half + quarter]
            pl.when(step > 0)(lambda: plgpu.barrier_wait(taken))
        barrier, codes, scales = self.landing(step, half, quarter)
        columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
        latents = block.latents.at[:, columns]
        self.copy_to(barrier, (latents, codes), (block.scales, scales))

    def copy_to(self, barrier, *copies) -> None:
        pair = ("pair",) if self.sizes.clustered else None
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=pair)

    def convert(self, step, half: int, quarter: int) -> None:
        barrier, codes, scales = self.landing(step, half, quarter)
        plgpu.barrier_wait(barrier)
        convert = _convert_in_place
        if _is_ahead(self.sizes):
            if quarter not in OWN:
                self.wait_for_place(step, half, quarter)
            convert = _convert
        convert(self.places.at[lax.rem(step, SLOTS), half, quarter], codes, scales)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.shared.full.at[_quarter(step, half, quarter)])
        if _is_ahead(self.sizes) and quarter in OWN:
            plgpu.barrier_arrive(self.taken.at[2 * half + quarter])

    def wait_for_place(self, step, half: int, quarter: int) -> None:
        barrier = self.shared.free.at[_quarter(step, half, quarter)]
        pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(barrier))

    def landing(self, step, half: int, quarter: int) -> tuple:
        """Where a quarter arrives: the barrier, and places for values and scales."""
        if _is_ahead(self.sizes):
            at = half, quarter
            return (
                self.arrived.at[2 * half + quarter],
                self.codes.at[at],
                self.scales.at[at],
            )
        at = lax.rem(step, SLOTS), half, quarter
        codes, scales = self.codes.at[(*at, 1)], self.scales.at[(*at, pl.ds(0, BLOCK))]
        return self.arrived.at[_quarter(step, half, quarter)], codes, scales

    def cached(self, stretch: _Stretch, layer, block) -> "_Block":
        s, place, slot = self.sizes, stretch.row, block * BLOCK
        if s.paged:
            place = self.pages[place, lax.div(slot, s.Z)]
            slot = lax.rem(slot, s.Z)
        place += layer
        slots = pl.ds(pl.multiple_of(slot, BLOCK), BLOCK)
        return _Block(
            self.latent.at[place, slots],
            self.rope.at[place, :, slots],
            self.latent_scale.at[place, slots],
        )

    def fetch(self, latents, rope, scales) -> None:
        if self.sizes.clustered:
            return super().fetch(latents, rope)
        for half in range(2):
            plgpu.async_prefetch(latents.at[:, pl.ds(half * HALF, HALF)])
        plgpu.async_prefetch(rope)

    # --- scores and weights

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
        """One at a time: to convert the next takes as long as this one's softmax."""
        step = stretch.done + block - stretch.first

        def multiply(acc):
            self.multiply_latents(acc, stretch, step)
            self.multiply_rope(acc)
            return acc[...]

        scores = pl.run_scoped(multiply, self.scores)
        plgpu.barrier_arrive(self.shared.free.at[ROPE])
        ends = block + 1 == stretch.last
        pl.when(ends)(lambda: plgpu.barrier_arrive(self.shared.q_free))
        state = self.soften(stretch, block, scores, state)
        pl.when(ends)(lambda: self.finish(stretch, state))
        self.publish(step)
        return state

    def soften(self, stretch: _Stretch, block, scores, state):
        """Writes 2 ** (scores + HEADROOM - highest), at most 2 ** 15."""
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
        for quarter in OWN:
            self.convert(stretch.done, half, quarter)
        super().add_stretch(half, stretch)

    def add_block(self, half: int, stretch: _Stretch, step, acc):
        more = step + 1 < stretch.end
        for quarter in OWN:
            convert = functools.partial(self.convert, step + 1, half, quarter)
            pl.when(more)(convert)
        return super().add_block(half, stretch, step, acc)

    def store(self, half: int, stretch: _Stretch, acc) -> None:
        wide = replace(self, shared=self.shared._replace(latents=self.results))
        super(_Fp8Kernel, wide).store(half, stretch, acc)


@dataclass(frozen=True, kw_only=True)
class _FewKernel(_Fp8Kernel):
    """Of tiles with 8 to 32 queries: scores are [slots, queries], so that products with
    queries that are not there need neither time nor memory. Their weights turn round on
    their way to the values.
    """

    @property
    def own(self):
        """The tile's queries, of 64."""
        return pl.ds(0, self.sizes.rows)

    def weigh_stretch(self, stretch: _Stretch) -> None:
        plgpu.barrier_wait(self.shared.q_full)
        _to_float16(self.q_bytes)
        plgpu.commit_smem()

        @pl.when(stretch.done == 0)
        def _():  # for the rows that are not there: nothing has to be done to them
            ones = plgpu.layout_cast(jnp.ones((TALL,), jnp.float32), COLUMN)
            for row in range(4):
                self.shared.factors[row] = ones

        rows = self.sizes.rows
        highest = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), ROW)
        total = plgpu.layout_cast(jnp.zeros((BLOCK, rows), jnp.float32), MATRIX)
        weigh = functools.partial(self.weigh_block, stretch)
        lax.fori_loop(stretch.first, stretch.last, weigh, (highest, total))

    @property
    def scores(self):
        return plgpu.ACC((BLOCK, self.sizes.rows), jnp.float32)

    def multiply_rope(self, acc) -> None:
        plgpu.barrier_wait(self.shared.full.at[ROPE])
        plgpu.wgmma(acc, self.shared.rope.T, self.shared.q_rope.T)

    def multiply_latents(self, acc, stretch: _Stretch, step) -> None:
        shared = self.shared
        zero = lax.shift_right_logical(stretch.length, 30) * step
        for half, quarter in QUARTERS:
            plgpu.barrier_wait(shared.full.at[_quarter(step, half, quarter)])
            columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
            latents = shared.latents.at[lax.rem(step, SLOTS), half, quarter]
            plgpu.wgmma(acc, latents, shared.q.at[zero, :, columns].T)

    def soften(self, stretch: _Stretch, block, scores, state):
        shared, (highest, total) = self.shared, state
        step = stretch.done + block - stretch.first
        scale = self.sizes.scale * LOG2E
        scores = self.masked(stretch, block, scores if scale >= 0 else -scores)
        scale, before = abs(scale), highest
        highest = jnp.maximum(before, scores.max(axis=0) * scale - HEADROOM)
        highest = jnp.where(highest > before + GROWTH, highest, before)
        factor = jnp.exp2(before - highest)
        weights = jnp.exp2(scores * scale - _columns(highest, scores))
        total = total * _columns(factor, total) + weights
        at = lax.rem(step, 2)

        @pl.when(step > 1)
        def _():
            plgpu.barrier_wait(shared.weights_free.at[at])

        weights = plgpu.layout_cast(weights.astype(jnp.float16), TURNED)
        shared.weights.at[at, self.own].T[...] = weights
        shared.factors[at, self.own] = factor
        return highest, total

    def masked(self, stretch: _Stretch, block, scores):
        s, length = self.sizes, stretch.length
        shortest = length - s.T + 1

        def mask(scores):
            slot, query = (
                plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=MATRIX)
                for axis in (0, 1)
            )
            seen = shortest
            if s.T > 1:
                seen = jnp.minimum(shortest + lax.div(query, jnp.int32(s.N)), length)
            return jnp.where(slot + block * BLOCK < seen, scores, -jnp.inf)

        some = (block + 1) * BLOCK > shortest
        return lax.cond(some, mask, lambda scores: scores, scores)

    def finish(self, stretch: _Stretch, state) -> None:
        highest, total = state
        total = total.sum(axis=0)
        some = total > 0
        inverse = jnp.where(some, 1 / total, jnp.zeros_like(total))
        self.shared.factors[2 + lax.rem(stretch.end - 1, 2), self.own] = inverse
        lse = (highest + jnp.log2(total)) / LOG2E
        lse = jnp.where(some, lse, jnp.full_like(total, -jnp.inf))

        @pl.when(stretch.whole)
        def _():
            self.lse[stretch.row, self.tile, self.own] = lse

        @pl.when(~stretch.whole)
        def _():
            place, tile = self.place(stretch)
            self.lses[place, tile, self.own] = lse


def _columns(row, like):
    return lax.broadcast_in_dim(row, like.shape, [1])


class _Block(NamedTuple):
    """A block in the cache."""

    latents: Any  # [64, L]
    rope: Any  # [R, 64]
    scales: Any  # [64]


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
