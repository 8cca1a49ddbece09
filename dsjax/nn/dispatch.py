"""Expert parallelism: rows travel to the devices that hold their experts, and back.

A token's row crosses once to each device that holds any of its experts, with the choices
and affinities beside it; there it fans out to those experts, and their weighted sum comes
back. V2's device-limited and V3's node-limited routing bound the number of devices (V2,
section 2.2.2; V3, section 2.1.2). Where they do not, and each device may be needed by
each token, all rows go to all devices: about as many, with nothing to plan, by collectives
of fixed sizes. So they do between the GPUs of a host, and never between TPUs.

Shapes are static and no row is lost, whatever the routing. A device has room for SLACK
times the rows that even routing brings; what does not fit waits for a further round, and
there are as many rounds as the fullest device needs: one, usually. Many tokens go in
chunks, so that the buffers stay small; a chunk is computed again for its gradient. Where
memory allows it they go at once, and nothing is.

Everything here runs inside `shard_map`, with the tokens cut along `expert`. Letters: N
tokens of this device, D model, k chosen experts, P devices of the axis, J rows to send,
M rows that a device has room for (of tokens, and of tokens times their experts).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import Moe
from dsjax.nn.exchange import Lanes, collect, exchange, lanes, spread
from dsjax.nn.groups import equal_parts
from dsjax.nn.rows import (
    count,
    first_places,
    gather_rows,
    inverse,
    sorted_places,
    sum_rows,
)
from dsjax.sharding import AXES, platform

AXIS = "expert"
SLACK = 1.25
TILE = 128  # the room is a multiple of it, or rows are copied for their alignment
CHUNK_BYTES = 2**28  # of rows that even routing brings to a device, and of them
GPUS_OF_A_HOST = 8  # at most
CHUNK_ROWS = 4096  # an expert: its weights are read for enough, more takes memory alone

Experts = Callable[..., Float[Array, "N D"]]
Weights = tuple[Array, ...]


def dispatched(
    apply: Experts,
    x_ND: Float[Array, "N D"],
    chosen_Nk: Int[Array, "N k"],
    affinity_Nk: Float[Array, "N k"],
    weights: Weights,
    config: Moe,
    *,
    at_once: bool = False,
) -> Float[Array, "N D"]:
    """Each token's weighted sum over its chosen experts, on all devices of the axis, in
    float32.

    `apply` computes it for rows and experts that are on one device:
    `dsjax.nn.experts.apply_experts`. `weights` are this device's, `chosen` counts the
    experts of all; one that does not exist is skipped. `at_once`: never in chunks.
    """
    rows, k = chosen_Nk.shape
    here = weights[0].shape[0]
    row_bytes = k * x_ND.shape[1] * x_ND.dtype.itemsize
    chunks = 1 if at_once else _chunks(rows, row_bytes, k / here)
    one = functools.partial(_chunk, apply, config)
    if chunks == 1:
        return one(x_ND, chosen_Nk, affinity_Nk, weights)
    return _in_chunks(one, chunks, x_ND, chosen_Nk, affinity_Nk, weights)


def destinations(config: Moe, devices: int) -> int:
    """The most devices that a token's experts lie on."""
    most = min(config.top_k, devices)
    if config.groups is None:
        return most
    apiece = config.num_experts // devices
    size = config.num_experts // config.groups.count
    spans = (
        (first + size - 1) // apiece - first // apiece + 1
        for first in range(0, config.num_experts, size)
    )
    return min(most, config.groups.kept * max(spans))


def go_to_all(config: Moe, devices: int) -> bool:
    """Whether rows go to all devices of the axis: if each may have to, but on TPUs, which
    exchange uneven numbers by themselves; and between GPUs of one host, whose links are
    quick and XLA's uneven exchange is not (benchmarks/gpus.md).
    """
    match platform():
        case "tpu":
            return False
        case "gpu" if devices <= GPUS_OF_A_HOST:
            return True
    return destinations(config, devices) == devices


def _chunks(rows: int, row_bytes: int, expert_rows: float) -> int:
    """The fewest equal chunks of tokens within CHUNK_BYTES and CHUNK_ROWS, if there are
    such. A token has `row_bytes` and `expert_rows` of them on average.
    """
    most = max(rows * row_bytes / CHUNK_BYTES, rows * expert_rows / CHUNK_ROWS)
    return equal_parts(rows, math.ceil(most))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Who gets which row in which round.

    The J rows are sorted by device. token: each one's token, N past the last. places: a
    token's rows. device: where a row goes, P past the last. round: when. start: where a
    device's rows begin. rounds: how many there are, the same on all devices.
    """

    token_J: Any
    places_NR: Any
    device_J: Any
    round_J: Any
    start_P: Any
    rounds: Any
    room: int = field(metadata={"static": True})

    def lanes(self, number: Array | int) -> Lanes:
        """Where rows go in one round."""
        devices, (rows,) = self.start_P.shape[0], self.token_J.shape
        earlier = jnp.where(self.round_J < number, self.device_J, devices)
        now = jnp.where(self.round_J == number, self.device_J, devices)
        start_P = self.start_P + count(earlier, devices)
        return lanes(
            start_P, count(now, devices), rows=rows, rows_away=self.room, axis=AXIS
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _ToAll:
    """All rows are on all devices. here: the chosen experts that are on this one, -1 for
    others. round: when a row's turn is. rounds, room: as in `_Plan`.
    """

    here_Mk: Any
    round_M: Any
    rounds: Any
    room: int = field(metadata={"static": True})


def _room(chosen_Nk: Array, config: Moe) -> tuple[int, int]:
    """Rows of experts that a device has room for, and how many of one token."""
    (N, k), P = chosen_Nk.shape, jax.lax.axis_size(AXIS)
    at_once = min(k, config.num_experts // P)
    room = math.ceil((SLACK * N * k + at_once) / TILE) * TILE
    return min(room, P * N * at_once), at_once


def _plan(chosen_Nk: Array, config: Moe) -> _Plan | _ToAll:
    """Who gets which row when: a device's rows in order, until their experts there fill
    its room.
    """
    if go_to_all(config, jax.lax.axis_size(AXIS)):
        return _to_all(chosen_Nk, config)
    return _to_some(chosen_Nk, config)


def _to_all(chosen_Nk: Array, config: Moe) -> _ToAll:
    room, at_once = _room(chosen_Nk, config)
    apiece = config.num_experts // jax.lax.axis_size(AXIS)
    chosen_Mk = spread(chosen_Nk, AXIS)
    here_Mk = chosen_Mk - jax.lax.axis_index(AXIS) * apiece
    here_Mk = jnp.where((here_Mk >= 0) & (here_Mk < apiece), here_Mk, -1)
    experts_M = (here_Mk >= 0).sum(axis=1, dtype=jnp.int32)
    round_M = (jnp.cumsum(experts_M) - experts_M) // (room - at_once + 1)
    rounds = jax.lax.pmax(round_M.max() + 1, AXES)
    return _ToAll(here_Mk=here_Mk, round_M=round_M, rounds=rounds, room=room)


def _to_some(chosen_Nk: Array, config: Moe) -> _Plan:
    (N, k), P = chosen_Nk.shape, jax.lax.axis_size(AXIS)
    apiece, most = config.num_experts // P, destinations(config, P)
    room, at_once = _room(chosen_Nk, config)

    device_Nk = jnp.where(chosen_Nk < config.num_experts, chosen_Nk // apiece, P)
    device_Nk = jnp.sort(device_Nk, axis=1)
    new_Nk = jnp.diff(device_Nk, axis=1, prepend=-1) != 0
    new_Nk &= device_Nk < P
    same_Nkk = device_Nk[:, :, None] == device_Nk[:, None]
    experts_Nk = jnp.where(new_Nk, same_Nkk.sum(axis=2, dtype=jnp.int32), 0)

    key = jnp.where(new_Nk, device_Nk, P).reshape(-1)
    place = sorted_places(key, P, nowhere=N * most)
    order_J = inverse(place, N * most, nowhere=N * k)
    device_J = key.at[order_J].get(mode="fill", fill_value=P)
    experts_J = experts_Nk.reshape(-1).at[order_J].get(mode="fill", fill_value=0)
    rows_P, experts_P = count(key, P), count(device_Nk, P)

    # Where each row's experts come in the order of its device, over all senders.
    everyone_PP = jax.lax.all_gather(experts_P, AXIS)
    before_P = (jnp.cumsum(everyone_PP, axis=0) - everyone_PP)[jax.lax.axis_index(AXIS)]
    earlier_J = jnp.cumsum(experts_J) - experts_J
    offset_P = before_P - (jnp.cumsum(experts_P) - experts_P)
    position_J = earlier_J + offset_P[jnp.minimum(device_J, P - 1)]
    fill = room - at_once + 1  # the last row of a round may bring more than one
    rounds = -(-everyone_PP.sum(axis=0).max() // fill)
    return _Plan(
        token_J=order_J // k,
        places_NR=first_places(place.reshape(N, k), most, nowhere=N * most),
        device_J=device_J,
        round_J=position_J // fill,
        start_P=jnp.cumsum(rows_P) - rows_P,
        # All of the mesh: collectives elsewhere must not meet devices still at theirs.
        rounds=jax.lax.pmax(rounds, AXES),
        room=room,
    )


def _round(apply, plan, number, x_ND, chosen_Nk, affinity_Nk, weights):
    """What the rows of one round add to their tokens."""
    options = {"most": plan.room, "expected": chosen_Nk.size}
    if isinstance(plan, _ToAll):
        here_Mk = jnp.where(plan.round_M[:, None] == number, plan.here_Mk, -1)
        x_MD, affinity_Mk = (spread(rows, AXIS) for rows in (x_ND, affinity_Nk))
        y_MD = apply(x_MD, here_Mk, affinity_Mk, weights, **options)
        return collect(y_MD.astype(x_ND.dtype), AXIS)
    there, k = plan.lanes(number), chosen_Nk.shape[1]
    told_N2k = jnp.concatenate([chosen_Nk.astype(jnp.float32), affinity_Nk], axis=1)
    x_MD, told_M2k = (
        exchange(gather_rows(rows, plan.token_J, plan.places_NR), there)
        for rows in (x_ND, told_N2k)
    )
    first = jax.lax.axis_index(AXIS) * weights[0].shape[0]
    real_M = jnp.arange(plan.room) < there.receive_P.sum()
    here_Mk = told_M2k[:, :k].astype(jnp.int32) - first
    y_MD = apply(
        x_MD,
        jnp.where(real_M[:, None], here_Mk, -1),
        told_M2k[:, k:],
        weights,
        **options,
    )
    y_JD = exchange(y_MD.astype(x_ND.dtype), there.back)
    return sum_rows(y_JD, plan.places_NR, plan.token_J)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunk(apply, config, x_ND, chosen_Nk, affinity_Nk, weights):
    """All rounds of some tokens. Their number is data: what one round keeps for its
    gradient is kept of the first alone, later ones are computed again.
    """
    return _chunk_forward(apply, config, x_ND, chosen_Nk, affinity_Nk, weights)[0]


def _chunk_forward(apply, config, x_ND, chosen_Nk, affinity_Nk, weights):
    plan = _plan(chosen_Nk, config)
    step = _stepper(apply, plan, chosen_Nk)
    first, back = jax.vjp(functools.partial(step, 0), x_ND, affinity_Nk, weights)

    def further(state):
        number, y_ND = state
        return number + 1, y_ND + step(number, x_ND, affinity_Nk, weights)

    _, y_ND = jax.lax.while_loop(lambda s: s[0] < plan.rounds, further, (1, first))
    return y_ND, (back, plan, x_ND, chosen_Nk, affinity_Nk, weights)


def _chunk_backward(apply, config, saved, dy_ND):
    back, plan, x_ND, chosen_Nk, affinity_Nk, weights = saved
    step = _stepper(apply, plan, chosen_Nk)

    def further(state):
        number, sums = state
        one = functools.partial(step, number)
        _, back = jax.vjp(one, x_ND, affinity_Nk, weights)
        return number + 1, jax.tree.map(jnp.add, sums, back(dy_ND))

    start = 1, back(dy_ND)
    _, (dx_ND, daffinity_Nk, dweights) = jax.lax.while_loop(
        lambda s: s[0] < plan.rounds, further, start
    )
    return dx_ND, None, daffinity_Nk, dweights


_chunk.defvjp(_chunk_forward, _chunk_backward)


def _stepper(apply, plan, chosen_Nk):
    """One round as a function of its number and of what has a gradient."""

    def step(number, x_ND, affinity_Nk, weights):
        return _round(apply, plan, number, x_ND, chosen_Nk, affinity_Nk, weights)

    return step


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(one, chunks, x_ND, chosen_Nk, affinity_Nk, weights):
    """`one(x, chosen, affinity, weights)` over chunks of tokens, one after the other.
    The weights' gradient is summed in float32.
    """

    def body(_, part):
        return None, one(*part, weights)

    parts = _split((x_ND, chosen_Nk, affinity_Nk), chunks)
    return _join(jax.lax.scan(body, None, parts)[1])


def _in_chunks_forward(one, chunks, *operands):
    return _in_chunks(one, chunks, *operands), operands


def _in_chunks_backward(one, chunks, saved, dy_ND):
    *rows, weights = saved

    def body(sums, part):
        x, chosen, affinity, dy = part
        _, back = jax.vjp(lambda x, a, w: one(x, chosen, a, w), x, affinity, weights)
        dx, daffinity, dweights = back(dy)
        return jax.tree.map(jnp.add, sums, dweights), (dx, daffinity)

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weights)
    sums, found = jax.lax.scan(body, zeros, _split((*rows, dy_ND), chunks))
    dx_ND, daffinity_Nk = _join(found)
    dweights = jax.tree.map(lambda s, w: s.astype(w.dtype), sums, weights)
    return dx_ND, None, daffinity_Nk, dweights


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _split(arrays, chunks: int):
    return jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), arrays)


def _join(arrays):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
