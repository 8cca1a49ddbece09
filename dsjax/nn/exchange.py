"""Sending rows between the devices of a mesh axis: uneven numbers of them, or all.

Everything here runs inside `shard_map`. Letters: P devices of the axis, N rows of each.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Lanes:
    """Which rows of this device go where, and which come here.

    send: `send_P[d]` rows from `start_P[d]` on go to device d. receive: `receive_P[s]`
    rows of device s land here from `land_P[s]` on. `away_P[d]` is where this device's
    rows start on device d, `origin_P[s]` where the rows of s started there: what the
    other side knows as its `land` and `start`. `rows`: of this device's buffer,
    `rows_away`: of a receiving one.
    """

    start_P: Any
    send_P: Any
    away_P: Any
    land_P: Any
    receive_P: Any
    origin_P: Any
    rows: int = field(metadata={"static": True})
    rows_away: int = field(metadata={"static": True})
    axis: str = field(metadata={"static": True})

    @property
    def back(self) -> "Lanes":
        """The way home."""
        return replace(
            self,
            start_P=self.land_P,
            send_P=self.receive_P,
            away_P=self.origin_P,
            land_P=self.start_P,
            receive_P=self.send_P,
            origin_P=self.away_P,
            rows=self.rows_away,
            rows_away=self.rows,
        )


def lanes(
    start_P: Int[Array, " P"],
    send_P: Int[Array, " P"],
    *,
    rows: int,
    rows_away: int,
    axis: str,
) -> Lanes:
    """Lanes that fill each device's buffer from the front, device 0's rows first.

    The numbers travel by an all-gather of 2 P integers a device.
    """
    me = jax.lax.axis_index(axis)
    everyone = jax.lax.all_gather(jnp.stack([start_P, send_P]), axis)  # [P, 2, P]
    start_PP, send_PP = everyone[:, 0], everyone[:, 1]  # from, to
    before_PP = jnp.cumsum(send_PP, axis=0) - send_PP
    return Lanes(
        start_P=start_P,
        send_P=send_P,
        away_P=before_PP[me],
        land_P=before_PP[:, me],
        receive_P=send_PP[:, me],
        origin_P=start_PP[:, me],
        rows=rows,
        rows_away=rows_away,
        axis=axis,
    )


@jax.custom_vjp
def exchange(
    x: Float[Array, "rows ..."], lanes: Lanes
) -> Float[Array, "rows_away ..."]:
    """The rows that the others sent here; zeros where none landed.

    The gradient goes the same lanes back.
    """
    assert x.shape[0] == lanes.rows, (x.shape, lanes.rows)
    return jax.lax.platform_dependent(
        x,
        jnp.zeros((lanes.rows_away, *x.shape[1:]), x.dtype),
        lanes.start_P,
        lanes.send_P,
        lanes.away_P,
        lanes.receive_P,
        cpu=_by_gathering(lanes.axis),
        default=_native(lanes.axis),
    )


def _exchange_forward(x, lanes):
    return exchange(x, lanes), lanes


def _exchange_backward(lanes, dy):
    return exchange(dy, lanes.back), None


exchange.defvjp(_exchange_forward, _exchange_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: Num[Array, "N ..."], axis: str) -> Num[Array, "PN ..."]:
    """The rows of all devices, device 0's first."""
    return jax.lax.all_gather(x, axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def collect(y: Float[Array, "PN ..."], axis: str) -> Float[Array, "N ..."]:
    """Each device's own rows, summed in float32 over what the devices have for them."""
    y = jax.lax.all_to_all(y, axis, 0, 0, tiled=True)
    devices = jax.lax.axis_size(axis)
    return y.reshape(devices, -1, *y.shape[1:]).astype(jnp.float32).sum(axis=0)


# The empty arrays carry dtypes from one direction to the other.


def _spread_forward(x, axis):
    return spread(x, axis), jnp.zeros(0, x.dtype)


def _spread_backward(axis, like, dy):
    return (collect(dy, axis).astype(like.dtype),)


def _collect_forward(y, axis):
    return collect(y, axis), jnp.zeros(0, y.dtype)


def _collect_backward(axis, like, dx):
    return (spread(dx.astype(like.dtype), axis),)


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


def _native(axis: str):
    def ragged_all_to_all(*arrays: Array) -> Array:
        return jax.lax.ragged_all_to_all(*arrays, axis_name=axis)

    return ragged_all_to_all


def _by_gathering(axis: str):
    """`jax.lax.ragged_all_to_all` for CPUs, where XLA has none."""

    def ragged_all_to_all(operand, output, start_P, send_P, away_P, receive_P):
        me = jax.lax.axis_index(axis)
        numbers = jnp.stack([start_P, send_P, away_P])
        start, send, land = jax.lax.all_gather(numbers, axis)[:, :, me].T
        place = jnp.arange(output.shape[0])[:, None]
        from_PP = (place >= land) & (place < land + send)  # [rows, P]
        source = jnp.argmax(from_PP, axis=1)
        row = start[source] + place[:, 0] - land[source]
        arrived = jax.lax.all_gather(operand, axis)[source, row]
        here = from_PP.any(axis=1).reshape(-1, *(1,) * (output.ndim - 1))
        return jnp.where(here, arrived, output)

    return ragged_all_to_all
