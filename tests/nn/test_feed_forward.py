"""The dense feed-forward where weights rest whole on GPUs is what it is elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.nn import feed_forward
from dsjax.nn.feed_forward import SwiGlu
from dsjax.nn.options import FLOAT32, Build
from dsjax.nn.weights import flat, shardings
from dsjax.sharding import BATCH, Sharding, make_mesh, with_whole_dense

WHOLE = with_whole_dense(Sharding())


@pytest.fixture
def calls(monkeypatch):
    """One for each feed-forward that each device has computed of its own rows."""
    calls, of_own_rows = [], feed_forward._of_own_rows

    def counted(*arrays, **options):
        calls.append(arrays)
        return of_own_rows(*arrays, **options)

    monkeypatch.setattr(feed_forward, "_of_own_rows", counted)
    return calls


def prepared(rng, sharding, **sizes):
    """A mesh, a function of weights and rows, and these."""
    mesh = make_mesh(**sizes)
    build = Build(std=0.3, sharding=sharding, precision=FLOAT32, rngs=nnx.Rngs(0))
    module = SwiGlu(16, 24, build=build)
    places = shardings(module, mesh)
    for path, weight in flat(module).items():
        weight.set_value(jax.device_put(weight.get_value(), places[path]))
    graph, weights = nnx.split(module)
    x = rng.standard_normal((8, 5, 16)).astype(np.float32)
    x = jax.device_put(x, NamedSharding(mesh, P(BATCH, None, None)))
    return mesh, lambda weights, x: nnx.merge(graph, weights)(x), (weights, x)


@pytest.mark.parametrize(
    ("sharding", "sizes"),
    [(Sharding(), {}), (WHOLE, {"data": 2, "expert": 2})],
    ids=["one device", "four devices"],
)
def test_of_own_rows_on_gpus_with_whole_weights(
    monkeypatch, calls, rng, sharding, sizes
):
    """Results and gradients, which sum over the rows of all devices."""
    mesh, run, operands = prepared(rng, sharding, **sizes)
    found = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(feed_forward, "platform", lambda p=platform: p)
        with jax.set_mesh(mesh):
            y, back = jax.vjp(jax.jit(lambda *o: run(*o)), *operands)
            found.append((y, *back(jnp.cos(y))))
        assert bool(calls) == (platform == "gpu")
    assert y.std() > 0.3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(a).max()),
        *found,
    )


@pytest.mark.parametrize(
    ("sharding", "sizes"),
    [(Sharding(), {"data": 2, "expert": 2}), (WHOLE, {"data": 2, "tensor": 2})],
    ids=["gathered", "cut"],
)
def test_weights_that_are_cut_are_left_to_the_compiler(
    monkeypatch, calls, rng, sharding, sizes
):
    mesh, run, operands = prepared(rng, sharding, **sizes)
    monkeypatch.setattr(feed_forward, "platform", lambda: "gpu")
    with jax.set_mesh(mesh):
        jax.eval_shape(run, *operands)
    assert not calls
