"""Redundant experts: every expert is somewhere, hot ones more than once, devices even."""

import itertools

import numpy as np
import pytest

from dsjax.decode.eplb import pack, place, replicate
from dsjax.errors import UserError

LOAD_LE = np.random.default_rng(0).pareto(1.5, (3, 32)) + 0.1


def test_replicas_go_where_the_load_is():
    """By hand: 90 is split in three before 40 in two; 30 would be next."""
    slots = replicate(np.array([90.0, 30.0, 40.0, 5.0]), 7)
    assert sorted(slots.tolist()) == [0, 0, 0, 1, 2, 2, 3]


def test_pack_by_hand():
    """7 | 6 | 5 first, then 4 to the 5, 3 to the 6, 2 to the 7."""
    packs = pack(np.array([2.0, 7.0, 5.0, 3.0, 6.0, 4.0]), 3)
    assert sorted(map(sorted, packs.tolist())) == [[0, 1], [2, 5], [3, 4]]


@pytest.mark.parametrize(("nodes", "groups"), [(1, 1), (2, 8), (4, 8), (2, 3)])
def test_every_expert_has_a_slot_and_devices_have_equally_many(nodes, groups):
    placement = place(LOAD_LE, slots=40, devices=8, nodes=nodes, groups=groups)
    assert placement.expert_LR.shape == (3, 40)
    for expert_R, replicas_E in zip(placement.expert_LR, placement.replicas_LE):
        np.testing.assert_array_equal(np.bincount(expert_R, minlength=32), replicas_E)
        assert replicas_E.min() == 1 and replicas_E.sum() == 40
    total = placement.device_load(LOAD_LE, devices=8).sum(axis=1)
    np.testing.assert_allclose(total, LOAD_LE.sum(axis=1))


def test_groups_stay_on_one_node():
    placement = place(LOAD_LE, slots=40, devices=8, nodes=4, groups=8)
    for expert_R in placement.expert_LR:
        nodes = [set((part // 4).tolist()) for part in expert_R.reshape(4, 10)]
        assert all(len(groups) == 2 for groups in nodes)
        assert all(not a & b for a, b in itertools.combinations(nodes, 2))


def test_replicas_even_out_the_devices():
    """An expert with half of the load gets all 8 slots to spare: 9 replicas on 8
    devices, so two of them meet.
    """
    load = np.ones((1, 32))
    load[0, 5] = 31.0
    bare = place(load, slots=32, devices=8).device_load(load, devices=8)
    spread = place(load, slots=40, devices=8).device_load(load, devices=8)
    assert bare.max() == 34
    assert spread.max() == pytest.approx(2 * 31 / 9 + 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"slots": 31, "devices": 1}, "slots=31 are fewer than the experts, 32"),
        ({"slots": 36, "devices": 8}, "devices=8 must divide 36"),
        ({"slots": 40, "devices": 8, "nodes": 3, "groups": 6}, "must divide"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        place(LOAD_LE, **sizes)
