"""Redundant experts, from a checkpoint onto a mesh: the same results, evener loads."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import dsjax
from dsjax import models
from dsjax.checkpoint.orbax import OrbaxSource
from dsjax.decode.eplb import Redundant
from dsjax.errors import UserError
from dsjax.nn.cache import empty_cache
from dsjax.nn.dispatch import destinations
from dsjax.nn.replicas import Slots, to_slots
from dsjax.sharding import SERVING, Sharding, make_mesh
from tests.support import fill, random_tokens

CONFIG = replace(models.tiny_v3(), mtp=False, init_std=0.125)
LOADS = np.random.default_rng(0).pareto(1.0, (2, 16)) + 0.1  # some are far above others
LOADS[:, 3] += LOADS.sum(axis=1)
REDUNDANT = Redundant(loads=LOADS, experts=8, nodes=2)
EXPERTS = "segments.1.feed_forward.experts"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("redundant") / "orbax"
    dsjax.save(fill(dsjax.Transformer.abstract(CONFIG), std=0.125), path)
    return path


@pytest.fixture(scope="module")
def expected(checkpoint):
    model = dsjax.load(checkpoint)
    return np.asarray(model(random_tokens(model)))


@pytest.mark.parametrize("redundant", [REDUNDANT, replace(REDUNDANT, nodes=1)])
def test_logits_are_the_same(checkpoint, expected, redundant):
    """Rows dispatched to their slots, on nodes of two devices and without nodes."""
    model = dsjax.load(checkpoint, mesh=make_mesh(expert=4), redundant=redundant)
    weight = model.segments[1].feed_forward.experts.gate_EFD
    assert weight.shape[:2] == (2, 24)
    found = np.asarray(model(random_tokens(model)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "sharding", [pytest.param(Sharding(), marks=pytest.mark.slow), SERVING]
)
def test_decoding_is_the_same(checkpoint, expected, sharding):
    """Every device sees all tokens; one step after a prefill."""
    mesh = make_mesh(expert=4)
    model = dsjax.load(checkpoint, mesh=mesh, sharding=sharding, redundant=REDUNDANT)
    tokens = random_tokens(model)

    @partial(jax.jit, static_argnums=0)
    def step(graph, state):
        model = nnx.merge(graph, state)
        cache = empty_cache(model.config, batch=8, slots=24, dtype="float32", mesh=mesh)
        lengths = np.full(8, 23, np.int32)
        cache = model.prefill(tokens[:, :23], lengths, cache).cache
        return model.logits(model.decode(tokens[:, 23:], cache).hidden_BTD)

    with jax.set_mesh(mesh):
        found = np.asarray(step(*nnx.split(model)))[:, 0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected[:, 23], atol=1e-5 * scale)


def test_slots_hold_their_experts_and_are_read_alone(checkpoint, monkeypatch):
    """Bit for bit; no expert is read more often than it has slots."""
    reads, read = Counter(), OrbaxSource.read

    def counted(self, path, region, dtype):
        if path == f"{EXPERTS}.up_EFD":
            layers, experts = region[:2]
            for layer in range(layers.start, layers.stop):
                for expert in range(experts.start, experts.stop):
                    reads[layer, expert] += 1
        return read(self, path, region, dtype)

    monkeypatch.setattr(OrbaxSource, "read", counted)
    mesh = make_mesh(expert=4)
    model = dsjax.load(checkpoint, mesh=mesh, redundant=REDUNDANT)
    placement = REDUNDANT.place(CONFIG, 4)
    assert reads == {
        (layer, expert): count
        for (layer, expert), count in np.ndenumerate(placement.replicas_LE)
    }
    plain = dsjax.load(checkpoint).segments[1].feed_forward.experts
    placed = model.segments[1].feed_forward.experts
    for name in ("gate_EFD", "up_EFD", "down_EDF"):
        ours, theirs = (np.asarray(getattr(x, name)[...]) for x in (placed, plain))
        for layer, expert_R in enumerate(placement.expert_LR):
            np.testing.assert_array_equal(ours[layer], theirs[layer][expert_R])


def test_devices_are_evener():
    """The busiest over the mean: every layer's falls, and ends near one; less so where
    an expert with half of the load has to stay on its node.
    """
    before, after = replace(REDUNDANT, nodes=1).balance(CONFIG, 4)
    assert (before > 1.5).all() and (after < 1.25).all()
    on_nodes = REDUNDANT.balance(CONFIG, 4)[1]
    assert (on_nodes < before).all() and (on_nodes >= after).all()


def test_an_experts_slots_take_turns():
    """Also where each device has a single token."""
    table_EX = jnp.array([[4, 2, 5], [3, -1, -1], [0, 1, -1]])
    chosen_Nk = jnp.array([[0, 1], [0, 2], [0, 2], [3, 0]])
    one = to_slots(chosen_Nk, table_EX, slots=6, batch=())
    np.testing.assert_array_equal(one, [[4, 3], [2, 1], [5, 0], [6, 4]])
    mesh, rows = make_mesh(data=2, expert=2), P(("data", "expert"))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            lambda chosen: to_slots(
                chosen, table_EX, slots=6, batch=("data", "expert")
            ),
            in_specs=rows,
            out_specs=rows,
            check_vma=False,
        )
        many = jax.jit(mapped)(jax.sharding.reshard(chosen_Nk, rows))
    np.testing.assert_array_equal(many, one)


def test_destinations_with_replicas():
    """V3: four of eight groups. On four nodes of four devices a token may go to all, on
    eight nodes of four to half; without nodes its groups bound nothing."""
    moe = models.v3().segments[1].feed_forward
    assert destinations(Slots(count=288, nodes=8).moe(moe), 32) == min(8, 4 * 4)
    few = replace(moe, groups=replace(moe.groups, kept=1))
    assert destinations(Slots(count=288, nodes=8).moe(few), 32) == 4
    assert destinations(Slots(count=288).moe(few), 32) == 8


def test_loads_from_a_file(tmp_path):
    (tmp_path / "loads.json").write_text(json.dumps(LOADS.tolist()))
    read = replace(REDUNDANT, loads=tmp_path / "loads.json")
    np.testing.assert_array_equal(
        read.place(CONFIG, 4).expert_LR, REDUNDANT.place(CONFIG, 4).expert_LR
    )


def test_what_does_not_fit(checkpoint, tmp_path):
    mesh = make_mesh(expert=4)
    few = replace(REDUNDANT, loads=LOADS[:1])
    with pytest.raises(UserError, match=r"loads of shape \[1, 16\].*2 MoE layers"):
        dsjax.load(checkpoint, mesh=mesh, redundant=few)
    odd = replace(REDUNDANT, experts=3)
    with pytest.raises(UserError, match="devices=4 must divide 19"):
        dsjax.load(checkpoint, mesh=mesh, redundant=odd)
    with pytest.raises(UserError, match="no rows of loads"):
        replace(REDUNDANT, loads=tmp_path / "absent.json").rows()
    model = dsjax.load(checkpoint, mesh=mesh, redundant=REDUNDANT)
    with pytest.raises(UserError, match="redundant experts is not saved"):
        dsjax.save(model, tmp_path / "out")
