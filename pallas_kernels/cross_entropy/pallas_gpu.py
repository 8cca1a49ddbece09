"""The cross-entropy and its gradient on a Hopper GPU, in Pallas Mosaic GPU.

A block has one row at a time and goes over it twice: for the largest logit and the sum of
exponentials, then for the gradient. The second time, the row comes from the L2 cache.
Chunks of it arrive in a ring of buffers, those of the next row while this one is at work.

Letters: R rows, V vocabulary, l lines of it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic import SMS, is_hopper, load

BLOCKS = 2 * SMS  # of the grid
SMEM = 104 * 2**10  # bytes of logits that a block holds
LINE = 256  # elements
MOST = 25  # lines of a chunk: 50 elements of a thread


def lacks(
    shape: tuple[int, ...],
    logits: DTypeLike,
    *,
    dtype: DTypeLike,
    statistics: DTypeLike,
) -> str:
    """Why the kernel does not take this; nothing where it does."""
    if 0 in shape:
        return f"takes no empty logits ({shape})"
    if logits not in (jnp.float32, jnp.float16, jnp.bfloat16):
        return f"takes logits of float32 or of 16 bits ({logits})"
    if statistics != jnp.float32:
        return f"adds up in float32 ({statistics})"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"makes gradients in bfloat16 or float32 ({dtype})"
    if shape[1] % LINE:
        return f"takes a vocabulary that {LINE} divides ({shape})"
    return "" if is_hopper() else "needs a GPU of Hopper's generation"


def cross_entropy(
    logits_RV: Float[Array, "R V"],
    targets_R: Int[Array, " R"],
    weights_R: Float[Array, " R"],
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, " R"], Float[Array, "R V"]]:
    """-log softmax(logits)[target], and weight * (softmax - one-hot)."""
    rows, lines = len(logits_RV), logits_RV.shape[1] // LINE
    tall = next(n for n in range(MOST, 0, -1) if lines % n == 0)  # of a chunk
    slots = min(SMEM // (tall * LINE * logits_RV.dtype.itemsize), 8)

    def kernel(*refs):
        _Block(rows, lines // tall, lax.axis_index("block"), *refs).run()

    losses_R, gradient_RlL = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((rows, lines, LINE), dtype),
        ),
        grid=(BLOCKS,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((slots, tall, LINE), logits_RV.dtype),
            plgpu.Barrier(num_barriers=slots),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True
        ),
    )(
        logits_RV.reshape(rows, lines, LINE),
        targets_R.astype(jnp.int32),
        weights_R.astype(jnp.float32),
    )
    return losses_R, gradient_RlL.reshape(rows, -1)


@dataclasses.dataclass(frozen=True)
class _Block:
    """One block of threads, and its rows. A row is read twice, chunk by chunk: each time
    is a step, whose chunk is copied in as many steps ahead as there are slots.
    """

    rows: int
    chunks: int  # of a row
    number: Any  # the block's
    logits: Any  # [R, lines, LINE]
    targets: Any
    weights: Any
    losses: Any
    gradient: Any
    buffer: Any  # [slots, lines of a chunk, LINE]
    full: Any

    @property
    def slots(self) -> int:
        return self.buffer.shape[0]

    @property
    def tall(self) -> int:
        """Lines of a chunk."""
        return self.buffer.shape[1]

    @property
    def own(self):
        """How many rows are this block's."""
        return lax.div(self.rows - self.number + BLOCKS - 1, BLOCKS)

    def row(self, number):
        """One of them, among all."""
        return self.number + number * BLOCKS

    def run(self) -> None:
        own = self.own
        steps = own * 2 * self.chunks
        for step in range(self.slots):
            pl.when(step < steps)(functools.partial(self.fetch, step))
        lax.fori_loop(0, own, functools.partial(self.do_row, steps), None)

    def fetch(self, step) -> None:
        slot = lax.rem(step, self.slots)
        row = self.row(lax.div(step, 2 * self.chunks))
        here = pl.ds(lax.rem(step, self.chunks) * self.tall, self.tall)
        plgpu.copy_gmem_to_smem(
            self.logits.at[row, here], self.buffer.at[slot], self.full.at[slot]
        )

    def arrived(self, step) -> Array:
        """A step's chunk."""
        slot = lax.rem(step, self.slots)
        plgpu.barrier_wait(self.full.at[slot])
        layout = plgpu.Layout.WG_STRIDED((self.tall, LINE), vec_size=2)
        return load(self.buffer.at[slot], layout=layout).astype(jnp.float32)

    def done(self, step, steps) -> None:
        """The next chunk may take the place of a step's: all threads have read it."""
        further = step + self.slots
        pl.when(further < steps)(lambda: self.fetch(further))

    def do_row(self, steps, number, _) -> None:
        first, row = number * 2 * self.chunks, self.row(number)
        target, weight = self.targets[row], self.weights[row]
        largest, total = self.sum_up(first, steps)
        share = weight / total
        self.write(first + self.chunks, steps, row, largest, share)
        where = row, lax.div(target, LINE), lax.rem(target, LINE)
        shifted = self.logits[where].astype(jnp.float32) - largest
        self.losses[row] = jnp.log(total) - shifted
        gradient = jnp.exp(shifted) * share - weight
        self.gradient[where] = gradient.astype(self.gradient.dtype)

    def sum_up(self, first, steps) -> tuple[Array, Array]:
        """A row's largest logit, and the sum of exponentials of the others less it."""

        def one(chunk, sums):
            largest, total = sums
            x = self.arrived(first + chunk)
            more = jnp.maximum(largest, jnp.max(x))
            total = total * jnp.exp(largest - more) + jnp.sum(jnp.exp(x - more))
            self.done(first + chunk, steps)  # both sums wait for all threads
            return more, total

        start = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
        return lax.fori_loop(0, self.chunks, one, start)

    def write(self, first, steps, row, largest, share) -> None:
        """A row's gradient, but for its target."""

        def one(chunk, _):
            step = first + chunk
            softmax = jnp.exp(self.arrived(step) - largest) * share
            here = pl.ds(chunk * self.tall, self.tall)
            self.gradient[row, here] = softmax.astype(self.gradient.dtype)
            self.done(step, steps)  # a store waits for all threads, too

        lax.fori_loop(0, self.chunks, one, None)
