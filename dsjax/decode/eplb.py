"""Redundant experts: hot ones get replicas, and replicas are packed evenly on devices.

V3 serves with 32 redundant experts for prefill (2412.19437, section 3.4), chosen anew
every few minutes from the loads seen. Where node-limited routing lets groups stay
together, groups are first packed onto nodes, so that replicas of an expert share one.

Letters: L layers, E experts, R slots (one expert's weights each), in device order.
"""

import json
from dataclasses import dataclass

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from dsjax.config import ModelConfig, Moe
from dsjax.errors import UserError
from dsjax.nn.replicas import Placement


@dataclass(frozen=True, kw_only=True)
class Redundant:
    """What `dsjax.load` places experts by.

    loads: how often each expert of each MoE layer was chosen, [L, E], or a JSON file
    with such rows. experts: how many slots there are beyond one each. nodes: of equally
    many devices, each with fast links within.
    """

    loads: Float[np.ndarray, "L E"] | epath.PathLike
    experts: int
    nodes: int = 1

    def rows(self) -> Float[np.ndarray, "L E"]:
        """The loads as an array. Raises UserError for a file without rows of numbers."""
        if isinstance(self.loads, np.ndarray):
            return self.loads.astype(np.float64)
        try:
            return np.array(json.loads(epath.Path(self.loads).read_text()), np.float64)
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{self.loads}: no rows of loads: {error}") from None

    def place(self, config: ModelConfig, devices: int) -> Placement:
        """The slots of the model's MoE layers on the devices of the expert axis.

        Raises UserError for loads of another model, and for sizes that do not divide.
        """
        load_LE, moe = self.rows(), _mixture(config)
        layers = sum(
            s.count for s in config.segments if isinstance(s.feed_forward, Moe)
        )
        if load_LE.shape != (layers, moe.num_experts):
            raise UserError(
                f"loads of shape {list(load_LE.shape)}, {config.name} has "
                f"{layers} MoE layers of {moe.num_experts} experts"
            )
        return place(
            load_LE,
            slots=moe.num_experts + self.experts,
            devices=devices,
            nodes=self.nodes,
            groups=moe.groups.count if moe.groups else 1,
        )

    def balance(
        self, config: ModelConfig, devices: int
    ) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]]:
        """The busiest device's load over the mean one, in each layer: with experts in
        their order, and as they are placed.
        """
        load_LE = self.rows()
        plain = load_LE.reshape(len(load_LE), devices, -1).sum(axis=-1)
        placed = self.place(config, devices).device_load(load_LE, devices=devices)
        before, after = (x.max(axis=1) / x.mean(axis=1) for x in (plain, placed))
        return before, after


def _mixture(config: ModelConfig) -> Moe:
    """What all of the model's MoE layers are."""
    kinds = {s.feed_forward for s in config.segments if isinstance(s.feed_forward, Moe)}
    if len(kinds) != 1:
        raise UserError(f"{config.name} has {len(kinds)} kinds of MoE layers, not one")
    return kinds.pop()


def place(
    load_LE: Float[np.ndarray, "L E"],
    *,
    slots: int,
    devices: int,
    nodes: int = 1,
    groups: int = 1,
) -> Placement:
    """Where experts go, given how often each was chosen.

    `slots` and `devices` count all nodes'. When `nodes` divides `groups`, whole groups
    stay on one node; otherwise all devices are treated alike. Raises UserError for
    sizes that do not divide.
    """
    load_LE = np.asarray(load_LE, np.float64)
    experts = load_LE.shape[1]
    if groups % nodes:
        groups = nodes = 1
    for name, small, large in [
        ("groups", groups, experts),
        ("nodes", nodes, devices),
        ("devices", devices, slots),
    ]:
        if large % small:
            raise UserError(f"{name}={small} must divide {large}")
    if slots < experts:
        raise UserError(f"slots={slots} are fewer than the experts, {experts}")
    placed = [_place_layer(load_E, slots, devices, nodes, groups) for load_E in load_LE]
    expert_LR = np.stack(placed)
    counts = [np.bincount(expert_R, minlength=experts) for expert_R in expert_LR]
    return Placement(expert_LR=expert_LR, replicas_LE=np.stack(counts), nodes=nodes)


def _place_layer(
    load_E: np.ndarray, slots: int, devices: int, nodes: int, groups: int
) -> np.ndarray:
    """The expert of every slot: groups onto nodes, replicas within a node, replicas
    onto its devices.
    """
    members = np.arange(len(load_E)).reshape(groups, -1)
    parts = []
    for chosen in pack(load_E[members].sum(axis=1), nodes):
        experts = members[chosen].reshape(-1)
        copies = experts[replicate(load_E[experts], slots // nodes)]
        share = load_E[copies] / np.bincount(copies, minlength=len(load_E))[copies]
        parts += [copies[rows] for rows in pack(share, devices // nodes)]
    return np.concatenate(parts)


def pack(weights: Float[np.ndarray, " n"], packs: int) -> Int[np.ndarray, "packs m"]:
    """Indices in `packs` packs of equal number and nearly equal weight: the heaviest
    first, each onto the lightest pack that has room.
    """
    size = len(weights) // packs
    members: list[list[int]] = [[] for _ in range(packs)]
    total = np.zeros(packs)
    for index in np.argsort(-weights, kind="stable"):
        free = [p for p in range(packs) if len(members[p]) < size]
        best = min(free, key=lambda p: total[p])
        members[best].append(int(index))
        total[best] += weights[index]
    return np.array(members)


def replicate(load_E: Float[np.ndarray, " E"], slots: int) -> Int[np.ndarray, " slots"]:
    """One slot for each expert, and each further one for the expert whose replicas are
    the busiest.
    """
    counts, order = np.ones(len(load_E)), list(range(len(load_E)))
    for _ in range(slots - len(load_E)):
        busiest = int(np.argmax(load_E / counts))
        order.append(busiest)
        counts[busiest] += 1
    return np.array(order)
