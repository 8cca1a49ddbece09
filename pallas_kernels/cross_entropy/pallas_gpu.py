"""The cross-entropy and its gradient on a Hopper GPU, in Pallas Mosaic GPU.

A block has one row at a time and goes over it twice: for the largest logit and the sum of
exponentials, then for the gradient. The second time, the row comes from the L2 cache.
Chunks of it arrive in a ring of buffers, those of the next row while this one is at work.

Letters: R rows, V vocabulary, l lines of it.
"""

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


def lacks(shape: tuple[int, ...], dtype: DTypeLike, gradient: DTypeLike) -> str:
    """Why the kernel does not take this; nothing where it does."""
    if 0 in shape:
        return f"takes no empty logits ({shape})"
    if dtype != jnp.float32:
        return f"takes float32 logits ({dtype})"
    if gradient not in (jnp.bfloat16, jnp.float32):
        return f"makes gradients in bfloat16 or float32 ({gradient})"
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
    chunks, slots = lines // tall, min(SMEM // (tall * LINE * 4), 8)

    def kernel(logits, targets, weights, losses, gradient, buffer, full):
        block = lax.axis_index("block")
        own = lax.div(rows - block + BLOCKS - 1, BLOCKS)
        steps = own * 2 * chunks
        layout = plgpu.Layout.WG_STRIDED((tall, LINE), vec_size=2)

        def row_of(number):
            return block + number * BLOCKS

        def fetch(step):
            slot, row = lax.rem(step, slots), row_of(lax.div(step, 2 * chunks))
            here = pl.ds(lax.rem(step, chunks) * tall, tall)
            plgpu.copy_gmem_to_smem(
                logits.at[row, here], buffer.at[slot], full.at[slot]
            )

        def arrived(step):
            slot = lax.rem(step, slots)
            plgpu.barrier_wait(full.at[slot])
            return load(buffer.at[slot], layout=layout)

        def next_(step):
            pl.when(step + slots < steps)(lambda: fetch(step + slots))

        def one_row(number, _):
            first, row = number * 2 * chunks, row_of(number)
            target, weight = targets[row], weights[row]

            def sum_up(chunk, sums):
                largest, total = sums
                x = arrived(first + chunk)
                more = jnp.maximum(largest, jnp.max(x))
                total = total * jnp.exp(largest - more) + jnp.sum(jnp.exp(x - more))
                next_(first + chunk)  # both sums wait for all threads to have read
                return more, total

            start = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
            largest, total = lax.fori_loop(0, chunks, sum_up, start)
            share = weight / total

            def write(chunk, _):
                step = first + chunks + chunk
                softmax = jnp.exp(arrived(step) - largest) * share
                here = pl.ds(chunk * tall, tall)
                gradient[row, here] = softmax.astype(dtype)
                next_(step)  # and so does a store

            lax.fori_loop(0, chunks, write, None)
            where = row, lax.div(target, LINE), lax.rem(target, LINE)
            shifted = logits[where] - largest
            losses[row] = jnp.log(total) - shifted
            gradient[where] = (jnp.exp(shifted) * share - weight).astype(dtype)

        for step in range(slots):
            pl.when(step < steps)(lambda step=step: fetch(step))
        lax.fori_loop(0, own, one_row, None)

    losses_R, gradient_RlL = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((rows, lines, LINE), dtype),
        ),
        grid=(BLOCKS,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((slots, tall, LINE), jnp.float32),
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
