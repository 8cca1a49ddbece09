"""Experts whose weights lie in several slots, and which of them a row goes to.

For inference: routers know experts, devices hold slots. Between the two each chosen
expert becomes one of its slots, the next one for each further token.

Letters: L layers, E experts, R slots in device order, X slots of one expert at most, N
tokens, k chosen experts.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import Groups, GroupScore, Moe


@dataclass(frozen=True, kw_only=True)
class Slots:
    """How many there are, and on how many nodes that hold whole groups of experts (1:
    groups do not matter).
    """

    count: int
    nodes: int = 1

    def moe(self, config: Moe) -> Moe:
        """`config` as the devices see it: slots for experts, nodes for groups. A token's
        rows go to the nodes of its groups, at most, and anywhere on them.
        """
        groups = None
        if config.groups is not None and self.nodes > 1:
            kept = min(config.groups.kept, self.nodes)
            groups = Groups(count=self.nodes, kept=kept, score=GroupScore.MAX)
        return replace(config, num_experts=self.count, groups=groups)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`expert_LR` is the expert in each slot; device d has slots d x R / devices on.

    `replicas_LE` counts the slots that each expert has, one at least. Whole groups of
    experts are on one of `nodes`, equal runs of slots.
    """

    expert_LR: Int[np.ndarray, "L R"]
    replicas_LE: Int[np.ndarray, "L E"]
    nodes: int = 1

    def device_load(
        self, load_LE: Float[np.ndarray, "L E"], *, devices: int
    ) -> Float[np.ndarray, "L devices"]:
        """Each device's load when replicas share their expert's evenly."""
        share_LE = np.asarray(load_LE, np.float64) / self.replicas_LE
        share_LR = np.take_along_axis(share_LE, self.expert_LR, axis=1)
        return share_LR.reshape(len(share_LR), devices, -1).sum(axis=-1)

    @property
    def slots(self) -> Slots:
        """What a model is built with."""
        return Slots(count=self.expert_LR.shape[1], nodes=self.nodes)

    def table(self) -> Int[np.ndarray, "L E X"]:
        """The slots of every expert; -1 past the last."""
        (layers, slots), experts = self.expert_LR.shape, self.replicas_LE.shape[1]
        table_LEX = np.full((layers, experts, slots - experts + 1), -1, np.int32)
        for expert_R, table_EX in zip(self.expert_LR, table_LEX):
            for expert, row_X in enumerate(table_EX):
                (where,) = np.nonzero(expert_R == expert)
                row_X[: len(where)] = where
        return table_LEX


class SlotTable(nnx.Variable):
    """The slots of every expert of a layer, int32 [E, X]: no weight, and not saved."""


def empty_table(config: Moe, slots: Slots) -> SlotTable:
    """A table to be filled when weights are loaded."""
    most = slots.count - config.num_experts + 1
    return SlotTable(jnp.full((config.num_experts, most), -1, jnp.int32))


def to_slots(
    chosen_Nk: Int[Array, "N k"],
    table_EX: Int[Array, "E X"],
    *,
    slots: int,
    batch: tuple[str, ...],
) -> Int[Array, "N k"]:
    """The slot of each chosen expert; `slots` for an expert that does not exist.

    Inside `shard_map`. Tokens take an expert's slots in turn, counted over the devices
    of the axes `batch`: where each has one token, they do not all take the first.
    """
    N = chosen_Nk.shape[0]
    first = jax.lax.axis_index(batch) * N if batch else 0
    place_NkX = table_EX.at[chosen_Nk].get(mode="fill", fill_value=slots)
    replicas_Nk = (place_NkX >= 0).sum(axis=-1)
    turn_Nk = (first + jnp.arange(N))[:, None] % replicas_Nk
    return jnp.take_along_axis(place_NkX, turn_Nk[..., None], axis=-1)[..., 0]
