"""How long collectives take on a torus, or on a switch.

A mesh axis spans dimensions of the torus. A dimension that it spans whole and whose ends
are joined is a ring with two links a device, else a line with one. Rings of several
dimensions carry their parts at the same time. Nothing overlaps with anything else, and a
message has no latency: a lower bound for large messages.

With n devices along the axes, W bytes/s into a device over all their links:

- all-gather and reduce-scatter move (n - 1) / n of the whole array, over W;
- an all-reduce is both;
- an all-to-all crosses the bisection: a dimension of size m with l links (2 in a ring, 1
  in a line) takes bytes * m / (4 * l * link), the slowest dimension counts; on a switch
  (n - 1) / n of the bytes leave over the one port;
- a permutation sends its bytes over one link.
"""

import math
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from dsjax.plan.collectives import (
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    RAGGED_ALL_TO_ALL,
    Sent,
)
from dsjax.plan.topology import Topology


@dataclass(frozen=True)
class Dimension:
    """A part of the torus that a mesh axis spans: devices along it, links of each."""

    size: int
    links: int


@dataclass(frozen=True, kw_only=True)
class Network:
    """The dimensions behind each mesh axis; none on a switch. `link`: bytes/s one way
    that a device has over one link (on a switch over its port).
    """

    sizes: dict[str, int]
    dimensions: dict[str, tuple[Dimension, ...]]
    link: float

    def seconds(self, sent: Sent) -> float:
        """One after the other, the collectives of one run."""
        return sum(self.of(kind, axes, size) for (kind, axes), size in sent.items())

    def of(self, kind: str, axes: tuple[str, ...], size: float) -> float:
        """Of `size` bytes, by the convention of `dsjax.plan.collectives`."""
        count = math.prod(self.sizes[axis] for axis in axes)
        share = (count - 1) / count
        dimensions = [d for axis in axes for d in self.dimensions[axis]]
        width = self.link * (sum(d.links for d in dimensions) or 1)
        if kind in (ALL_TO_ALL, RAGGED_ALL_TO_ALL):
            if not dimensions:
                return share * size / width
            return max(size * d.size / (4 * d.links * self.link) for d in dimensions)
        if kind == PERMUTE:
            return size / self.link
        return share * size / width * (2 if kind == ALL_REDUCE else 1)


def network(topology: Topology, mesh: Mesh) -> Network:
    """How the mesh lies on the hardware, by the coordinates of its devices.

    Devices of one chip share its links. Between them there is a faster way, which counts
    as one more dimension with one link.
    """
    dimensions = {
        axis: _spanned(topology, np.moveaxis(mesh.devices, place, 0))
        for place, axis in enumerate(mesh.axis_names)
    }
    return Network(
        sizes=dict(mesh.shape),
        dimensions=dimensions,
        link=topology.chip.link / topology.devices_of_chip,
    )


def _spanned(topology: Topology, devices: np.ndarray) -> tuple[Dimension, ...]:
    """What the first axis of a mesh spans, seen along its first devices."""
    if not topology.torus:
        return ()
    line = devices.reshape(len(devices), -1)[:, 0]
    places = np.array(
        [(*d.coords[: len(topology.torus)], d.core_on_chip) for d in line]
    )
    found = []
    sizes = (*topology.torus, topology.devices_of_chip)
    wraps = (*topology.wraps, False)
    for column, size, wrap in zip(places.T, sizes, wraps, strict=True):
        if (count := len(set(column.tolist()))) > 1:
            ring = wrap and count == size
            found.append(Dimension(size=count, links=2 if ring else 1))
    return tuple(found)
