"""Redundant experts: hot ones get replicas, and replicas are packed evenly on devices.

V3 serves with 32 redundant experts for prefill (2412.19437, section 3.4), chosen anew
every few minutes from the loads seen. Where node-limited routing lets groups stay
together, groups are first packed onto nodes, so that replicas of an expert share one.

Letters: L layers, E experts, R slots (one expert's weights each), in device order.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dsjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """`expert_LR` is the expert in each slot; device d has slots d x R / devices on.

    `replicas_LE` counts the slots that each expert has, one at least.
    """

    expert_LR: Int[np.ndarray, "L R"]
    replicas_LE: Int[np.ndarray, "L E"]

    def device_load(
        self, load_LE: Float[np.ndarray, "L E"], *, devices: int
    ) -> Float[np.ndarray, "L devices"]:
        """Each device's load when replicas share their expert's evenly."""
        share_LE = np.asarray(load_LE, np.float64) / self.replicas_LE
        share_LR = np.take_along_axis(share_LE, self.expert_LR, axis=1)
        return share_LR.reshape(len(share_LR), devices, -1).sum(axis=-1)


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
    return Placement(expert_LR=expert_LR, replicas_LE=np.stack(counts))


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
