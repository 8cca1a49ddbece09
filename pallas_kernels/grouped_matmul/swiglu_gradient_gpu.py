"""The Hopper kernel of the gradient through a product's rows and the SwiGLU before it.

The gradient of SwiGLU's result never leaves the registers that it is summed in: each tile
of it meets the same tile of both products there. It would be written and read again, and
the pass that did so took as long as the product.

Letters: M rows, I inner (SwiGLU's width), O outer, G groups, A tiles in a row of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.layers import Matrices
from pallas_kernels.grouped_matmul.ring_gpu import (
    ALIGN,
    CHUNK_ROWS,
    call,
    chunks,
    padded,
    run,
    smem,
    smem_of_any_row,
    to_be_free,
)
from pallas_kernels.grouped_matmul.rows_gpu import _lying, _Rows, _RowsPlan
from pallas_kernels.grouped_matmul.tiles_gpu import LINE, Tiles, row_tiles
from pallas_kernels.mosaic import copy_rows, load

WIDTH = 32  # columns of a chunk
SLOTS = 4  # chunks of both products at once, a warpgroup
LANES = 8  # columns of a row's sum: what one matrix unit's tile has


class _Plan(_RowsPlan):
    """The same, with three outputs."""

    @property
    def outputs(self) -> int:
        return 3


def swiglu_gradient(
    dy_MO: Float[Array, "M O"],
    w_GOI: Matrices,
    gated_MI: Float[Array, "M I"],
    lifted_MI: Float[Array, "M I"],
    scale_M: Float[Array, " M"],
    sizes_G: Int[Array, " G"],
    *,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "M I"], Float[Array, "M I"], Float[Array, " M"]]:
    """Of silu(gated) * lifted * scale, whose gradient is dy[m] @ w[group of m]: the
    gradients of gated, lifted and scale. bfloat16, the last in float32; zeros for rows of
    no group.
    """
    rows, inner = gated_MI.shape
    dy, gated, lifted = (padded(a, ALIGN, LINE) for a in (dy_MO, gated_MI, lifted_MI))
    w, first = _lying(w_GOI)
    (M, outer), groups, dtype = dy.shape, sizes_G.shape[0], dy.dtype
    tiles = tiles or row_tiles(M, groups, gated.shape[1], outer, turned=False)
    tiles = tiles._replace(stages=3)  # the products' chunks take the memory of a stage
    plan = _Plan(
        *(tiles, False, 1, 1, False, False),
        *(M, outer, gated.shape[1], groups, dtype),
    )
    scale = jnp.pad(scale_M.astype(jnp.float32), (0, M - rows + tiles.all_rows))

    def kernel(*refs):
        def scope(*buffers):
            block = _SwigluGradient(plan, refs, *buffers)
            run(block, tiles.blocks)

        pl.run_scoped(
            scope,
            smem_of_any_row((tiles.stages, tiles.rows), dtype, LINE),
            smem((tiles.stages, LINE, tiles.columns), dtype),
            smem_of_any_row((2, SLOTS, CHUNK_ROWS * WIDTH // LINE), dtype, WIDTH),
            smem_of_any_row((2, SLOTS, CHUNK_ROWS * WIDTH // LINE), dtype, WIDTH),
            plgpu.SMEM((2, CHUNK_ROWS, LANES), jnp.float32),
            plgpu.Barrier(num_arrivals=plan.copies, num_barriers=tiles.stages),
            to_be_free(tiles.stages, pair=tiles.pair),
            plgpu.Barrier(num_arrivals=2, num_barriers=2 * SLOTS),
            collective_axes="warpgroup",
        )

    operands = (*plan.schedule(sizes_G), first, dy, w)
    out = jax.ShapeDtypeStruct(gated.shape, dtype)
    sums = jax.ShapeDtypeStruct((plan.across, M, LANES), jnp.float32)
    dgated, dlifted, dscale_AML = call(
        kernel, [out, out, sums], *operands, gated, lifted, scale, blocks=tiles.blocks
    )
    own = (slice(rows), slice(inner))
    return dgated[own], dlifted[own], dscale_AML.sum((0, 2))[:rows]


class _SwigluGradient(_Rows):
    """One block of the kernel: what the kernel of rows does but for the end of a tile."""

    def __init__(self, plan, refs, x_in, w_in, gated, lifted, sums, full, free, here):
        super().__init__(plan, refs, x_in, w_in, (None,) * 2, full, free)
        self.gated, self.lifted, self.scale = self.scales
        self.chunks = (gated, lifted)  # each as two views: tiled, flat
        self.sums, self.here = sums, here
        self.places = chunks(plan.tiles.half, plan.width, WIDTH)

    def multiply_tile(self, wave, step):
        """Makes a tile of what is copied in, and stores it: sums are float32, and two
        tiles' are too many for the registers.
        """
        start, count, column, steps = self.part(wave)

        @pl.when(count > 0)
        def _():
            self.before_tile(start, column)
            shape = self.plan.tiles.half, self.plan.tiles.columns
            total, _ = self.ring.sum_up(self.multiply, steps, step, shape)
            self.store(total, start, count, column)

        @pl.when(count == 0)
        def _():
            self.ring.skip(steps, step)

        return step + steps

    def before_tile(self, start, column) -> None:
        """Copies in the first chunks of both products, which arrive while a tile is
        multiplied.
        """
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(min(SLOTS, len(self.places))):
            self.fetch(number, start, column)

    def fetch(self, number: int, start, column) -> None:
        """Copies in a chunk of both products."""
        r, c, _ = self.places[number]
        slot = lax.axis_index("warpgroup"), number % SLOTS
        full = self.here.at[slot[0] * SLOTS + slot[1]]
        for product, (_, flat) in zip((self.gated, self.lifted), self.chunks):
            there = product.at[pl.ds(start + r, CHUNK_ROWS), pl.ds(column + c, WIDTH)]
            plgpu.copy_gmem_to_smem(there, flat.at[slot], full)

    def store(self, total, start, count, column) -> None:
        """Writes both gradients over the products, and sends them from there."""
        warpgroup = lax.axis_index("warpgroup")
        further, sums = len(self.places) - SLOTS // 2, None
        for number, (r, c, _) in enumerate(self.places):
            slot = warpgroup, number % SLOTS
            if SLOTS // 2 <= number < further:  # where one has left two chunks ago
                plgpu.wait_smem_to_gmem(SLOTS // 2 - 1, wait_read_only=True)
                self.fetch(number + SLOTS // 2, start, column)
            plgpu.barrier_wait(self.here.at[warpgroup * SLOTS + number % SLOTS])
            tiled = [views[0].at[slot] for views in self.chunks]
            dh = total[r : r + CHUNK_ROWS, c : c + WIDTH]
            products = [chunk[...].astype(jnp.float32) for chunk in tiled]
            scale = load(
                self.scale.at[pl.ds(start + r, CHUNK_ROWS)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            *gradients, share = _backward(dh, *products, scale)
            # Column after column, which takes no exchange between lanes.
            parts = [share[:, i : i + LANES] for i in range(0, WIDTH, LANES)]
            sums = sum(parts[1:], parts[0]) if c == 0 else sum(parts, sums)
            for chunk, gradient in zip(tiled, gradients):
                chunk[...] = gradient.astype(chunk.dtype)
            if c + WIDTH == self.plan.width:
                self.sums[warpgroup] = sums
            plgpu.commit_smem()
            rows = start + r, jnp.clip(count - r, 0, CHUNK_ROWS)
            columns = pl.ds(column + c, WIDTH)
            for y, (_, flat) in zip(self.ys, self.chunks):
                copy_rows(flat.at[slot], y.at[:, columns], *rows)
            if c + WIDTH == self.plan.width:
                across = lax.div(column, self.plan.width)
                copy_rows(self.sums.at[warpgroup], self.ys[2].at[across], *rows)
            plgpu.commit_smem_to_gmem_group()


def _backward(dh, gated, lifted, scale):
    """The gradients of gated and lifted, and what the scale's is the sum of."""
    # As where SwiGLU is made: no quotient.
    sigmoid = lax.rsqrt(1 + jnp.exp(-gated)) ** 2
    silu = gated * sigmoid
    share = dh * silu * lifted
    dh = dh * lax.broadcast_in_dim(scale, dh.shape, [0])
    return dh * lifted * (sigmoid + silu * (1 - sigmoid)), dh * silu, share
