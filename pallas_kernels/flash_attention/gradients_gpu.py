"""The Hopper kernel of attention's gradients: those of keys and values, or of queries.

A block of the grid owns 128 keys and their values, or 128 queries and the gradients of
their results; the other side's rows, of those that see each other, stream by, 64 at a
time. Weights are computed again from the log-sum-exp. All that is added up stays in
registers, in an order that is always the same.

One warpgroup copies; two multiply, 64 of the block's own rows each. While one is busy with
exponentials, the matrix unit works for the other.

Letters: B batch, T length, K kv heads, G query heads of each, N = K G, H size of queries
and keys, U size of values.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul.ring_gpu import Ring, smem
from pallas_kernels.grouped_matmul.tiles_gpu import walk
from pallas_kernels.mosaic import SMS, load

STEP = 64  # rows of the other side that stream by together
HALF = 64  # own rows of a warpgroup
OWN = 2 * HALF  # and of a block
STAGES = 3  # buffers of the other side's


class Plan(NamedTuple):
    """What is to be done."""

    B: int
    T: int
    K: int
    G: int
    H: int
    U: int
    scale: float
    dtype: np.dtype
    keys: bool  # a block owns keys, not queries
    keep: bool = False  # and writes dS

    @property
    def queries(self) -> int:
        """Heads of them."""
        return self.K * self.G

    @property
    def heads(self) -> int:
        """Of the own side."""
        return self.K if self.keys else self.queries

    @property
    def blocks(self) -> int:
        """Of the own side, of a head."""
        return pl.cdiv(self.T, OWN)

    @property
    def steps(self) -> int:
        """Of the other side, of a head."""
        return pl.cdiv(self.T, STEP)

    @property
    def streams(self) -> int:
        """Heads of the other side that go with one of the own."""
        return self.G if self.keys else 1

    @property
    def score_tiles(self) -> int:
        """Of dS, of a query head: each step of queries with those of keys up to it."""
        return triangle(self.steps)

    @property
    def score_bytes(self) -> int:
        """Of all dS."""
        tiles = self.B * self.queries * self.score_tiles
        return tiles * STEP * STEP * self.dtype.itemsize


def triangle(number):
    """1 + 2 + ... + number: in the order of tiles, where a step of queries begins."""
    return number * (number + 1) // 2


def in_order(heads: int, blocks: int):
    """Head and block of this block of the grid. Some heads at a time, so that what they
    share stays in the L2 cache; of those, all first blocks first.
    """
    together = pl.cdiv(2 * SMS, blocks)
    block, head = walk(lax.axis_index("block"), blocks, heads, together)
    return head, block


def call(kernel: Callable, results: list, operands: Sequence[Array], blocks: int):
    """Runs a kernel of three warpgroups on that many blocks."""
    return plgpu.kernel(
        kernel,
        out_type=results,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
    )(*operands)


def gradients(
    plan: Plan,
    own: tuple[Array, Array],
    other: tuple[Array, Array],
    lse_BNT: Float[Array, "B N T"],
    delta_BNT: Float[Array, "B N T"],
) -> Sequence[Array]:
    """Of keys and values, and dS if it is kept, [B N, tiles, keys, queries]; or of queries.

    Keys and values are [B, T, K, H or U], queries and gradients of results [B, T, N, H or
    U], whichever is whose `own`. `lse` is minus the log-sum-exp over `scale`, and minus
    infinity for rows that fill up the last block; `delta` is minus the sum of result and
    gradient.
    """
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in own]
    if not plan.keys:
        results = results[:1]
    if plan.keep:
        tiles = plan.B * plan.queries, plan.score_tiles, STEP, STEP
        results.append(jax.ShapeDtypeStruct(tiles, plan.dtype))
    of_rows = (STAGES if plan.keys else 2, HALF)

    def kernel(*refs):
        def scope(*buffers):
            _Gradients(plan, refs, *buffers).run()

        pl.run_scoped(
            scope,
            [smem((OWN, size), plan.dtype) for size in (plan.H, plan.U)],
            [smem((STAGES, STEP, size), plan.dtype) for size in (plan.H, plan.U)],
            [plgpu.SMEM(of_rows, jnp.float32)] * 2,
            smem((2 if plan.keep else 0, HALF, STEP), plan.dtype),
            plgpu.Barrier(num_arrivals=2 if plan.keys else 2 + 2 * 2),
            plgpu.Barrier(num_arrivals=4 if plan.keys else 2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            collective_axes="warpgroup",
        )

    operands = *own, *other, lse_BNT, delta_BNT
    return call(kernel, results, operands, plan.B * plan.heads * plan.blocks)


class _Gradients:
    """One block of the grid."""

    def __init__(self, plan: Plan, refs, own, other, of_rows, out, arrived, full, free):
        self.plan, self.arrived, self.ring = plan, arrived, Ring(STAGES, full, free)
        self.own, self.other, self.of_rows = refs[:2], refs[2:4], refs[4:6]
        self.results = refs[6:]
        self.own_in, self.other_in, self.of_rows_in, self.out = own, other, of_rows, out
        # Blocks with the most to do come first: the first keys, the last queries.
        head, block = in_order(plan.B * plan.heads, plan.blocks)
        self.batch, self.head = lax.div(head, plan.heads), lax.rem(head, plan.heads)
        self.block = block if plan.keys else plan.blocks - 1 - block
        # Steps of the other side that any of the own see, or are seen by.
        diagonal = self.block * (OWN // STEP)
        self.begin = diagonal if plan.keys else 0
        self.end = plan.steps
        if not plan.keys:
            self.end = jnp.minimum(diagonal + OWN // STEP, plan.steps)
        self.each = self.end - self.begin

    def run(self) -> None:
        """What the warpgroups do."""
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            self.copy_own()
            lax.fori_loop(0, self.plan.streams * self.each, self.copy_step, None)

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            sizes = (self.plan.H, self.plan.U) if self.plan.keys else (self.plan.H,)
            sums = [plgpu.ACC((HALF, size), jnp.float32) for size in sizes]
            pl.run_scoped(self.multiply, *sums)

    def copy_own(self) -> None:
        """Copies in what the block owns; of queries, what goes with them, too."""
        first = self.block * OWN
        for x, landing in zip(self.own, self.own_in):
            here = x.at[self.batch, _rows(first, OWN), self.head]
            plgpu.copy_gmem_to_smem(here, landing, self.arrived)
        if self.plan.keys:
            return
        for x, landing in zip(self.of_rows, self.of_rows_in):
            for half in range(2):
                rows = _rows(first + half * HALF, HALF)
                here = x.at[self.batch, self.head, rows]
                plgpu.copy_gmem_to_smem(here, landing.at[half], self.arrived)

    def copy_step(self, step, _) -> None:
        """Copies in a step of what streams by."""
        plan, slot = self.plan, self.ring.to_fill(step)
        full, stream = self.ring.full.at[slot], lax.div(step, self.each)
        rows = _rows((self.begin + step - stream * self.each) * STEP, STEP)
        head = lax.div(self.head, plan.G)
        if plan.keys:
            head = self.head * plan.G + stream
        for x, landing in zip(self.other, self.other_in):
            here = x.at[self.batch, rows, head]
            plgpu.copy_gmem_to_smem(here, landing.at[slot], full)
        if plan.keys:
            for x, landing in zip(self.of_rows, self.of_rows_in):
                here = x.at[self.batch, head, rows]
                plgpu.copy_gmem_to_smem(here, landing.at[slot], full)

    def multiply(self, *sums) -> None:
        """Adds up a warpgroup's gradients and stores them."""
        plgpu.barrier_wait(self.arrived)
        diagonal = self.block * (OWN // STEP) + lax.axis_index("warpgroup")
        diagonal = jnp.minimum(diagonal, self.end)
        after = jnp.minimum(diagonal + 1, self.end)

        def one_head(stream, _):
            def ready(i):
                """The step of the ring, when its buffers are full."""
                step = stream * self.each + i - self.begin
                self.ring.filled(step)
                return step

            def skip(i, _):
                self.ring.release(ready(i))

            def add(masked: bool, i, _):
                step = ready(i)
                self.add(sums, stream, i, self.ring.slot(step), masked)
                self.ring.release(step)

            seen, partly = (functools.partial(add, masked) for masked in (False, True))
            before, behind = (skip, seen) if self.plan.keys else (seen, skip)
            lax.fori_loop(self.begin, diagonal, before, None)
            lax.fori_loop(diagonal, after, partly, None)
            lax.fori_loop(after, self.end, behind, None)

        lax.fori_loop(0, self.plan.streams, one_head, None)
        self.store([total[...] for total in sums])

    def add(self, sums, stream, i, slot, masked: bool) -> None:
        """Adds one step to the sums.

        What a step needs leaves few of a thread's 240 registers: 160 are sums, 32 scores or
        dP, 32 weights, rounded for the product with gradients, and in float16 for dS.
        """
        plan, mine = self.plan, pl.ds(lax.axis_index("warpgroup") * HALF, HALF)
        first, second = (x.at[mine] for x in self.own_in)
        third, fourth = (x.at[slot] for x in self.other_in)
        total, *of_values = sums
        lse, delta = (self.spread(x, slot) for x in self.of_rows_in)
        # scale (q k - lse / scale); e to that as a power of two.
        scores = pl.run_state(lambda acc: plgpu.wgmma(acc, first, third.T))(
            plgpu.ACC.init(lse())
        )
        p = jnp.exp2(scores * (plan.scale * math.log2(math.e)))
        if masked:
            own, other = (
                plgpu.broadcasted_iota(
                    jnp.int32, p.shape, axis, layout=plgpu.Layout.WGMMA
                )
                for axis in range(2)
            )
            p = jnp.where(other >= own if plan.keys else own >= other, p, 0.0)
        for values in of_values:
            plgpu.wgmma(values, p.astype(plan.dtype), fourth)
        if plan.keys:  # the barrier keeps pairs of them in one register
            p = lax.optimization_barrier(p.astype(jnp.float16))

        def product(acc):
            plgpu.wgmma(acc, second, fourth.T)
            return acc[...]

        dp = pl.run_scoped(product, plgpu.ACC(p.shape, jnp.float32))
        ds = (p.astype(jnp.float32) * (dp + delta())).astype(plan.dtype)
        plgpu.wgmma(total, ds, third)
        if plan.keep:
            self.keep(ds, stream, i)
        plgpu.wgmma_wait(0)

    def spread(self, of_rows, slot) -> Callable[[], Array]:
        """What goes with queries, for each pair of an own row and another; in registers
        not before it is needed.
        """

        def spread():
            axis, at = (1, slot) if self.plan.keys else (0, lax.axis_index("warpgroup"))
            layout = plgpu.Layout.WGMMA.reduce(1 - axis)
            here = load(of_rows.at[at], layout=layout)
            return lax.broadcast_in_dim(here, (HALF, STEP), [axis])

        return spread

    def keep(self, ds, stream, i) -> None:
        """Writes dS of a step."""
        warpgroup = lax.axis_index("warpgroup")
        head = (self.batch * self.plan.heads + self.head) * self.plan.G + stream
        tile = triangle(i) + self.block * (OWN // STEP) + warpgroup
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.out[warpgroup] = ds
        plgpu.commit_smem()
        there = self.results[-1].at[head, tile]
        plgpu.copy_smem_to_gmem(self.out.at[warpgroup], there)

    def store(self, totals) -> None:
        """Writes a warpgroup's gradients, by way of where its own rows were."""
        first = lax.axis_index("warpgroup") * HALF
        rows = _rows(self.block * OWN + first, HALF)
        totals[0] *= self.plan.scale
        for total, x, result in zip(totals, self.own_in, self.results):
            mine = x.at[pl.ds(first, HALF)]
            mine[...] = total.astype(self.plan.dtype)
            plgpu.commit_smem()
            there = result.at[self.batch, rows, self.head]
            plgpu.copy_smem_to_gmem(mine, there)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _rows(first, count: int):
    return pl.ds(pl.multiple_of(first, STEP), count)
