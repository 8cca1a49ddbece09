"""V2's token dropping (arXiv 2405.04434, section 2.2.4): a bound on a device's work.

Letters: B batch, T length, k chosen experts, M rows (one for each token and choice).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Bool, Float, Int

from dsjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Dropping:
    """Each of `devices` groups of experts takes at most `capacity` times its even share
    of the rows, those of highest affinity; a share `protected` of the sequences is never
    dropped from.
    """

    devices: int
    capacity: float = 1.0
    protected: float = 0.1


def kept_rows(
    dropping: Dropping,
    indices_BTk: Int[Array, "B T k"],
    affinities_BTk: Float[Array, "B T k"],
    protected_B: Bool[Array, " B"],
    *,
    experts: int,
) -> Bool[Array, "B T k"]:
    """Which of the tokens' choices are computed, of the batch over all devices.

    Rows of protected sequences take their places first, and stay even when they are
    more than the capacity. Equal affinities: the earlier row stays.

    Raises UserError when the groups of experts would not be equal.
    """
    if experts % dropping.devices:
        raise UserError(
            f"dropping.devices={dropping.devices} must divide num_experts={experts}"
        )
    shape, spec = indices_BTk.shape, jax.typeof(indices_BTk).sharding.spec
    protected_BTk = jnp.broadcast_to(
        protected_B[:, None, None], shape, out_sharding=spec
    )
    # The order is one of all rows, so every device works it out for itself.
    device_M, affinity_M, protected_M = (
        reshard(rows_BTk, P()).reshape(-1)
        for rows_BTk in (
            indices_BTk // (experts // dropping.devices),
            affinities_BTk,
            protected_BTk,
        )
    )
    order_M = jnp.lexsort((-affinity_M, ~protected_M, device_M))
    rows_D = jnp.bincount(device_M, length=dropping.devices)
    first_D = jnp.cumsum(rows_D) - rows_D
    rank_M = jnp.argsort(order_M) - first_D[device_M]
    capacity = int(dropping.capacity * device_M.size / dropping.devices)
    kept_M = (rank_M < capacity) | protected_M
    return reshard(kept_M.reshape(shape), spec)
