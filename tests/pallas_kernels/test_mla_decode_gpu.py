"""The Hopper kernel of MLA decoding: how rows are shared out, anywhere; the compiled
code, on any machine; the results, on a GPU (`pytest -m gpu`).
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_decode import mla_decode, schedule_gpu
from pallas_kernels.mla_decode.pallas_gpu import lacks
from pallas_kernels.mla_decode.schedule_gpu import (
    BLOCK,
    START_COST,
    share,
)
from pallas_kernels.mosaic import SMS
from tests.pallas_kernels.h200 import compile_for_h200
from tests.pallas_kernels.test_mla_decode import SCALE, by_hand

LENGTHS = {
    "equal": [4096] * 128,
    "mixed": np.random.default_rng(0).integers(256, 8193, 128).tolist(),
    "short ones and one long": [1, 64, 65, 0, 8192, 3],
    "one": [65536],
    "fewer rows than parts": [8192] * 32,
    "many of a block": [64] * 500,
    "none filled": [0] * 5,
    "beyond the cache": [10**6, 5],
}
SLOTS = 65536


@pytest.fixture
def lanes(monkeypatch):
    """A warp's lanes as a vector."""
    sums = {
        "lane": lambda: jnp.arange(schedule_gpu.LANES),
        "sum_of": jnp.sum,
        "highest_of": jnp.max,
        "sum_before": lambda x: jnp.cumsum(x) - x,
    }
    for name, replacement in sums.items():
        monkeypatch.setattr(schedule_gpu, name, replacement)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("tiles", [1, 2, 8])
def test_every_block_is_one_parts(lanes, lengths, tiles):
    """As the kernel goes through its rows; no part has much more than the mean."""
    parts, B = SMS // tiles, len(lengths)
    needed = np.maximum(1, -(-np.minimum(lengths, SLOTS) // BLOCK))
    owners, work = [np.full(count, -1) for count in needed], np.zeros(parts)
    shares = jax.jit(
        jax.vmap(
            lambda part: share(jnp.asarray(lengths), part, slots=SLOTS, parts=parts)
        )
    )(jnp.arange(parts))
    shares = jax.tree.map(np.asarray, shares)
    for part in range(parts):
        mine = jax.tree.map(operator.itemgetter(part), shares)
        ahead = mine.ahead
        for row in range(mine.first, mine.last):
            first, last = map(int, mine.blocks(ahead, needed[row]))
            assert last > first
            assert (owners[row][first:last] == -1).all()
            owners[row][first:last] = part
            work[part] += last - first
            ahead -= int(mine.divided.step(needed[row]))
    assert all((row >= 0).all() for row in owners)
    mean = (needed.sum() + START_COST * B) / parts
    assert work.max() <= 1.06 * mean + 1


def test_what_it_does_not_take_is_said():
    def words(*, q=(2, 1, 16, 512), rope=64, cache=(1, 2, 128, 512), dtype="bfloat16"):
        shapes = q, (*q[:3], rope), cache
        return lacks(*(jnp.zeros(shape, dtype) for shape in shapes))

    assert words() == words(q=(2, 4, 128, 512)) == words(q=(2, 3, 32, 512)) == ""
    assert "float32" in words(dtype="float32")
    assert "512 and 64, not 512 and 32" in words(rope=32)
    assert "rows or pages of 100 slots" in words(cache=(1, 2, 100, 512))
    assert "1 tokens of 12 heads" in words(q=(2, 1, 12, 512))
    shapes = (2, 1, 12, 512), (2, 1, 12, 64), (1, 2, 128, 512), (1, 2, 64, 128)
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    with pytest.raises(NotImplementedError, match="pallas_gpu: 1 tokens of 12 heads"):
        mla_decode(
            *(*arrays, jnp.array([1, 2])),
            layer=0,
            scale=1.0,
            implementation="pallas_gpu",
        )


COMPILE = """
from pallas_kernels.mla_decode import mla_decode, schedule_gpu


def decode(q, q_rope, latent, rope, lengths, layer, *pages):
    pages = pages[0] if pages else None
    return mla_decode(
        q, q_rope, latent, rope, lengths, layer=layer, scale=0.1, pages_BP=pages
    )


for B, T, N, Z, P in {cases}:
    X = B * (P or 1)
    table = [shape(B, P, dtype=jnp.int32)] if P else []
    compiled = jax.jit(decode).lower(
        shape(B, T, N, 512), shape(B, T, N, 64), shape(3, X, Z, 512), shape(3, X, 64, Z),
        shape(B, dtype=jnp.int32), shape(dtype=jnp.int32), *table,
    ).compile()
    cache = 3 * X * Z * 576 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < max(0.1 * cache, 80 << 20)
    print("kernels:", compiled.as_text().count('custom_call_target="mosaic_gpu'))
"""
ALL = {  # rows, tokens, heads of one device, slots of a row or page, pages of a row
    "v3": (128, 1, 128, 4096, None),
    "v3, two tokens, pages": (32, 2, 128, 64, 128),
    "v3, four tokens": (128, 4, 128, 8192, None),
    "v3, one row": (1, 1, 128, 65536, None),
    "v2-lite": (128, 1, 16, 4096, None),
    "v2-lite, three tokens, pages": (64, 3, 16, 256, 16),
    "heads over 16": (7, 1, 8, 1024, None),
}


def compiles(*cases):
    report = compile_for_h200(COMPILE.format(cases=[ALL[case] for case in cases]))
    assert report.printed.count("kernels: 2") == len(cases)
    assert len(report.spills) > len(cases)


# Outside its loops: GPUs are used with JAX 0.11, whose code spills nothing.
spills = pytest.mark.xfail(
    jax.__version_info__ < (0, 11),
    raises=AssertionError,
    strict=False,
    reason="JAX 0.10's code spills up to 124 bytes",
)


@spills
def test_compiles_for_an_h200_without_spills():
    compiles("v3", "v2-lite, three tokens, pages")


@spills
@pytest.mark.aot
@pytest.mark.parametrize("case", ALL)
def test_compiles_everything_for_an_h200(case):
    compiles(case)


# --- on a GPU

ON_A_GPU = {  # tokens, heads, slots of a row or page, pages of a row, lengths
    "whole rows": (1, 128, 256, None, [256, 256]),
    "a slot, a block, one more": (1, 128, 512, None, [1, 64, 65, 512]),
    "empty, and shorter than the tokens": (4, 16, 256, None, [0, 2, 3, 256]),
    "two tokens over a block's edge": (2, 128, 1024, None, [1024, 65, 64, 0, 129]),
    "beyond the cache": (1, 16, 256, None, [300, 10_000]),
    "a row for all": (1, 128, 16384, None, [16001]),
    "many rows": (1, 16, 512, None, list(range(3, 513, 9))),
    "pages of a block": (3, 128, 64, 8, [512, 200]),
    "pages of two": (1, 16, 128, 4, [512, 129, 7]),
    "few heads": (3, 8, 128, None, [128, 5]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU.values(), ids=ON_A_GPU)
def test_equals_the_definition_on_the_gpu(rng, case):
    """What nobody sees is NaN: behind the lengths, and in the other layer."""
    tokens, heads, slots, pages, lengths = case
    B = len(lengths)
    X = B * (pages or 1)
    sizes = (B, tokens, heads, 512), (B, tokens, heads, 64), (2, X, slots, 512)
    arrays = [rng.standard_normal(size) for size in (*sizes, (2, X, 64, slots))]
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    if pages is None:
        behind = np.arange(slots) >= np.asarray(lengths)[:, None]
        arrays[2] = jnp.where(behind[None, :, :, None], jnp.nan, arrays[2])
        arrays[3] = jnp.where(behind[None, :, None], jnp.nan, arrays[3])
        arrays[2:] = [x.at[0].set(jnp.nan) for x in arrays[2:]]
    else:
        pages = jnp.asarray(rng.permutation(X).reshape(B, -1), jnp.int32)
    arrays += [jnp.asarray(lengths, jnp.int32), pages]
    expected, expected_lse = by_hand(*arrays)

    @jax.jit
    def decode(*arrays):
        *others, pages = arrays
        return mla_decode(
            *others,
            layer=jnp.int32(1),
            scale=SCALE,
            pages_BP=pages,
            implementation="pallas_gpu",
        )

    empty = np.isneginf(expected_lse)
    for _ in range(3):  # a race would differ from run to run
        out, lse = map(np.asarray, decode(*arrays))
        error = np.linalg.norm(out.astype(np.float64) - expected)
        assert error <= 3e-3 * np.linalg.norm(expected)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
        assert (out[empty] == 0).all()
