"""Rows travel to their experts and back: on one device and on all, the same sums.

On simulated CPU devices there are eight. On the GPUs of a host:

    JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=highest pytest -n 0 tests/nn/test_dispatch.py
"""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax import models
from dsjax.config import Groups, GroupScore, Moe
from dsjax.nn import dispatch
from dsjax.nn.exchange import exchange, lanes
from dsjax.nn.experts import apply_experts
from dsjax.nn.rows import inverse, sorted_places
from dsjax.sharding import make_mesh
from tests.support import rounds

N, D, F, E, K = 64, 16, 8, 16, 4  # tokens, model, expert width, experts, chosen
FREE = Moe(num_experts=E, num_shared=0, top_k=K, width=F)
GROUPED = replace(FREE, groups=Groups(count=4, kept=2, score=GroupScore.MAX))
DEVICES = jax.device_count()
ROWS = P(("data", "expert"))


def random_choice(rng: np.random.Generator, experts=E) -> np.ndarray:
    return np.stack([rng.permutation(experts)[:K] for _ in range(N)])


def choices(name: str) -> np.ndarray:
    """int32 [N, K]."""
    rng = np.random.default_rng(2)
    match name:
        case "random":
            chosen = random_choice(rng)
        case "one device":  # whose experts everyone chooses
            chosen = np.tile(np.arange(K), (N, 1))
        case "one expert":  # and nothing else
            chosen = np.tile([[5, E, E, E]], (N, 1))
        case "dropped":
            chosen = np.where(rng.random((N, K)) < 0.3, E, random_choice(rng))
        case "grouped":  # experts of two groups of four
            pair = np.stack([rng.permutation(4)[:2] for _ in range(N)])
            within = random_choice(rng, experts=8)
            chosen = 4 * np.take_along_axis(pair, within // 4, axis=1) + within % 4
    return chosen.astype(np.int32)


def operands():
    rng = np.random.default_rng(1)
    shapes = (N, D), (N, K), (E, F, D), (E, F, D), (E, D, F), (N, D)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@jax.jit
def wanted(chosen_Nk):
    """The sums and their gradients by one device."""
    x_ND, affinity_Nk, *weights, dy_ND = operands()
    one = lambda x, a, *w: apply_experts(x, chosen_Nk, a, w)  # noqa: E731
    y_ND, back = jax.vjp(one, x_ND, affinity_Nk, *weights)
    return y_ND, *back(dy_ND)


@cache
def compiled(config: Moe, data: int, chunks: int):
    """The same by all, of any choice; `chunks` as the limits are when it is traced."""

    def local(chosen_Nk, x_ND, affinity_Nk, *weights):
        return dispatch.dispatched(
            apply_experts, x_ND, chosen_Nk, affinity_Nk, weights, config
        )

    def many(chosen_Nk, *arrays):
        specs = (ROWS,) * 2 + (P("expert"),) * 3
        *arrays, dy_ND = map(jax.sharding.reshard, arrays, (*specs, ROWS))
        chosen_Nk = jax.sharding.reshard(chosen_Nk, ROWS)
        mapped = jax.shard_map(
            local, in_specs=(ROWS, *specs), out_specs=ROWS, check_vma=False
        )
        y_ND, back = jax.vjp(partial(mapped, chosen_Nk), *arrays)
        return y_ND, *back(dy_ND)

    return jax.jit(many)


def found(chosen_Nk, config: Moe, data: int, chunks: int):
    with jax.set_mesh(make_mesh(data=data, expert=DEVICES // data)):
        return compiled(config, data, chunks)(jnp.asarray(chosen_Nk), *operands())


CASES = [
    ("random", FREE, 1),
    ("one device", FREE, 3),
    ("one expert", FREE, 1),
    ("dropped", FREE, 1),
    ("grouped", GROUPED, 1),
]


# By default all cases on two axes in chunks; of the rest the first, or two in chunks.
@pytest.mark.parametrize(
    ("data", "name", "config", "least", "chunks"),
    [
        pytest.param(
            data,
            *case,
            chunks,
            id=f"{case[0]}-{data}-{chunks}",
            marks=pytest.mark.slow if number >= default else (),
        )
        for data, chunks, default in ((1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 5))
        for number, case in enumerate(CASES)
    ],
)
def test_sums_and_gradients(data, name, config, least, chunks, monkeypatch):
    """`least` rounds; rows in all at once and in chunks. Of eight devices, free rows go
    to all of four, but not to all of eight.
    """
    monkeypatch.setattr(dispatch, "TILE", 1)
    monkeypatch.setattr(dispatch, "CHUNK_BYTES", N // DEVICES * K * D * 4 // chunks)
    chosen_Nk, sizes = choices(name), {"data": data, "expert": DEVICES // data}
    least = chunks, min(least, sizes["expert"])
    assert rounds(chosen_Nk, config, d_model=D, **sizes) >= least
    by_all = found(chosen_Nk, config, data, chunks)
    for got, array in zip(by_all, wanted(chosen_Nk), strict=True):
        np.testing.assert_allclose(got, array, atol=1e-5 * np.abs(array).max())


@pytest.mark.parametrize(
    ("devices", "most"), [(1, 1), (2, 2), (8, 4), (16, 8), (64, 8)]
)
def test_destinations_of_v3(devices, most):
    """Four of eight groups: four nodes, however many devices each has."""
    (moe,) = {segment.feed_forward for segment in models.v3().segments[1:]}
    assert dispatch.destinations(moe, devices) == most
    free = replace(moe, groups=None)
    assert dispatch.destinations(free, devices) == min(8, devices)


@pytest.mark.parametrize(
    ("platform", "devices", "to_all"),
    [
        ("tpu", 4, False),
        ("cpu", 4, True),
        ("cpu", 8, False),
        ("gpu", 8, True),
        ("gpu", 16, False),
    ],
)
def test_rows_of_v3_go_to_all(platform, devices, to_all, monkeypatch):
    """Where a token may need each device, but on TPUs; and between the GPUs of a host."""
    (moe,) = {segment.feed_forward for segment in models.v3().segments[1:]}
    device = SimpleNamespace(platform=platform)
    mesh = SimpleNamespace(abstract_device=device)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert dispatch.go_to_all(moe, devices) is to_all


def test_a_group_may_lie_across_devices():
    """Four groups of six experts on three devices of eight: the second and third group
    lie on two devices each."""
    moe = Moe(
        num_experts=24,
        num_shared=0,
        top_k=4,
        width=F,
        groups=Groups(count=4, kept=1, score=GroupScore.MAX),
    )
    assert dispatch.destinations(moe, 3) == 2


@pytest.mark.skipif(DEVICES < 4, reason="needs four devices")
def test_exchange_is_what_it_says(rng):
    """Against numpy, and its gradient is the way back."""
    devices, rows, room = 4, 12, 40
    send = rng.integers(0, 4, (devices, devices)).astype(np.int32)
    start = (np.cumsum(send, axis=1) - send).astype(np.int32)
    x = rng.standard_normal((devices, rows, 3)).astype(np.float32)
    dy = rng.standard_normal((devices, room, 3)).astype(np.float32)

    def local(x, start, send, dy):
        way = lanes(start[0], send[0], rows=rows, rows_away=room, axis="expert")
        y, back = jax.vjp(lambda x: exchange(x, way), x[0])
        return y[None], back(dy[0])[0][None]

    with jax.set_mesh(make_mesh(expert=devices)):
        arrays = [jax.sharding.reshard(a, P("expert")) for a in (x, start, send, dy)]
        mapped = jax.shard_map(
            local,
            in_specs=(P("expert"),) * 4,
            out_specs=(P("expert"),) * 2,
            check_vma=False,
        )
        y, dx = jax.device_get(jax.jit(mapped)(*arrays))

    expected, gradient = np.zeros_like(y), np.zeros_like(dx)
    for here in range(devices):
        place = 0
        for sender in range(devices):
            count, first = send[sender, here], start[sender, here]
            source, target = slice(first, first + count), slice(place, place + count)
            expected[here, target] = x[sender, source]
            gradient[sender, source] = dy[here, target]
            place += count
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(dx, gradient)


@pytest.mark.parametrize("count", [1, 128, 300])
def test_sorted_places_are_argsorts(count, rng):
    """Elements of the last key go nowhere, each to a place of its own."""
    keys = rng.integers(0, 6, count).astype(np.int32)
    place = np.asarray(sorted_places(jnp.asarray(keys), 5, nowhere=1000))
    order = np.argsort(keys, kind="stable")
    real = order[keys[order] < 5]
    np.testing.assert_array_equal(place[real], np.arange(len(real)))
    away = place[keys == 5]
    assert (away >= 1000).all() and len(set(away)) == len(away)
    back = np.asarray(inverse(jnp.asarray(place), count, nowhere=count))
    np.testing.assert_array_equal(back[: len(real)], real)
    assert (back[len(real) :] == count).all()
