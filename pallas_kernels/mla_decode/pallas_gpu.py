"""Absorbed MLA decoding for Hopper GPUs, in Pallas Mosaic GPU.

A tile is up to 64 queries of a row, a block 64 slots of its cache. One block of threads
takes a tile through the stretches of rows that `schedule_gpu` gives its part; a stretch
that is not a whole row leaves a piece for `combine_gpu`. Its four warpgroups:

    values, twice  half of the sum's columns each: acc = factor acc + weights @ latents
    weights        scores = queries @ keys; weights = 2 ** (scores - highest so far)
    copies         the cache to shared memory, and before that to the L2 cache

Shared memory has room for the queries (72 KB) and two blocks (of 72 KB, keys and values in
one), so blocks are worked on in pairs. A warpgroup cannot go on while its products wait
for their turn: the first block's weights are found between the quarters of the second's
scores; under the first's values, the second's weights; under the second's values come the
next pair's scores. `benchmarks/mla_decode.md` says what each of the choices here is worth.

Two blocks of threads that share a row, for two of its tiles, form a cluster: each copies
half of a block, to both.

Letters: B rows, T new tokens, N heads, L latent, R rope, Y layers, X rows or pages of the
cache, Z slots of one, P pages of a row; M = T N queries of a row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm, vector
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mla_decode.combine_gpu import LOG2E, LOWEST, combine
from pallas_kernels.mla_decode.schedule_gpu import (
    BLOCK,
    Share,
    blocks_of,
    hidden,
    share,
)
from pallas_kernels.mosaic import SMS, is_hopper, load

TALL = 64  # queries of a tile
L, R = 512, 64
HALF, QUARTER = L // 2, L // 4
QUARTERS = (
    (0, 0),
    (0, 1),
    (1, 0),
    (1, 1),
)  # (which of a half, half): as they are freed
SLOTS = 2  # blocks in shared memory
ROPE = 4 * SLOTS  # its barrier, behind those of the quarters
GROWTH = 8  # a row's highest score may grow so much, in powers of 2, before it counts
REGISTERS = {"values": 176, "weights": 136, "copies": 24}  # 512 with values twice
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
MATRIX = plgpu.Layout.WGMMA
COLUMN = MATRIX.reduce(1)
SCORES = plgpu.ACC((TALL, BLOCK), jnp.float32)


def lacks(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
) -> str:
    """Why the kernel does not take these, or nothing."""
    dtypes = {x.dtype.name for x in (q_BTNL, q_BTNR, latent_YXZL)}
    if dtypes != {"bfloat16"}:
        return f"takes bfloat16, not {', '.join(sorted(dtypes))}"
    return lacks_sizes(q_BTNL, q_BTNR, latent_YXZL)


def lacks_sizes(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
) -> str:
    """The same, whatever the dtypes."""
    _, T, N, size = q_BTNL.shape
    if (size, q_BTNR.shape[-1]) != (L, R):
        return f"takes sizes {L} and {R}, not {size} and {q_BTNR.shape[-1]}"
    if latent_YXZL.shape[2] % BLOCK:
        return (
            f"rows or pages of {latent_YXZL.shape[2]} slots, not multiples of {BLOCK}"
        )
    tiles = -(-T * N // TALL)
    if T * N % (8 * tiles) or tiles > SMS:
        return f"{T} tokens of {N} heads are no equal tiles of 8 to {TALL} queries"
    return "" if is_hopper() else "is for GPUs of Hopper's generation"


def decode(
    q_BTNL: Float[Array, "B T N L"],
    q_BTNR: Float[Array, "B T N R"],
    latent_YXZL: Float[Array, "Y X Z L"],
    rope_YXRZ: Float[Array, "Y X R Z"],
    lengths_B: Int[Array, " B"],
    layer: Int[Array, ""],
    pages_BP: Int[Array, "B P"] | None,
    *latent_scale_YXZ: Float[Array, "Y X Z"],
    scale: float,
    kernel: Callable | None = None,
) -> tuple[Float[Array, "B T N L"], Float[Array, "B T N"]]:
    """See `pallas_kernels.mla_decode.api`. `kernel` makes another kernel than this one,
    of the same arguments and results, and of latents' scales besides.
    """
    (B, T, N, _), (Y, X, Z, _) = q_BTNL.shape, latent_YXZL.shape
    slots = Z if pages_BP is None else Z * pages_BP.shape[1]
    sizes = _Sizes(B, T, N, X, Z, slots, paged=pages_BP is not None, scale=scale)
    lengths_B = lengths_B.astype(jnp.int32)
    if pages_BP is None:
        pages_BP = jnp.zeros((1, 1))
    out, lse, *pieces = (kernel or _call)(sizes)(
        lengths_B,
        jnp.asarray(layer, jnp.int32)[None],
        pages_BP.astype(jnp.int32),
        q_BTNL.reshape(B, T * N, L),
        q_BTNR.reshape(B, T * N, R),
        latent_YXZL.reshape(Y * X, Z, L),
        rope_YXRZ.reshape(Y * X, R, Z),
        *(scale_YXZ.reshape(Y * X, Z) for scale_YXZ in latent_scale_YXZ),
    )
    out, lse = combine(lengths_B, out, lse, *pieces, slots=slots, parts=sizes.parts)
    return out.reshape(q_BTNL.shape), lse[:, :, : sizes.rows].reshape(B, T, N)


@dataclass(frozen=True)
class _Sizes:
    """All that the kernel's code depends on."""

    B: int
    T: int
    N: int
    X: int
    Z: int
    slots: int  # of a row
    paged: bool
    scale: float

    @property
    def tiles(self) -> int:
        return -(-self.T * self.N // TALL)

    @property
    def rows(self) -> int:
        """Queries of a tile that there are."""
        return self.T * self.N // self.tiles

    @property
    def parts(self) -> int:
        return SMS // self.tiles

    @property
    def clustered(self) -> bool:
        return self.tiles % 2 == 0


class _Shared(NamedTuple):
    """Shared memory and barriers. "Full" and "free" say when what is there may be used,
    and when the next may take its place.
    """

    q: Any  # [1, 64, L]
    q_rope: Any  # [64, R]
    latents: Any  # [SLOTS, 2 halves, 2 quarters, 64, L / 4]
    rope: Any  # [R, 64]
    weights: Any  # [2, 64, 64]
    factors: (
        Any  # [4, 64]: for the sums before either weights; for the result after them
    )
    q_full: Any
    q_free: Any
    full: Any  # of quarters, and of the rotary part
    free: Any
    weights_full: Any
    weights_free: Any
    turn: Any  # of the second half's products, when the first's are half done

    @classmethod
    def types(cls, *, clustered: bool):
        """What to allocate: 226 of the 227 KB there are."""
        matrix = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TILED)
        free: Any = plgpu.Barrier(num_barriers=ROPE + 1)
        if clustered:
            free = plgpu.ClusterBarrier(
                collective_axes=("pair",), num_barriers=ROPE + 1
            )
        return cls(
            q=matrix((1, TALL, L)),
            q_rope=matrix((TALL, R)),
            latents=matrix((SLOTS, 2, 2, BLOCK, QUARTER)),
            rope=matrix((R, BLOCK)),
            weights=matrix((2, TALL, BLOCK)),
            factors=plgpu.SMEM((4, TALL), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=2),
            q_free=plgpu.Barrier(),
            full=plgpu.Barrier(num_barriers=ROPE + 1),
            free=free,
            weights_full=plgpu.Barrier(num_barriers=2),
            weights_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            turn=plgpu.Barrier(num_barriers=2),
        )


def _call(sizes: _Sizes):
    """The kernel, of arguments and results as `_Kernel` has them."""

    def kernel(*refs):
        def run(*shared):
            _Kernel(sizes, *refs, _Shared(*shared)).run()

        shared = _Shared.types(clustered=sizes.clustered)
        pl.run_scoped(run, *shared, collective_axes="warpgroup")

    return launched(kernel, sizes, name="mla_decode", slot_bytes=2 * (L + R))


def launched(kernel: Callable, sizes: _Sizes, *, name: str, slot_bytes: int):
    """A kernel on its grid, with the results that `_Kernel` writes; a slot of the cache
    has so many bytes.
    """
    s, tiles, places = sizes, sizes.tiles, 2 * sizes.parts
    grid: dict[str, Any] = dict(grid=(tiles, s.parts), grid_names=("tile", "part"))
    if s.clustered:
        grid |= dict(grid=(tiles // 2, s.parts), cluster=(2,), cluster_names=("pair",))
    queries = s.B * s.T * s.N
    return pl.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((s.B, s.T * s.N, L), jnp.bfloat16),
            jax.ShapeDtypeStruct((s.B, tiles, TALL), jnp.float32),
            jax.ShapeDtypeStruct((places, tiles, TALL, L), jnp.bfloat16),
            jax.ShapeDtypeStruct((places, tiles, 2, TALL), jnp.float32),
            jax.ShapeDtypeStruct((places, tiles, TALL), jnp.float32),
        ),
        mesh=plgpu.Mesh(**grid, num_threads=4, thread_name="warpgroup"),
        name=name,
        cost_estimate=pl.CostEstimate(  # of full rows
            flops=2 * s.slots * queries * (L + R + L),
            transcendentals=s.slots * queries,
            bytes_accessed=s.B * s.slots * slot_bytes + 2 * queries * (L + R + L),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=1024,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # there is one wherever one is needed
        ),
    )


class _Stretch(NamedTuple):
    """Blocks of a row, and how many other blocks the part has behind it."""

    row: Any
    length: Any  # slots that the row has filled
    blocks: Any  # of the whole row
    first: Any
    last: Any  # the block after it
    done: Any
    ahead: Any  # the part begins so many blocks after the row
    share: Share

    @property
    def end(self):
        return self.done + self.last - self.first

    @property
    def whole(self):
        return (self.first == 0) & (self.last == self.blocks)


@dataclass(frozen=True)
class _Kernel:
    """One block of threads. Blocks of the cache are numbered by `step` as it meets them,
    over all its rows: the slots that they lie in alternate.
    """

    registers: ClassVar[dict[str, int]] = REGISTERS

    sizes: _Sizes
    lengths: Any
    layer: Any
    pages: Any
    q: Any
    q_rope: Any
    latent: Any
    rope: Any
    out: Any
    lse: Any
    sums: Any
    units: Any
    lses: Any
    shared: _Shared

    def run(self) -> None:
        warpgroup = lax.axis_index("warpgroup")
        # A tree of branches, each of which sets its registers first, is what ptxas takes.
        lax.cond(
            warpgroup < 2,
            lambda: lax.cond(
                warpgroup == 0, lambda: self.values(0), lambda: self.values(1)
            ),
            lambda: lax.cond(warpgroup == 2, self.weigh, self.copy),
        )

    # --- who does what

    @property
    def part(self):
        return lax.axis_index("part")

    @property
    def tile(self):
        if self.sizes.clustered:
            return 2 * lax.axis_index("tile") + lax.axis_index("pair")
        return lax.axis_index("tile")

    @property
    def queries(self):
        """Those of the tile, among those of a row."""
        return pl.ds(self.tile * self.sizes.rows, self.sizes.rows)

    def place(self, stretch: _Stretch):
        """Where a piece goes; see `combine`."""
        return 2 * self.part + (stretch.first == 0).astype(jnp.int32), self.tile

    def stretches(self, body) -> jax.Array:
        """Calls `body` with every stretch of the part; the number of its blocks."""
        s = self.sizes
        mine = share(self.lengths, self.part, slots=s.slots, parts=s.parts)

        def one(row, state):
            stretch = self.stretch(mine, row, *state)
            body(stretch)
            return stretch.ahead - mine.divided.step(stretch.blocks), stretch.end

        start = mine.ahead, jnp.int32(0)
        return lax.fori_loop(mine.first, mine.last, one, start)[1]

    def stretch(self, share: Share, row, ahead, done) -> _Stretch:
        slots = self.sizes.slots
        length = jnp.clip(self.lengths[row], 0, slots)
        count = blocks_of(self.lengths, row, slots)
        return _Stretch(
            row, length, count, *share.blocks(ahead, count), done, ahead, share
        )

    def again(self, stretch: _Stretch) -> _Stretch:
        """The same, found out anew: in between it takes few registers."""
        known = (hidden(x) for x in (stretch.row, stretch.ahead, stretch.done))
        return self.stretch(stretch.share, *known)

    # --- copies

    def copy(self) -> None:
        _take_registers(self.registers["copies"])
        total = self.stretches(self.copy_stretch)
        if self.sizes.clustered:
            # A neighbour may still say that it has done with what came from here.
            @pl.loop(jnp.maximum(total - SLOTS, 0), total)
            def _(step):
                for half, quarter in QUARTERS:
                    plgpu.barrier_wait(
                        self.shared.free.at[_quarter(step, half, quarter)]
                    )

            @pl.when(total > 0)
            def _():
                plgpu.barrier_wait(self.shared.free.at[ROPE])

    def copy_stretch(self, stretch: _Stretch) -> None:
        shared, row = self.shared, stretch.row

        @pl.when(stretch.done > 0)
        def _():
            plgpu.barrier_wait(shared.q_free)

        there = self.there
        plgpu.copy_gmem_to_smem(
            self.q.at[row, self.queries], shared.q.at[(0, *there)], shared.q_full
        )
        plgpu.copy_gmem_to_smem(
            self.q_rope.at[row, self.queries], shared.q_rope.at[there], shared.q_full
        )
        cached = functools.partial(self.cached, stretch, self.layer[0] * self.sizes.X)
        if self.sizes.clustered:
            self.fetch(*cached(stretch.first))

        @pl.loop(stretch.first, stretch.last)
        def _(block):
            if self.sizes.clustered:
                more = block + 1 < stretch.last
                pl.when(more)(lambda: self.fetch(*cached(block + 1)))
            self.copy_block(stretch, block, *cached(block))

    def copy_block(self, stretch: _Stretch, block, latents, rope) -> None:
        """In the order in which it is used: of every second block, the rotary part last."""
        shared, step = self.shared, stretch.done + block - stretch.first
        second = lax.rem(block - stretch.first, 2) == 1

        def load(source, target, number, slots):
            @pl.when(step >= slots)
            def _():
                plgpu.barrier_wait(shared.free.at[number])

            pair = ("pair",) if self.sizes.clustered else None
            barrier = shared.full.at[number]
            plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=pair)

        def load_rope():
            load(rope, shared.rope, ROPE, 1)

        pl.when(~second)(load_rope)
        for half, quarter in QUARTERS:
            columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
            target = shared.latents.at[lax.rem(step, SLOTS), half, quarter]
            load(latents.at[:, columns], target, _quarter(step, half, quarter), SLOTS)
        pl.when(second)(load_rope)

    def fetch(self, latents, rope) -> None:
        """Has the L2 cache fetch half of a block; the neighbour asks for the other."""
        half = lax.axis_index("pair")
        plgpu.async_prefetch(latents.at[:, pl.ds(half * HALF, HALF)])
        pl.when(half == 0)(lambda: plgpu.async_prefetch(rope))

    def cached(self, stretch: _Stretch, layer, block):
        """A block's latents [64, L] and rotary keys [R, 64] in the cache, of which `layer`
        is the first place.
        """
        place, slots = self.spot(stretch, layer, block)
        return self.latent.at[place, slots], self.rope.at[place, :, slots]

    def spot(self, stretch: _Stretch, layer, block):
        """Where a block lies: its row or page, its slots."""
        s, place, slot = self.sizes, stretch.row, block * BLOCK
        if s.paged:
            place = jnp.clip(self.pages[place, lax.div(slot, s.Z)], 0, s.X - 1)
            slot = lax.rem(slot, s.Z)
        return place + layer, pl.ds(pl.multiple_of(slot, BLOCK), BLOCK)

    @property
    def there(self):
        """The rows of a tile that there are."""
        rows = self.sizes.rows
        return (slice(None),) if rows == TALL else (pl.ds(0, rows),)

    # --- scores and weights

    def weigh(self) -> None:
        _take_registers(self.registers["weights"])
        self.stretches(self.weigh_stretch)

    def weigh_stretch(self, stretch: _Stretch) -> None:
        plgpu.barrier_wait(self.shared.q_full)
        highest = plgpu.layout_cast(jnp.full((TALL,), LOWEST, jnp.float32), COLUMN)
        # What weights sum up to, in 8 parts a row: added up at the end.
        total = plgpu.layout_cast(jnp.zeros((TALL, 8), jnp.float32), MATRIX)
        count = stretch.last - stretch.first
        pair = functools.partial(self.weigh_pair, stretch)
        state = lax.fori_loop(0, lax.div(count, 2), pair, (highest, total))

        @pl.when(lax.rem(count, 2) == 1)
        def _():
            self.weigh_last(stretch, state)

    def weigh_pair(self, stretch: _Stretch, number, state):
        """Two blocks. Their scores follow each other without a pause, but for the second's
        rotary part: there is room for one.
        """
        block = stretch.first + 2 * number
        step = stretch.done + 2 * number

        def both(acc, acc_next):
            self.multiply_rope(acc)
            self.multiply_latents(acc, stretch, step)
            following = functools.partial(
                self.multiply_quarter, acc_next, stretch, step + 1
            )
            following(*QUARTERS[0])
            scores = plgpu.wgmma_accumulator_load(acc, wait_n=1)
            plgpu.barrier_arrive(self.shared.free.at[ROPE])
            softened = self.soften(stretch, block, scores, state)
            for quarter in QUARTERS[1:]:
                following(*quarter, zero=next(softened))
            *_, state_next = softened
            self.publish(step)
            self.multiply_rope(acc_next)
            return acc_next[...], state_next

        scores, state = pl.run_scoped(both, SCORES, SCORES)
        plgpu.barrier_arrive(self.shared.free.at[ROPE])
        ends = block + 2 == stretch.last
        pl.when(ends)(lambda: plgpu.barrier_arrive(self.shared.q_free))
        *_, state = self.soften(stretch, block + 1, scores, state)
        pl.when(ends)(lambda: self.finish(stretch, state))
        self.publish(step + 1)
        return state

    def weigh_last(self, stretch: _Stretch, state) -> None:
        """The last of an odd number of blocks."""
        step = stretch.end - 1

        def one(acc):
            self.multiply_rope(acc)
            self.multiply_latents(acc, stretch, step)
            return acc[...]

        scores = pl.run_scoped(one, SCORES)
        plgpu.barrier_arrive(self.shared.free.at[ROPE])
        plgpu.barrier_arrive(self.shared.q_free)
        *_, state = self.soften(stretch, stretch.last - 1, scores, state)
        self.finish(stretch, state)
        self.publish(step)

    def multiply_rope(self, acc) -> None:
        plgpu.barrier_wait(self.shared.full.at[ROPE])
        plgpu.wgmma(acc, self.shared.q_rope, self.shared.rope)

    def multiply_latents(self, acc, stretch: _Stretch, step) -> None:
        for quarter in QUARTERS:
            self.multiply_quarter(acc, stretch, step, *quarter)

    def multiply_quarter(
        self, acc, stretch, step, half: int, quarter: int, zero=0
    ) -> None:
        shared = self.shared
        # A zero that the compiler does not know: it would keep all addresses in registers.
        zero += lax.shift_right_logical(stretch.row, 30) * step
        plgpu.barrier_wait(shared.full.at[_quarter(step, half, quarter)])
        columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
        latents = shared.latents.at[lax.rem(step, SLOTS), half, quarter]
        plgpu.wgmma(acc, shared.q.at[zero, :, columns], latents.T)

    def soften(self, stretch: _Stretch, block, scores, state):
        """Writes 2 ** (scores - highest), and what to multiply the sums before with."""
        shared, (highest, total) = self.shared, state
        step = stretch.done + block - stretch.first
        scale = self.sizes.scale * LOG2E
        scores = self.masked(stretch, block, scores if scale >= 0 else -scores)
        scale, before = abs(scale), highest
        highest = jnp.maximum(before, scores.max(axis=1) * scale)
        highest = jnp.where(highest > before + GROWTH, highest, before)
        factor = jnp.exp2(before - highest)
        yield 0
        weights = jnp.exp2(scores * scale - _rows(highest, scores))
        total = total * _rows(factor, total)
        for column in range(0, BLOCK, 8):
            total = total + weights[:, column : column + 8]
        yield _zero_of(total)
        at = lax.rem(step, 2)

        @pl.when(step > 1)
        def _():
            plgpu.barrier_wait(shared.weights_free.at[at])

        shared.weights[at] = weights.astype(jnp.bfloat16)
        shared.factors[at] = factor
        yield 0
        yield highest, total

    def masked(self, stretch: _Stretch, block, scores):
        """-inf where a token's query does not see a slot: in a row's last blocks."""
        s, length = self.sizes, stretch.length
        shortest = length - s.T + 1

        def mask(scores):
            query, slot = (
                plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=MATRIX)
                for axis in (0, 1)
            )
            seen = shortest
            if s.T > 1:  # rows of the tile that are not there see no more than others
                token = lax.div(query + self.tile * s.rows, jnp.int32(s.N))
                seen = jnp.minimum(shortest + token, length)
            return jnp.where(slot + block * BLOCK < seen, scores, -jnp.inf)

        some = (block + 1) * BLOCK > shortest
        return lax.cond(some, mask, lambda scores: scores, scores)

    def publish(self, step) -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.shared.weights_full.at[lax.rem(step, 2)])

    def finish(self, stretch: _Stretch, state) -> None:
        """Writes log-sum-exps, and what to multiply the sums with in the end."""
        highest, total = state
        stretch = self.again(stretch)
        total = total.sum(axis=1)
        some = total > 0
        inverse = jnp.where(some, 1 / total, jnp.zeros_like(total))
        self.shared.factors[2 + lax.rem(stretch.end - 1, 2)] = inverse
        lse = (highest + jnp.log2(total)) / LOG2E
        lse = jnp.where(some, lse, jnp.full_like(total, -jnp.inf))

        @pl.when(stretch.whole)
        def _():
            self.lse[stretch.row, self.tile] = lse

        @pl.when(~stretch.whole)
        def _():
            self.lses[self.place(stretch)] = lse

    # --- values

    def values(self, half: int) -> None:
        _take_registers(self.registers["values"])
        self.stretches(functools.partial(self.add_stretch, half))
        plgpu.wait_smem_to_gmem(0)

    def add_stretch(self, half: int, stretch: _Stretch) -> None:
        shared = self.shared
        add = functools.partial(self.add_block, half, stretch)
        acc = plgpu.layout_cast(jnp.zeros((TALL, HALF), jnp.float32), MATRIX)
        acc = lax.fori_loop(stretch.done, stretch.end, add, acc)
        stretch = self.again(stretch)
        step = stretch.end - 1
        at = lax.rem(step, 2)
        inverse = load(shared.factors.at[2 + at], layout=COLUMN)
        plgpu.barrier_arrive(shared.weights_free.at[at])
        self.store(half, stretch, acc * _rows(inverse, acc))
        for quarter in range(2):
            plgpu.barrier_arrive(shared.free.at[_quarter(step, half, quarter)])

    def add_block(self, half: int, stretch: _Stretch, step, acc):
        shared, at, more = self.shared, lax.rem(step, 2), step + 1 < stretch.end
        numbers = [_quarter(step, half, quarter) for quarter in range(2)]
        latents = shared.latents.at[lax.rem(step, SLOTS), half]
        self.await_values(half, step, more)
        plgpu.barrier_wait(shared.weights_full.at[at])
        # Slots that the row has in its last block: others may hold NaNs.
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

        acc = pl.run_state(multiply)(plgpu.ACC.init(acc))

        @pl.when(more)
        def _():
            plgpu.barrier_arrive(shared.weights_free.at[at])
            plgpu.barrier_arrive(shared.free.at[numbers[1]])

        return acc

    def await_values(self, half: int, step, more) -> None:
        """Until a block's half of the columns is there; `more` blocks come."""
        for quarter in range(2):
            plgpu.barrier_wait(self.shared.full.at[_quarter(step, half, quarter)])

    def store(self, half: int, stretch: _Stretch, acc) -> None:
        """Through the place of the last block, which is free after that."""
        latents = self.shared.latents.at[lax.rem(stretch.end - 1, SLOTS), half]
        place = self.place(stretch)

        def piece(acc):
            """Rounded once more than results are, so to float16, in units of its largest
            number.
            """
            largest = jnp.abs(acc).max(axis=1)
            self.units[(*place, half)] = largest
            unit = jnp.where(largest > 0, 1 / largest, jnp.zeros_like(largest))
            acc = (acc * _rows(unit, acc)).astype(jnp.float16)
            return lax.bitcast_convert_type(acc, jnp.bfloat16)

        def result(acc):
            return acc.astype(jnp.bfloat16)

        rounded = lax.cond(stretch.whole, result, piece, acc)
        plgpu.commit_smem()  # all warps have multiplied
        for quarter in range(2):
            columns = slice(quarter * QUARTER, (quarter + 1) * QUARTER)
            latents[quarter] = rounded[:, columns]
        plgpu.commit_smem()

        def leave(target, *there):
            for quarter in range(2):
                columns = pl.ds(half * HALF + quarter * QUARTER, QUARTER)
                source = latents.at[(quarter, *self.there)]
                plgpu.copy_smem_to_gmem(source, target.at[(*there, columns)])

        row, cut = (stretch.row, self.queries), (*place, *self.there)
        pl.when(stretch.whole)(lambda: leave(self.out, *row))
        pl.when(~stretch.whole)(lambda: leave(self.sums, *cut))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _take_registers(count: int) -> None:
    """Instead of the 128 that each lane of 512 begins with."""
    action = "increase" if count > 128 else "decrease"
    plgpu.set_max_registers(count, action=action)


def _quarter(step, half: int, quarter: int):
    """The number of the barriers of a quarter of a block's latents."""
    return 4 * lax.rem(step, SLOTS) + 2 * half + quarter


def _rows(column, like):
    return lax.broadcast_in_dim(column, like.shape, [0])


def _zero_behind(latents, left) -> None:
    """Zeros in the slots from `left` on of two quarters."""
    for quarter in range(2):
        for column in range(0, QUARTER, 64):
            values = latents.at[quarter, :, pl.ds(column, 64)]
            found = load(values, layout=MATRIX)
            slot = plgpu.broadcasted_iota(jnp.int32, found.shape, 0, layout=MATRIX)
            found = jnp.where(slot < left, found, jnp.zeros_like(found))
            plgpu.commit_smem()  # all warps have read
            values[...] = found
    plgpu.commit_smem()


@plgpu.inline_mgpu(
    arg_types=(MATRIX,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
)
def _zero_of(_, sums) -> mgpu.FragmentedArray:
    """The sign of numbers that have none, which only we know: what needs it has to wait
    for them.
    """
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), i32)
    bits = functools.reduce(
        arith.ori, (vector.bitcast(pair, two) for two in sums.registers.flat)
    )
    one, other = (
        vector.extract(bits, dynamic_position=[], static_position=[i]) for i in (0, 1)
    )
    sign = arith.constant(i32, ir.IntegerAttr.get(i32, 31))
    found = arith.shrui(arith.ori(one, other), sign)
    return mgpu.FragmentedArray.splat(found, (), is_signed=True)


@plgpu.inline_mgpu(
    arg_types=(COLUMN,),
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
)
def _any_below_one(_, factors) -> mgpu.FragmentedArray:
    """Whether a factor of one of a warp's own rows is."""
    i1, i32 = ir.IntegerType.get_signless(1), ir.IntegerType.get_signless(32)
    lowest = functools.reduce(arith.minimumf, factors.registers.flat)
    if isinstance(lowest.type, ir.VectorType):
        lowest = vector.extract(lowest, dynamic_position=[], static_position=[0])
    one = arith.constant(lowest.type, ir.FloatAttr.get(lowest.type, 1.0))
    below = arith.cmpf(arith.CmpFPredicate.OLT, lowest, one)
    vote = "vote.sync.any.pred $0, $1, 0xffffffff;"
    below = llvm.inline_asm(i1, [below], vote, "=b,b", has_side_effects=True)
    return mgpu.FragmentedArray.splat(arith.extui(i32, below), (), is_signed=True)
