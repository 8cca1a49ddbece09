"""Seconds of collectives, worked out by hand on toruses and on a switch."""

from types import SimpleNamespace

import numpy as np
import pytest

from dsjax.plan.network import Dimension, Network, network

LINK = 90e9
GB = 1e9


def devices(*sizes, cores=1):
    """Of a torus, as a mesh has them: the first axis along the first dimension."""
    places = np.ndindex(*sizes, cores)
    found = [SimpleNamespace(coords=p[:-1], core_on_chip=p[-1]) for p in places]
    return np.array([*found, None])[:-1].reshape(*sizes, cores)


def laid(sizes, wraps, mesh, *, cores=1):
    """A torus under the mesh whose axes have the sizes `mesh`, in order."""
    topology = SimpleNamespace(
        torus=sizes,
        wraps=wraps,
        devices_of_chip=cores,
        chip=SimpleNamespace(link=LINK),
    )
    names = tuple("abcd"[: len(mesh)])
    array = devices(*sizes, cores=cores).reshape(mesh)
    shape = dict(zip(names, mesh))
    return network(
        topology, SimpleNamespace(devices=array, axis_names=names, shape=shape)
    )


def test_an_axis_over_two_rings_has_four_links():
    found = laid((8, 8, 4), (True, True, True), (64, 4))
    assert found.dimensions["a"] == (Dimension(8, 2), Dimension(8, 2))
    assert found.dimensions["b"] == (Dimension(4, 2),)
    assert found.of("all-gather", ("a",), GB) == pytest.approx(
        63 / 64 * GB / (4 * LINK)
    )
    both = found.of("all-reduce", ("a", "b"), GB)
    assert both == pytest.approx(2 * 255 / 256 * GB / (6 * LINK))


def test_open_ends_and_parts_of_a_dimension_are_lines():
    found = laid((8, 4), (False, True), (8, 2, 2))
    assert found.dimensions["a"] == (Dimension(8, 1),)
    assert found.dimensions["b"] == (Dimension(2, 1),)
    assert found.of("reduce-scatter", ("a",), GB) == pytest.approx(7 / 8 * GB / LINK)


def test_an_all_to_all_crosses_the_bisection():
    """Half of the devices send half of their bytes over the cut: of a ring of 8, 4 x
    0.5 GB over two links; of a line over one.
    """
    ring, line = (laid((8,), (wraps,), (8,)) for wraps in (True, False))
    assert ring.of("all-to-all", ("a",), GB) == pytest.approx(2 * GB / (2 * LINK))
    assert line.of("ragged-all-to-all", ("a",), GB) == pytest.approx(2 * GB / LINK)
    flat = laid((4, 8), (True, True), (32,))  # the longer dimension is the narrow one
    assert flat.of("all-to-all", ("a",), GB) == pytest.approx(2 * GB / (2 * LINK))


def test_two_devices_of_a_chip_share_its_links():
    found = laid((2, 2), (False, False), (4, 2), cores=2)
    assert found.link == LINK / 2
    assert found.dimensions["b"] == (Dimension(2, 1),)


def test_a_switch():
    found = Network(sizes={"a": 8}, dimensions={"a": ()}, link=450e9)
    assert found.of("all-gather", ("a",), GB) == pytest.approx(7 / 8 * GB / 450e9)
    assert found.of("all-to-all", ("a",), GB) == pytest.approx(7 / 8 * GB / 450e9)


def test_seconds_add_up():
    found = Network(sizes={"a": 8}, dimensions={"a": ()}, link=450e9)
    sent = {("all-gather", ("a",)): GB, ("collective-permute", ("a",)): GB}
    assert found.seconds(sent) == pytest.approx((7 / 8 + 1) * GB / 450e9)
