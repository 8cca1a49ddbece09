"""Absorbed MLA decoding for Hopper GPUs, in Pallas Mosaic GPU.

Letters: B rows, T new tokens, N heads, L latent, R rope, Y layers, X rows or pages of the
cache, Z slots of one, P pages of a row; M = T N queries of a row.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Int

SMS = 132  # of an H100 or H200
TALL = 64  # queries of a tile
BLOCK = 64  # slots of a block
LATENT, ROPE = 512, 64
HALF = LATENT // 2
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
WG = plgpu.Layout.WGMMA
ROW = WG.reduce(1)
LOG2E = math.log2(math.e)
NEVER = -1e30
START_COST = 2  # blocks
QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of a half, of which half


def lacks(q_BTNL: Array, q_BTNR: Array, latent_YXZL: Array) -> str:
    """Why the kernel does not take these, or nothing."""
    B, T, N, L = q_BTNL.shape
    dtypes = {x.dtype.name for x in (q_BTNL, q_BTNR, latent_YXZL)}
    if dtypes != {"bfloat16"}:
        return f"takes bfloat16, not {', '.join(sorted(dtypes))}"
    if (L, q_BTNR.shape[-1]) != (LATENT, ROPE):
        return f"takes sizes {LATENT} and {ROPE}, not {L} and {q_BTNR.shape[-1]}"
    if latent_YXZL.shape[2] % BLOCK:
        return f"rows or pages of {latent_YXZL.shape[2]} slots, not multiples of {BLOCK}"
    tiles = -(-T * N // TALL)
    if T * N % (8 * tiles) or tiles > SMS:
        return f"{T} tokens of {N} heads are no equal tiles of 8 to {TALL} queries"
    return "" if _is_hopper() else "is for GPUs of Hopper's generation"


def _is_hopper() -> bool:
    """Whether the GPU at hand is one; without a GPU, what is compiled for is taken to be."""
    if jax.default_backend() != "gpu":
        return True
    return jax.devices()[0].compute_capability.startswith("9.")


class Options(NamedTuple):
    lefts: int = 2
    rights: int = 2
    ropes: int = 1
    lazy: bool = True
    gate: bool = False
    chain: bool = True
    stagger: bool = True
    rs: bool = False
    bare: bool = True  # no barriers of Pallas' own
    vote: bool = True
    thin: bool = True
    ahead: int | None = None  # blocks fetched into L2 ahead of the copy
    early: bool = True
    cluster: bool = False
    registers: tuple[int, int, int] = (176, 136, 24)  # values, softmax, producer
    skip: tuple[str, ...] = ()


@plgpu.inline_mgpu(
    arg_types=(ROW,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
)
def _any_below_one(_, factors) -> mgpu.FragmentedArray:
    """Whether one of the factors of a warp's rows is."""
    i1, i32 = ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32)
    lowest = functools.reduce(arith.minimumf, factors.registers.flat)
    if isinstance(lowest.type, ir.VectorType):
        lowest = vector.extract(lowest, dynamic_position=[], static_position=[0])
    one = arith.constant(lowest.type, ir.FloatAttr.get(lowest.type, 1.0))
    below = arith.cmpf(arith.CmpFPredicate.OLT, lowest, one)
    below = llvm.inline_asm(
        i1, [below], "vote.sync.any.pred $0, $1, 0xffffffff;", "=b,b", has_side_effects=True
    )
    return mgpu.FragmentedArray.splat(arith.extui(i32, below), (), is_signed=True)


class Plan(NamedTuple):
    both: Array
    starts: Array
    counts: Array
    longest: Array
    total: Array


def shares(longest, total, rows: int, parts: int):
    """(whether rows are cut evenly, what a row then takes, what a part takes)."""
    each, cuts = -(-rows // parts), max(1, parts // rows)
    even = lax.div(total + START_COST * rows + parts - 1, jnp.int32(parts))
    if cuts == 1:
        same = longest + START_COST
        equal = each * same
    else:
        equal = lax.div(longest + cuts - 1, jnp.int32(cuts))
        same = equal * cuts
    uniform = equal * 20 <= even * 21
    return uniform, same, jnp.where(uniform, equal, even)


def plan(lengths, slots, tiles):
    parts = max(1, SMS // tiles)
    B = lengths.shape[0]
    lengths = jnp.clip(lengths, 0, slots).astype(jnp.int32)
    counts = jnp.maximum(1, lax.div(lengths + BLOCK - 1, jnp.int32(BLOCK)))
    longest, total = counts.max(), counts.sum()
    uniform, same, payload = shares(longest, total, B, parts)
    b = jnp.arange(B, dtype=jnp.int32)
    costs = counts + START_COST
    starts = jnp.where(b[:, None] > b, costs, 0).sum(1, dtype=jnp.int32)
    starts = jnp.where(uniform, b * same, starts)
    begin = jnp.arange(parts, dtype=jnp.int32)[:, None] * payload
    over, begun = starts + counts <= begin, starts < begin + payload
    both = (over + 65536 * begun).sum(1, dtype=jnp.int32)
    return Plan(both, starts, counts, longest[None], total[None]), parts


def decode(
    q_BTNL, q_BTNR, latent_YXZL, rope_YXRZ, lengths_B, layer, pages_BP, *, scale, options=Options(),
    combine=True,
):
    B, T, N, L = q_BTNL.shape
    M = T * N
    Y, X, Z, _ = latent_YXZL.shape
    P = 1 if pages_BP is None else pages_BP.shape[1]
    tiles = -(-M // TALL)
    rows = M // tiles
    o = options
    if o.ahead is None:
        o = o._replace(ahead=2 if tiles % 2 == 0 else 0)
    cluster = o.cluster and tiles % 2 == 0
    schedule, parts = plan(lengths_B, P * Z, tiles)
    lengths = jnp.clip(lengths_B, 0, P * Z).astype(jnp.int32)
    layer = jnp.asarray(layer, jnp.int32)[None]
    if pages_BP is None:
        pages = jnp.zeros((1, 1), jnp.int32)
    else:
        pages = jnp.clip(pages_BP, 0, X - 1).astype(jnp.int32)
    dtype = q_BTNL.dtype

    def kernel(both_r, start_r, count_r, longest_r, total_r, length_r, layer_r, page_r,
               q_r, qr_r, latent_r, rope_r, out_r, lse_r, part_r, part_lse_r, scoped):
        (q_s, qr_s, left_s, right_s, rope_s, p_s, stats,
         q_full, q_free, full, free, p_full, p_free, turn) = scoped
        part = lax.axis_index("part")
        tile = lax.axis_index("tile")
        if cluster:
            tile = tile * 2 + lax.axis_index("pair")
        w = lax.axis_index("wg")
        mine = pl.ds(tile * rows, rows)
        everything = (slice(None),) if rows == TALL else (pl.ds(0, rows),)
        _, _, payload = shares(longest_r[0], total_r[0], B, parts)
        depth = (o.lefts, o.rights, o.ropes)

        def place_of(k, at, c=0):
            return 2 * (o.lefts + o.rights) + at if k == 2 else 2 * (k * o.lefts + at) + c

        def freed(*place):
            return free.at[place_of(*place)]

        def filled(*place):
            return full.at[place_of(*place)]
        rings = (left_s, right_s, rope_s)

        def items(body):
            def step(row, n):
                start, count = start_r[row], count_r[row]
                lo = jnp.clip(part * payload - start, 0, count)
                hi = jnp.clip((part + 1) * payload - start, 0, count)
                body(row, lo, hi, n)
                return n + hi - lo
            first, last = both_r[part] & 65535, lax.shift_right_logical(both_r[part], 16)
            return lax.fori_loop(first, last, step, jnp.int32(0))

        def produce(row, lo, hi, n):
            @pl.when(n > 0)
            def _():
                plgpu.barrier_wait(q_free)
            plgpu.copy_gmem_to_smem(q_r.at[row, mine], q_s.at[(0, *everything)], q_full)
            plgpu.copy_gmem_to_smem(qr_r.at[row, mine], qr_s.at[everything], q_full)
            base = layer_r[0] * X

            def sources(j):
                slot, place = j * BLOCK, row
                if pages_BP is not None:
                    place = page_r[row, lax.div(slot, Z)]
                    slot = lax.rem(slot, Z)
                slots = pl.ds(pl.multiple_of(slot, BLOCK), BLOCK)
                return latent_r.at[base + place, slots], rope_r.at[base + place, :, slots]

            def prefetch(j):
                latents, rope = sources(j)
                if tiles % 2 == 0:
                    half = lax.axis_index("pair") if cluster else lax.rem(tile, 2)
                    plgpu.async_prefetch(latents.at[:, pl.ds(half * HALF, HALF)])
                    pl.when(half == 0)(lambda: plgpu.async_prefetch(rope))
                else:
                    plgpu.async_prefetch(latents.at[:, pl.ds(0, HALF)])
                    plgpu.async_prefetch(latents.at[:, pl.ds(HALF, HALF)])
                    plgpu.async_prefetch(rope)

            if o.ahead:
                @pl.loop(lo, jnp.minimum(lo + o.ahead, hi))
                def _(j):
                    prefetch(j)

            @pl.loop(lo, hi)
            def _(j):
                g = n + j - lo
                if o.ahead:
                    pl.when(j + o.ahead < hi)(lambda: prefetch(j + o.ahead))
                latents, ropes = sources(j)
                at = [lax.rem(g, d) for d in depth]
                second = lax.rem(j - lo, 2)

                def load(k, c, source, target):
                    @pl.when(g >= depth[k])
                    def _():
                        plgpu.barrier_wait(freed(k, at[k], c))
                    if "load" in o.skip:
                        plgpu.barrier_arrive(filled(k, at[k], c))
                    else:
                        plgpu.copy_gmem_to_smem(source, target, filled(k, at[k], c),
                                                collective_axes=("pair",) if cluster else None)

                def rope():
                    load(2, 0, ropes, rope_s.at[at[2]])
                pl.when(second == 0)(rope)
                for c, k in QUARTERS:
                    load(k, c, latents.at[:, pl.ds(k * HALF + c * 128, 128)], rings[k].at[at[k], c])
                pl.when(second == 1)(rope)

        def soften(row, lo, hi, n):
            length, count = length_r[row], count_r[row]
            zero = lax.shift_right_logical(length, 30)
            shortest = length - T + 1

            def multiply_rope(acc, j):
                at = lax.rem(n + j - lo, o.ropes)
                plgpu.barrier_wait(filled(2, at))
                plgpu.wgmma(acc, qr_s, rope_s.at[at])

            def multiply_latents(acc, j):
                g = n + j - lo
                q = q_s.at[zero * j]
                for c, k in QUARTERS:
                    at = lax.rem(g, depth[k])
                    plgpu.barrier_wait(filled(k, at, c))
                    if "qk" not in o.skip:
                        plgpu.wgmma(acc, q.at[:, pl.ds(k * HALF + c * 128, 128)],
                                    rings[k].at[at, c].T)

            def done(j):
                plgpu.barrier_arrive(freed(2, lax.rem(n + j - lo, o.ropes)))

            def masked(s, j):
                def mask(s):
                    query = plgpu.broadcasted_iota(jnp.int32, (TALL, BLOCK), 0, layout=WG)
                    slot = plgpu.broadcasted_iota(jnp.int32, (TALL, BLOCK), 1, layout=WG)
                    seen = shortest
                    if T > 1:
                        seen = seen + lax.div(query + tile * rows, jnp.int32(N))
                        seen = jnp.minimum(seen, length)
                    return jnp.where(slot + j * BLOCK < seen, s, -jnp.inf)
                return lax.cond((j + 1) * BLOCK > shortest, mask, lambda s: s, s)

            def soften_block(s, j, m, l):
                """Writes P and how to scale the sum before it is added."""
                g = n + j - lo
                at = lax.rem(g, 2)
                if "softmax" in o.skip:
                    p, alpha, m_new = s, jnp.ones_like(m), m
                elif o.thin:
                    s = masked(s, j)
                    m_new = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
                    if o.lazy:
                        m_new = jnp.where(m_new > m + 8, m_new, m)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s * (scale * LOG2E) - lax.broadcast_in_dim(m_new, s.shape, [0]))
                    l = l * lax.broadcast_in_dim(alpha, l.shape, [0])
                    for c in range(0, BLOCK, 8):
                        l = l + p[:, c : c + 8]
                else:
                    s = masked(s * (scale * LOG2E), j)
                    m_new = jnp.maximum(m, s.max(axis=1))
                    if o.lazy:
                        m_new = jnp.where(m_new > m + 8, m_new, m)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s - lax.broadcast_in_dim(m_new, s.shape, [0]))
                    l = l * alpha + p.sum(axis=1)

                @pl.when(g > 1)
                def _():
                    plgpu.barrier_wait(p_free.at[at])
                p_s[at] = p.astype(dtype)
                if o.lazy and not o.vote:  # 2: leave the sum as it is
                    grown = jnp.max(m_new - m)
                    alpha = jnp.where(grown > 0, alpha, jnp.full_like(alpha, 2))
                stats[at] = alpha
                return m_new, l

            def finish(m, l):
                at = 2 + lax.rem(n + hi - 1 - lo, 2)
                if o.thin:
                    l = l.sum(axis=1)
                some = l > 0
                stats[at] = jnp.where(some, 1 / l, jnp.zeros_like(l))
                lse = jnp.where(some, (m + jnp.log2(l)) / LOG2E, jnp.full_like(l, -jnp.inf))
                whole = (lo == 0) & (hi == count)

                @pl.when(whole)
                def _():
                    lse_r[row, tile] = lse

                @pl.when(~whole)
                def _():
                    part_lse_r[2 * part + (lo == 0).astype(jnp.int32), tile] = lse

            def publish(j):
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_full.at[lax.rem(n + j - lo, 2)])

            def one(j):
                def scores(acc):
                    multiply_rope(acc, j)
                    multiply_latents(acc, j)
                    return acc[...]
                s = pl.run_scoped(scores, plgpu.ACC((TALL, BLOCK), jnp.float32))
                done(j)
                return s

            def two(i, carry):
                m, l = carry
                j = lo + 2 * i

                def both(acc, acc_next):
                    multiply_rope(acc, j)
                    multiply_latents(acc, j)
                    if o.chain:
                        multiply_latents(acc_next, j + 1)
                        s = plgpu.wgmma_accumulator_load(acc, wait_n=4)
                        done(j)
                    else:
                        s = acc[...]
                        done(j)
                        multiply_latents(acc_next, j + 1)
                    state = soften_block(s, j, m, l)
                    if not o.gate:
                        publish(j)
                    multiply_rope(acc_next, j + 1)
                    return acc_next[...], *state
                block = plgpu.ACC((TALL, BLOCK), jnp.float32)
                s, m, l = pl.run_scoped(both, block, block)
                done(j + 1)
                if o.gate:
                    publish(j)

                @pl.when(j + 2 == hi)
                def _():
                    plgpu.barrier_arrive(q_free)
                m, l = soften_block(s, j + 1, m, l)

                @pl.when(j + 2 == hi)
                def _():
                    finish(m, l)
                publish(j + 1)
                return m, l

            plgpu.barrier_wait(q_full)
            m = plgpu.layout_cast(jnp.full((TALL,), NEVER, jnp.float32), ROW)
            l = plgpu.layout_cast(jnp.zeros((TALL,), jnp.float32), ROW)
            if o.thin:
                l = plgpu.layout_cast(jnp.zeros((TALL, 8), jnp.float32), WG)
            m, l = lax.fori_loop(0, lax.div(hi - lo, 2), two, (m, l))

            @pl.when(lax.rem(hi - lo, 2) == 1)
            def _():
                s = one(hi - 1)
                plgpu.barrier_arrive(q_free)
                finish(*soften_block(s, hi - 1, m, l))
                publish(hi - 1)

        def values(k):
            ring = rings[k]

            def body(row, lo, hi, n):
                count, end = count_r[row], n + hi - lo
                whole = (lo == 0) & (hi == count)
                # Slots that the row has in the last block of these.
                left = length_r[row] - (hi - 1) * BLOCK

                def step(g, acc):
                    at, p_at = lax.rem(g, depth[k]), lax.rem(g, 2)
                    for c in range(2):
                        plgpu.barrier_wait(filled(k, at, c))
                    plgpu.barrier_wait(p_full.at[p_at])

                    @pl.when((g + 1 == end) & (left < BLOCK))
                    def _():
                        for c in range(0, HALF, 64):
                            chunk = ring.at[at, c // 128, :, pl.ds(c % 128, 64)]
                            v = plgpu.load(chunk, (), layout=WG)
                            slot = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=WG)
                            v = jnp.where(slot < left, v, jnp.zeros_like(v))
                            plgpu.commit_smem()  # all have read
                            chunk[...] = v
                        plgpu.commit_smem()

                    def rescale(acc):
                        alpha = plgpu.load(stats.at[p_at], (), layout=ROW)
                        return acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
                    if "rescale" not in o.skip:
                        if o.lazy and o.vote:
                            alpha = plgpu.load(stats.at[p_at], (), layout=ROW)
                            acc = lax.cond(
                                _any_below_one(alpha) > 0,
                                lambda acc: acc * lax.broadcast_in_dim(alpha, acc.shape, [0]),
                                lambda acc: acc, acc)
                        elif o.lazy:
                            acc = lax.cond(stats[p_at, 0] < 2, rescale, lambda acc: acc, acc)
                        else:
                            acc = rescale(acc)

                    if o.stagger and k == 1:
                        plgpu.barrier_wait(turn.at[p_at])

                    p = plgpu.load(p_s.at[p_at], (), layout=WG) if o.rs else p_s.at[p_at]

                    def multiply(a):
                        for c in range(2):
                            plgpu.wgmma(a.at[:, pl.ds(c * 128, 128)], p, ring.at[at, c])
                        if o.early or (o.stagger and k == 0):
                            plgpu.wgmma_wait(1)
                        if o.stagger and k == 0:
                            plgpu.barrier_arrive(turn.at[p_at])
                        if o.early:
                            @pl.when(g + 1 < end)
                            def _():
                                plgpu.barrier_arrive(freed(k, at, 0))
                    if "pv" not in o.skip:
                        acc = pl.run_state(multiply)(plgpu.ACC.init(acc))

                    @pl.when(g + 1 < end)
                    def _():
                        plgpu.barrier_arrive(p_free.at[p_at])
                        if not o.early:
                            plgpu.barrier_arrive(freed(k, at, 0))
                        plgpu.barrier_arrive(freed(k, at, 1))
                    return acc

                acc = plgpu.layout_cast(jnp.zeros((TALL, HALF), jnp.float32), WG)
                acc = lax.fori_loop(n, end, step, acc)
                p_at, at = lax.rem(end - 1, 2), lax.rem(end - 1, depth[k])
                inverse = plgpu.load(stats.at[2 + p_at], (), layout=ROW)
                plgpu.barrier_arrive(p_free.at[p_at])
                acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])

                @pl.when(whole)
                def _():
                    plgpu.commit_smem()  # all have multiplied
                    for c in range(2):
                        ring[at, c] = acc[:, c * 128 : (c + 1) * 128].astype(dtype)
                    plgpu.commit_smem()
                    for c in range(2):
                        plgpu.copy_smem_to_gmem(
                            ring.at[(at, c, *everything)],
                            out_r.at[row, mine, pl.ds(k * HALF + c * 128, 128)])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(~whole)
                def _():
                    part_r[2 * part + (lo == 0).astype(jnp.int32), tile, :, pl.ds(k * HALF, HALF)] = acc
                plgpu.barrier_arrive(freed(k, at, 0))
                plgpu.barrier_arrive(freed(k, at, 1))
            return body

        def run_values(k):
            plgpu.set_max_registers(o.registers[0], action="increase")
            items(values(k))
            plgpu.wait_smem_to_gmem(0)

        def run_soften():
            plgpu.set_max_registers(o.registers[1], action="increase")
            items(soften)

        def run_produce():
            plgpu.set_max_registers(o.registers[2], action="decrease")
            total = items(produce)
            if cluster:
                for k in range(3):
                    @pl.loop(jnp.maximum(total - depth[k], 0), total)
                    def _(g, k=k):
                        for c in range(1 + (k < 2)):
                            plgpu.barrier_wait(freed(k, lax.rem(g, depth[k]), c))

        lax.cond(w < 2,
                 lambda: lax.cond(w == 0, lambda: run_values(0), lambda: run_values(1)),
                 lambda: lax.cond(w == 2, run_soften, run_produce))

    def release(count, **k):
        if cluster:
            return plgpu.ClusterBarrier(collective_axes=("pair",), num_barriers=count)
        return plgpu.Barrier(num_barriers=count)

    def entry(*refs):
        pl.run_scoped(
            lambda *a: kernel(*refs, a),
            plgpu.SMEM((1, TALL, LATENT), dtype, transforms=TILED),
            plgpu.SMEM((TALL, ROPE), dtype, transforms=TILED),
            plgpu.SMEM((o.lefts, 2, BLOCK, HALF // 2), dtype, transforms=TILED),
            plgpu.SMEM((o.rights, 2, BLOCK, HALF // 2), dtype, transforms=TILED),
            plgpu.SMEM((o.ropes, ROPE, BLOCK), dtype, transforms=TILED),
            plgpu.SMEM((2, TALL, BLOCK), dtype, transforms=TILED),
            plgpu.SMEM((4, TALL), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=2 * (o.lefts + o.rights) + o.ropes),
            release(2 * (o.lefts + o.rights) + o.ropes),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            collective_axes="wg",
        )

    grid = dict(grid=(tiles, parts), grid_names=("tile", "part"))
    if cluster:
        grid = dict(grid=(tiles // 2, parts), grid_names=("tile", "part"),
                    cluster=(2,), cluster_names=("pair",))
    out, lse, partial, partial_lse = plgpu.kernel(
        entry,
        out_type=(
            jax.ShapeDtypeStruct((B, M, L), dtype),
            jax.ShapeDtypeStruct((B, tiles, TALL), jnp.float32),
            jax.ShapeDtypeStruct((2 * parts, tiles, TALL, LATENT), jnp.float32),
            jax.ShapeDtypeStruct((2 * parts, tiles, TALL), jnp.float32),
        ),
        **grid,
        num_threads=4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=512, unsafe_no_auto_barriers=o.bare,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*schedule, lengths, layer, pages, q_BTNL.reshape(B, M, L), q_BTNR.reshape(B, M, ROPE),
      latent_YXZL.reshape(Y * X, Z, L), rope_YXRZ.reshape(Y * X, ROPE, Z))
    if combine:
        out, lse = _combine(schedule, parts, rows, out, lse, partial, partial_lse)
    return out.reshape(q_BTNL.shape), lse[:, :, :rows].reshape(B, T, N)


def _combine(schedule, parts, rows, out, lse, partial, partial_lse):
    """Puts together the rows that are cut, in place."""
    if parts == 1:
        return out, lse
    B, M, _ = out.shape
    # Many rows have few cuts each, a few have many.
    turns, queries, deep = (4, 2, 4) if B >= 32 else (1, 1, 16)

    def body(start_r, count_r, longest_r, total_r, part_r, part_lse_r, out_r, lse_r):
        row = lax.axis_index("row")
        _, _, payload = shares(longest_r[0], total_r[0], B, parts)
        start = start_r[row]
        begin = lax.div(start, payload)
        cuts = lax.div(start + count_r[row] - 1, payload) - begin + 1

        def add(i, carry, places):
            slots, visible = [], []
            for k in range(deep):
                cut = i * deep + k
                visible.append(cut < cuts)
                slot = 2 * (begin + jnp.minimum(cut, cuts - 1))
                slots.append(slot + (cut == 0).astype(jnp.int32))
            sums = []
            for (m, l, acc), place in zip(carry, places):
                x = [part_lse_r[slot, *place] for slot in slots]
                x = [jnp.where(v, lse, -jnp.inf) for v, lse in zip(visible, x)]
                highest = functools.reduce(jnp.maximum, x, m)
                scale = jnp.exp2((m - highest) * LOG2E)
                l, acc = l * scale, acc * scale
                for slot, lse in zip(slots, x):
                    weight = jnp.exp2((lse - highest) * LOG2E)
                    l, acc = l + weight, acc + part_r[slot, *place] * weight
                sums.append((highest, l, acc))
            return sums

        @pl.when(cuts > 1)
        def _():
            @pl.loop(0, turns)
            def _(turn):
                place = (lax.axis_index("query") * turns + turn) * queries
                places = [place + q for q in range(queries)]
                places = [(lax.div(q, rows), lax.rem(q, rows)) for q in places]
                zero = plgpu.layout_cast(
                    jnp.zeros((LATENT,), jnp.float32), plgpu.Layout.WG_STRIDED((LATENT,), 2)
                )
                sums = lax.fori_loop(
                    0,
                    lax.div(cuts + deep - 1, deep),
                    functools.partial(add, places=places),
                    [(jnp.float32(NEVER), jnp.float32(0), zero)] * queries,
                )
                for (m, l, acc), (tile, r) in zip(sums, places):
                    some = l > 0
                    out_r[row, tile * rows + r] = (acc * jnp.where(some, 1 / l, 0.0)).astype(out.dtype)
                    lse_r[row, tile, r] = jnp.where(some, m + jnp.log2(l) / LOG2E, -jnp.inf)

    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    pl.kernel(
        body,
        mesh=plgpu.Mesh(grid=(M // (turns * queries), B), grid_names=("query", "row")),
        name="mla_decode_combine",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*schedule[1:], partial, partial_lse, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)
