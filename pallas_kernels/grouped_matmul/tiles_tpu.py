"""How the TPU kernels of the grouped matmul cut their work: tiles and visits.

Letters: M rows, K inner, N outer, G groups, V visits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array, Int

ROWS = 256  # rows of a tile: enough for each matrix tile that enters the systolic array
CHUNK = (
    64  # a tile that is not all its group's is multiplied in multiples of these rows
)
STRIP = 256  # columns of the output multiplied at once,
DEPTH = 1024  # and of the contracted axis: loops bound the program's length
LANES = 128
# Bytes that the compiler lets a kernel have unless asked for more, by JAX's device kind.
SCOPED_VMEM = {
    "TPU v5 lite": 16 * 2**20,
    "TPU v5": 16 * 2**20,
    "TPU v6 lite": 32 * 2**20,
    "TPU7x": 32 * 2**20,
}
# Of those, for what the compiler itself needs, by bytes of an element: float32 is
# multiplied as several products of bfloat16, whose operands are cut into parts.
RESERVED = {2: 2**19, 4: 5 * 2**19}


class Tiles(NamedTuple):
    """Sizes of one kernel's tiles."""

    rows: int
    columns: int  # of the output
    across: int = 0  # the other axis of a gradient by weights


class Operands(NamedTuple):
    """How many of each a kernel of rows has."""

    lhs: int = 1
    matrices: int = 1
    scales: int = 0
    outputs: int = 1


ONE = Operands()
SWIGLU = Operands(matrices=2, scales=1)
BOTH = Operands(matrices=2, outputs=2)
SWIGLU_BACK = Operands(lhs=2, matrices=2)


def scoped_vmem() -> int:
    """Bytes a kernel may use on the chip that a mesh around names, else on any chip."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    smallest = min(SCOPED_VMEM.values())
    return SCOPED_VMEM.get(device.device_kind, smallest) if device else smallest


# Both operands of a step have the whole contracted axis in VMEM, each twice: a block is
# multiplied while the next one arrives. Rows and columns are left to choose. A matrix is
# read once whatever they are, x once for every tile of columns, so that each element of
# x read is worth `columns` products: the widest tile that fits is the best. In 16 MiB:
#
#   bfloat16            contracted  out    rows x columns
#   V3 gate or up       7168        2048   256 x 256
#   V3 gate and up      7168        2048   256 x 128 of each
#   V3 down             2048        7168   256 x 1024
#   V2 gate or up       5120        1536   256 x 384
#   V2-Lite gate or up  2048        1408   256 x 768, the last 640 wide


def row_tiles(
    rows: int, contracted: int, out: int, bytes_each: int, has: Operands = ONE
) -> Tiles | None:
    """Tiles of products of rows; None where the smallest does not fit."""
    for tall, least in [(ROWS, 256), (128, 256), (ROWS, 128), (128, 128), (64, 128)]:
        tall = min(tall, pl.cdiv(rows, CHUNK) * CHUNK)
        fixed = 2 * has.lhs * tall * contracted * bytes_each
        fixed += 2 * has.matrices * tall * min(least, STRIP) * 4  # sums in float32
        fixed += 2 * has.scales * tall * LANES * 4  # one column is padded to all lanes
        column = 2 * (has.matrices * contracted + has.outputs * tall) * bytes_each
        most = (scoped_vmem() - RESERVED[bytes_each] - fixed) // column // LANES
        if most * LANES >= min(least, out):
            return Tiles(tall, LANES * _cut(out // LANES, most))
    return None


def _cut(whole: int, most: int) -> int:
    """Parts of at most `most`, at least two where possible: a chip may have two cores.

    Equal ones, unless those would be less than half of what fits.
    """
    most = max(min(most, pl.cdiv(whole, 2)), 1)
    equal = max(part for part in range(1, most + 1) if whole % part == 0)
    return equal if 2 * equal >= most else pl.cdiv(whole, pl.cdiv(whole, most))


def outer_tiles(
    rows: int, N: int, K: int, bytes_each: int, out_bytes: int
) -> Tiles | None:
    """Tiles of the gradient by weights: an output block of n x k is worth n k products
    for every n + k elements read, so the squarest of the large ones that fit.
    """
    tall = min(ROWS, pl.cdiv(rows, CHUNK) * CHUNK)

    def fits(n: int, k: int) -> bool:
        operands = 2 * tall * (n + k) * bytes_each
        sums = 4 * n * k if out_bytes < 4 else 0
        strips = (2 * 2 * STRIP + tall) * k * 4
        total = operands + sums + strips + 2 * n * k * out_bytes
        return total <= scoped_vmem() - RESERVED[bytes_each]

    sizes = [(n, k) for n in _divisors(N) for k in _divisors(K) if fits(n, k)]
    best = min(sizes, key=lambda size: 1 / size[0] + 1 / size[1], default=None)
    return best and Tiles(tall, *best)


def _divisors(size: int) -> list[int]:
    """The multiples of a lane's width that divide `size`."""
    return [part for part in range(LANES, size + 1, LANES) if size % part == 0]


def lacks(
    rows: int, shape: tuple[int, ...], dtype: DTypeLike, *, gated: bool = False
) -> str:
    """Why the kernels do not take x [rows, K] and w of `shape` [G, N, K], or two such w;
    nothing where they do.
    """
    G, N, K = shape
    if not rows or not G:
        return f"takes no empty operands ({rows} rows, {G} groups)"
    if N % LANES or K % LANES:
        return f"takes multiples of {LANES} ({N=}, {K=})"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32 ({dtype})"
    each = jnp.dtype(dtype).itemsize
    there, back = ([SWIGLU, BOTH], [SWIGLU_BACK]) if gated else ([ONE], [ONE])
    tiles = [
        *(row_tiles(rows, K, N, each, has) for has in there),
        *(row_tiles(rows, N, K, each, has) for has in back),
        outer_tiles(rows, N, K, each, 4),
    ]
    return f"tiles of {N=}, {K=}, {dtype} exceed its memory" if None in tiles else ""


class Visits(NamedTuple):
    """Which rows each visit multiplies with which matrix; prefetched to SMEM."""

    group_V: Int[Array, " V"]
    tile_V: Int[Array, " V"]
    first_V: Int[Array, " V"]  # of the tile's rows, the group's: from
    last_V: Int[Array, " V"]  # ... to; equal where there are none
    end_2: Int[Array, " 2"]  # the last group and the last tile that hold rows


def schedule(
    sizes_G: Int[Array, " G"], *, rows: int, tile: int, empty: bool
) -> tuple[Visits, Int[Array, ""]]:
    """The visits in order of rows, and their number.

    A group visits every tile it has rows in. Tiles of no group, past the sum of the
    sizes, are visited once each in the name of group G, unless `empty`: then every
    empty group has a visit instead.
    """
    groups = sizes_G.shape[0]
    ends_G = jnp.cumsum(sizes_G.astype(jnp.int32))
    begins_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])
    held_G = ends_G > begins_G
    tiles_G = jnp.where(held_G, (ends_G - 1) // tile - begins_G // tile + 1, int(empty))
    last_group = jnp.where(held_G, jnp.arange(groups), 0).max()
    used = pl.cdiv(ends_G[-1], tile)  # tiles that hold rows
    surplus = 0 if empty else pl.cdiv(rows, tile) - used

    # One more group, for the surplus.
    begins = jnp.append(begins_G, rows)
    ends = jnp.append(ends_G, rows)
    first_tiles = jnp.append(begins_G // tile, used)
    counts = jnp.append(tiles_G, surplus)
    visit_ends = jnp.cumsum(counts)

    visit_V = jnp.arange(pl.cdiv(rows, tile) + groups, dtype=jnp.int32)
    group_V = (visit_V[:, None] >= visit_ends).sum(axis=1, dtype=jnp.int32)
    group_V = jnp.minimum(group_V, groups)  # past the last visit
    number_V = visit_V - (visit_ends - counts)[group_V]
    tile_V = first_tiles[group_V] + number_V
    first_V = jnp.clip(begins[group_V] - tile_V * tile, 0, tile)
    last_V = jnp.clip(ends[group_V] - tile_V * tile, 0, tile)
    end_2 = jnp.stack([last_group, jnp.maximum(used - 1, 0)]).astype(jnp.int32)
    return Visits(group_V, tile_V, first_V, last_V, end_2), visit_ends[-1]


def chunk_span(begin: Array, stop: Array) -> tuple[Array, Array]:
    """The first of a tile's chunks that hold rows `begin` to `stop`, and their number."""
    start = begin // CHUNK
    return start, jnp.where(stop > begin, pl.cdiv(stop, CHUNK) - start, 0)
