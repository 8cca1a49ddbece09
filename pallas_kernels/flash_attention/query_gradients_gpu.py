"""The Hopper kernel of the queries' gradients where dS is at hand: dS times keys.

A block of the grid has 256 queries, 128 for each of two warpgroups that multiply; keys
stream by, 64 at a time, with the tiles of dS that go with them.

Letters: B batch, T length, K kv heads, N query heads, H size of queries and keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.flash_attention.gradients_gpu import (
    STEP,
    Plan,
    call,
    in_order,
    triangle,
)
from pallas_kernels.grouped_matmul.ring_gpu import Ring, smem

EACH = 2  # steps of queries of a warpgroup
OWN = 2 * EACH  # and of a block
STAGES = 4  # buffers


def query_gradients(
    plan: Plan, ds: Float[Array, "BN tiles S S"], k_BTKH: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """scale dS k, of dS as `gradients` writes it."""
    blocks = pl.cdiv(plan.steps, OWN)
    result = jax.ShapeDtypeStruct((plan.B, plan.T, plan.queries, plan.H), plan.dtype)

    def kernel(*refs):
        def scope(*buffers):
            _QueryGradients(plan, blocks, refs, *buffers).run()

        pl.run_scoped(
            scope,
            smem((STAGES, OWN, STEP, STEP), plan.dtype),
            smem((STAGES, STEP, plan.H), plan.dtype),
            plgpu.Barrier(num_arrivals=OWN + 1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="warpgroup",
        )

    (dq,) = call(kernel, [result], (ds, k_BTKH), plan.B * plan.queries * blocks)
    return dq


class _QueryGradients:
    """One block of the grid."""

    def __init__(self, plan: Plan, blocks, refs, ds_in, k_in, full, free, ended):
        self.plan, self.ring, self.ended = plan, Ring(STAGES, full, free), ended
        self.ds, self.k, self.dq = refs
        self.ds_in, self.k_in = ds_in, k_in
        self.head, block = in_order(plan.B * plan.queries, blocks)
        self.batch = lax.div(self.head, plan.queries)
        self.query_head = lax.rem(self.head, plan.queries)
        self.first = (blocks - 1 - block) * OWN  # of its steps: long ones first
        self.end = jnp.minimum(self.first + OWN, plan.steps)  # of the steps of keys

    def run(self) -> None:
        """What the warpgroups do."""
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            lax.fori_loop(0, self.end, self.copy, None)

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            sums = [plgpu.ACC((STEP, self.plan.H), jnp.float32)] * EACH
            pl.run_scoped(self.multiply, *sums)

    def copy(self, j, _) -> None:
        """Copies in a step of keys and its tiles of dS."""
        slot = self.ring.to_fill(j)
        full = self.ring.full.at[slot]
        head = lax.div(self.query_head, self.plan.G)
        k = self.k.at[self.batch, _rows(j), head]
        plgpu.copy_gmem_to_smem(k, self.k_in.at[slot], full)
        for number in range(OWN):
            i = self.first + number
            # Of keys that come later there is none, and past the end: any, for nobody.
            tile = jnp.minimum(
                triangle(i) + jnp.minimum(i, j), self.plan.score_tiles - 1
            )
            ds = self.ds.at[self.head, tile]
            plgpu.copy_gmem_to_smem(ds, self.ds_in.at[slot, number], full)

    def multiply(self, *sums) -> None:
        """Adds up a warpgroup's gradients and stores them."""
        first = EACH * lax.axis_index("warpgroup")

        def add(numbers, j, _):
            slot = self.ring.filled(j)
            for number in numbers:
                ds = self.ds_in.at[slot, first + number]
                plgpu.wgmma(sums[number], ds.T, self.k_in.at[slot])
            plgpu.wgmma_wait(len(numbers))

            @pl.when(j > 0)
            def _():
                self.ring.release(j - 1)

        def skip(j, _):
            self.ring.filled(j)
            self.ring.release(j)

        begin = 0
        for number in range(EACH):  # a step of queries sees keys up to its own
            after = jnp.minimum(self.first + first + number + 1, self.end)
            some = functools.partial(add, range(number, EACH))
            lax.fori_loop(begin, after, some, None)
            begin = after
        plgpu.wgmma_wait(0)
        self.ring.release(begin - 1)
        lax.fori_loop(begin, self.end, skip, None)
        # Results leave by way of where keys were: of the other warpgroup's, too.
        plgpu.barrier_arrive(self.ended)
        plgpu.barrier_wait(self.ended)
        for number, total in enumerate(sums):
            self.store(first + number, total[...])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def store(self, number, total) -> None:
        """Writes the gradients of a step."""
        way = self.k_in.at[number]
        way[...] = (total * self.plan.scale).astype(self.plan.dtype)
        plgpu.commit_smem()
        there = self.dq.at[self.batch, _rows(self.first + number), self.query_head]
        plgpu.copy_smem_to_gmem(way, there)


def _rows(step):
    return pl.ds(pl.multiple_of(step * STEP, STEP), STEP)
