"""Absorbed MLA decoding on TPUs: one pass over each row's latents for all heads.

The cache stays where it is: the kernel takes it whole, with all layers, and copies the
blocks of one layer that a row has filled, several copies ahead of the arithmetic and on
into the next row's blocks. The last block of a row is copied in pieces of 128 slots, the
smallest that a TPU's tiles allow, so that a short row costs what a short row costs.

Letters: B rows, T new tokens, N heads, M = T N queries of a row, L latent, R rope, Y
layers, X rows or pages of the cache, Z slots of one, P pages of a row, S slots of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode import work
from pallas_kernels.mla_decode.work import PIECE, block_slots

BUFFERS = 4  # blocks in VMEM: one in use, the others on their way
MOST_QUERIES = 512  # M: what the default VMEM of a v5e or v5p holds in float32
Ref = Any  # what a kernel is handed for an array
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # below any score, and no infinity


def lacks(q_latent: Array, q_rope: Array, latent: Array, pages: Array | None) -> str:
    """Why these operands are not for `decode`; empty where they are."""
    (_, T, N, L), R, Z = q_latent.shape, q_rope.shape[-1], latent.shape[2]
    block = block_slots(latent.dtype)
    if (
        latent.dtype not in (jnp.bfloat16, jnp.float32)
        or q_latent.dtype != latent.dtype
    ):
        return f"{q_latent.dtype} queries on a cache of {latent.dtype}"
    if L % 128 or R % 16 or L > 512 or R > 128:
        return f"sizes {L} and {R}: not multiples of 128 and 16 up to 512 and 128"
    if Z % PIECE:
        return f"rows or pages of {Z} slots: {PIECE} has to divide them"
    if pages is not None and block % Z and Z % block:
        return f"pages of {Z} slots: neither divides nor is divided by {block}"
    if T * N > MOST_QUERIES:
        return f"{T} tokens of {N} heads: more than {MOST_QUERIES} queries a row"
    return ""


def decode(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
    rope_YXRZ: Float[Array, "Y X R Z"],
    lengths_B: Int[Array, " B"],
    layer: Int[Array, ""],
    pages_BP: Int[Array, "B P"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N L"], Float[Array, "B T N"]]:
    """See `pallas_kernels.mla_decode.api`."""
    B, T, N, L = q_BTNL.shape
    R, Z, M = q_BTNR.shape[-1], latent_YXZL.shape[2], T * N
    dtype, block = latent_YXZL.dtype, block_slots(latent_YXZL.dtype)
    slots = Z if pages_BP is None else Z * pages_BP.shape[1]
    if pages_BP is None:  # a row is one page
        pages_BP = jnp.arange(B, dtype=jnp.int32)[:, None]
    cores = 2 if B % 2 == 0 else 1  # those of a v5p share the rows
    rows = B // cores
    of_row = lambda core, row, *_: (core * rows + row, 0, 0)  # noqa: E731
    estimate = work.count(
        [slots] * B, tokens=T, heads=N, sizes=(L, R), dtype=dtype
    ).estimate()
    out_BML, lse_B1M = pl.pallas_call(
        functools.partial(_kernel, tokens=T, page=Z, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, rows),
            in_specs=[
                pl.BlockSpec((None, M, L), of_row),
                pl.BlockSpec((None, M, R), of_row),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((None, M, L), of_row),
                pl.BlockSpec((None, 1, M), of_row),
            ],
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, block, L), dtype),
                pltpu.VMEM((BUFFERS, R, block), dtype),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.VMEM((M, L), jnp.float32),
                pltpu.VMEM((M, 1), jnp.float32),
                pltpu.VMEM((M, 1), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, M, L), dtype),
            jax.ShapeDtypeStruct((B, 1, M), jnp.float32),
        ],
        cost_estimate=estimate,
        name="mla_decode",
    )(
        jnp.clip(lengths_B, 0, slots).astype(jnp.int32),
        jnp.reshape(layer, 1).astype(jnp.int32),
        jnp.clip(pages_BP, 0, latent_YXZL.shape[1] - 1).astype(jnp.int32),
        q_BTNL.reshape(B, M, L),
        q_BTNR.reshape(B, M, R),
        latent_YXZL,
        rope_YXRZ,
    )
    return out_BML.reshape(B, T, N, L), lse_B1M.reshape(B, T, N)


def lacks_append(rope: Array, new: Array) -> str:
    """Why these operands are not for `append`; empty where they are."""
    R, Z = rope.shape[2:]
    if rope.dtype not in (jnp.bfloat16, jnp.float32) or R % 16 or Z % PIECE:
        return (
            f"a cache of {rope.dtype} {rope.shape}: sizes not multiples of 16, {PIECE}"
        )
    if new.shape[1] > PIECE:
        return f"{new.shape[1]} tokens at once: more than {PIECE}"
    return ""


def append(
    rope_YXRZ: Float[Array, "Y X R Z"],
    new_BTR: Float[Array, "B T R"],
    first_B: Int[Array, " B"],
    layer: Int[Array, ""],
    pages_BP: Int[Array, "B P"] | None,
) -> Float[Array, "Y X R Z"]:
    """See `pallas_kernels.mla_decode.api`: tiles of 128 slots, read, changed, written."""
    (B, T, R), (_, X, _, Z) = new_BTR.shape, rope_YXRZ.shape
    if pages_BP is None:  # a row is one page
        pages_BP = jnp.arange(B, dtype=jnp.int32)[:, None]
    tiles = Z * pages_BP.shape[1] // PIECE  # of a row

    def tile(row, number, first_ref):
        """The row's tile that step `number` changes; behind the end, the last."""
        return jnp.clip(lax.div(first_ref[row], PIECE) + number, 0, tiles - 1)

    def place(row, number, first_ref, layer_ref, pages_ref):
        slot = tile(row, number, first_ref) * PIECE
        page = jnp.clip(pages_ref[row, lax.div(slot, Z)], 0, X - 1)
        return layer_ref[0], page, 0, lax.div(lax.rem(slot, Z), PIECE)

    def kernel(first_ref, layer_ref, pages_ref, new_ref, old_ref, out_ref):
        row, number = pl.program_id(0), pl.program_id(1)
        here = tile(row, number, first_ref)

        # Where all tokens are in one tile, the second step finds its work done.
        @pl.when((number == 0) | (here != tile(row, number - 1, first_ref)))
        def _():
            entries = old_ref[...]
            slot = lax.broadcasted_iota(jnp.int32, entries.shape, 1) + here * PIECE
            for token in range(T):
                new = new_ref[:, token : token + 1]
                entries = jnp.where(slot == first_ref[row] + token, new, entries)
            out_ref[...] = entries

    steps = 1 if T == 1 else 2  # tiles that tokens may fall into
    entries = pl.BlockSpec((None, None, R, PIECE), place)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, steps),
            in_specs=[pl.BlockSpec((None, R, T), lambda row, *_: (row, 0, 0)), entries],
            out_specs=entries,
        ),
        out_shape=jax.ShapeDtypeStruct(rope_YXRZ.shape, rope_YXRZ.dtype),
        input_output_aliases={4: 0},
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * B * steps * R * PIECE * rope_YXRZ.dtype.itemsize,
        ),
        name="mla_append",
    )(
        first_B.astype(jnp.int32),
        jnp.reshape(layer, 1).astype(jnp.int32),
        pages_BP.astype(jnp.int32),
        new_BTR.swapaxes(1, 2).astype(rope_YXRZ.dtype),
        rope_YXRZ,
    )


class _Rows(NamedTuple):
    """The rows of one core of the chip: `first`, and those up to `end`."""

    lengths: Ref  # of all rows, in SMEM
    first: Array
    end: Array
    block: int

    def blocks(self, row: Array) -> Array:
        """Blocks of a row; an empty one has one, of which nothing is copied."""
        return jnp.maximum(lax.div(self.lengths[row] + (self.block - 1), self.block), 1)


class _Cache(NamedTuple):
    """One layer of the cache in HBM, and the buffers in VMEM that its blocks come to."""

    layer: Ref
    pages: Ref
    latent: Ref
    rope: Ref
    latents: Ref
    ropes: Ref
    semaphores: Ref
    page: int  # slots of one

    def start(self, rows: _Rows, row: Array, index: Array, buffer: Array) -> None:
        """Begins to copy block `index` of `row` into `buffer`."""
        self._each_copy(rows, row, index, buffer, lambda copy: copy.start())

    def wait(self, rows: _Rows, row: Array, index: Array, buffer: Array) -> None:
        """Waits until that is there."""
        self._each_copy(rows, row, index, buffer, lambda copy: copy.wait())

    def _each_copy(self, rows, row, index, buffer, act) -> None:
        """A run of slots that lie side by side at once, if it is filled; the last one of a
        row piece by piece.
        """
        run = min(self.page, rows.block)
        for part in range(rows.block // run):
            start = index * rows.block + part * run
            filled = rows.lengths[row] - start
            copy = functools.partial(self._copy, row, start, buffer, part * run, act)
            whole = filled > run - PIECE
            pl.when(whole)(functools.partial(copy, 0, run))
            for offset in range(0, run - PIECE, PIECE):
                here = ~whole & (filled > offset)
                pl.when(here)(functools.partial(copy, offset, PIECE))

    def _copy(self, row, start, buffer, place, act, offset, count) -> None:
        """`act` on both copies of `count` slots of a row, `offset` behind `start`; they go
        to `place` and on in the buffer.
        """
        layer, page = self.layer[0], self.pages[row, lax.div(start, self.page)]
        slot = pl.multiple_of(lax.rem(start, self.page) + offset, PIECE)
        here, there = pl.ds(slot, count), pl.ds(place + offset, count)
        for source, target in [
            (self.latent.at[layer, page, here], self.latents.at[buffer, there]),
            (self.rope.at[layer, page, :, here], self.ropes.at[buffer, :, there]),
        ]:
            act(pltpu.make_async_copy(source, target, self.semaphores.at[buffer]))


class _Ahead(NamedTuple):
    """What is copied next, in SMEM: the row, the block of it, and how many were before."""

    place: Ref

    def begin(self, rows: _Rows, cache: _Cache) -> None:
        """Fills all buffers but one."""
        self.place[0], self.place[1], self.place[2] = rows.first, 0, 0
        for _ in range(BUFFERS - 1):
            self.next(rows, cache)

    def next(self, rows: _Rows, cache: _Cache) -> None:
        """Starts to copy one more block, if there is one, and steps on."""
        row, index, number = self.place[0], self.place[1], self.place[2]

        @pl.when(row < rows.end)
        def _():
            cache.start(rows, row, index, lax.rem(number, BUFFERS))
            last = index + 1 == rows.blocks(row)
            self.place[0] = jnp.where(last, row + 1, row)
            self.place[1] = jnp.where(last, 0, index + 1)

        self.place[2] = number + 1

    def oldest(self) -> Array:
        """The buffer whose copies were started first."""
        return lax.rem(self.place[2] - (BUFFERS - 1), BUFFERS)


class _Softmax(NamedTuple):
    """The sums that blocks are taken into one by one, for each query."""

    sums: Ref  # [M, L], of exp(score - highest) times latent
    highest: Ref  # [M, 1]
    total: Ref  # [M, 1], of exp(score - highest)

    def begin(self) -> None:
        """Nothing seen."""
        self.sums[...] = jnp.zeros_like(self.sums)
        self.highest[...] = jnp.full_like(self.highest, LOWEST)
        self.total[...] = jnp.zeros_like(self.total)

    def results(self) -> tuple[Array, Array]:
        """The mean [M, L] and the log-sum-exp [M, 1]; zeros and -inf where nothing was
        seen.
        """
        some = self.total[...] > 0
        share = 1 / jnp.where(some, self.total[...], 1)
        lse = jnp.where(some, self.highest[...] - jnp.log(share), -jnp.inf)
        return self.sums[...] * share, lse


def _kernel(
    lengths,
    layer,
    pages,
    q_ref,
    q_rope_ref,
    latent,
    rope,
    out_ref,
    lse_ref,
    latents,
    ropes,
    semaphores,
    place,
    *sums,
    tokens: int,
    page: int,
    scale: float,
):
    """One row. Copies run ahead into the rows that come after it on the same core."""
    core, count, block = pl.program_id(0), pl.num_programs(1), latents.shape[1]
    rows = _Rows(lengths, core * count, (core + 1) * count, block)
    cache = _Cache(layer, pages, latent, rope, latents, ropes, semaphores, page)
    ahead, softmax = _Ahead(place), _Softmax(*sums)
    row = rows.first + pl.program_id(1)
    pl.when(pl.program_id(1) == 0)(lambda: ahead.begin(rows, cache))
    softmax.begin()

    def step(index, _):
        buffer = ahead.oldest()
        ahead.next(rows, cache)  # into the buffer of the step before
        cache.wait(rows, row, index, buffer)
        attend = functools.partial(
            _attend,
            q_ref,
            q_rope_ref,
            latents.at[buffer],
            ropes.at[buffer],
            softmax,
            scale=scale,
            tokens=tokens,
        )
        # By the last token, from this block's first slot on:
        seen = lengths[row] - index * block
        whole = seen >= block + tokens - 1
        pl.when(whole)(functools.partial(attend, None))
        pl.when(~whole & (seen > 0))(functools.partial(attend, seen))

    lax.fori_loop(0, rows.blocks(row), step, None)
    mean, lse = softmax.results()
    out_ref[...] = mean.astype(out_ref.dtype)
    lse_ref[...] = _as_row(lse)


def _attend(q_ref, q_rope_ref, latent, rope, softmax, seen, *, scale, tokens):
    """Takes one block into the running softmax; `seen` slots of it, or all (None)."""
    c_SL, (sums, highest, total) = latent[...], softmax
    product = functools.partial(
        lax.dot_general,
        preferred_element_type=jnp.float32,
        precision="highest" if c_SL.dtype == jnp.float32 else None,
    )
    scores_MS = product(q_ref[...], c_SL, (((1,), (1,)), ((), ())))
    scores_MS += product(q_rope_ref[...], rope[...], (((1,), (0,)), ((), ())))
    scores_MS *= scale
    if seen is not None:
        slot = lax.broadcasted_iota(jnp.int32, scores_MS.shape, 1)
        query = lax.broadcasted_iota(jnp.int32, scores_MS.shape, 0)
        token = lax.div(query, scores_MS.shape[0] // tokens)
        visible = slot < seen - (tokens - 1) + token
        scores_MS = jnp.where(visible, scores_MS, LOWEST)
        # What was not copied may be anything, and 0 times anything is not always 0.
        slot = lax.broadcasted_iota(jnp.int32, c_SL.shape, 0)
        c_SL = jnp.where(slot < seen, c_SL, jnp.zeros_like(c_SL))
    top = jnp.maximum(highest[...], scores_MS.max(axis=1, keepdims=True))
    weights_MS = jnp.exp(scores_MS - top)
    if seen is not None:
        weights_MS = jnp.where(visible, weights_MS, 0)
    before = jnp.exp(highest[...] - top)
    highest[...] = top
    total[...] = before * total[...] + weights_MS.sum(axis=1, keepdims=True)
    mix_ML = product(weights_MS.astype(c_SL.dtype), c_SL, (((1,), (0,)), ((), ())))
    sums[...] = before * sums[...] + mix_ML


def _as_row(x_M1: Array) -> Array:
    """[M, 1] -> [1, M]."""
    return jnp.broadcast_to(x_M1, (x_M1.shape[0], 128)).T[:1]
