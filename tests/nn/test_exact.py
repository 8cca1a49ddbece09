"""Float32 products of bfloat16 activations, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.nn.exact import exact_product
from dsjax.sharding import make_mesh

B, T, D, E = 8, 16, 256, 24


def example():
    """Activations, weights of many sizes, and the result's gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, D)), jnp.bfloat16)
    w = rng.standard_normal((E, D)) * 10.0 ** rng.integers(-3, 3, (E, 1))
    dy = rng.standard_normal((B, T, E))
    return x, w.astype(np.float32), dy.astype(np.float32)


def error(found, exact):
    """For each expert, since weights are of many sizes."""
    difference = np.abs(np.float64(found) - exact).max(axis=(0, 1))
    return difference / np.abs(exact).max(axis=(0, 1))


def put(array, spec, mesh):
    return jax.device_put(array, jax.NamedSharding(mesh, spec))


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "expert": 2}], ids=str)
def test_value_and_gradients(axes):
    x, w, dy = example()
    mesh = make_mesh(**axes, devices=jax.devices()[: 8 if axes else 1])
    rows = P(tuple(axes) or None, None, None)
    with jax.set_mesh(mesh):
        on_mesh = put(x, rows, mesh), put(w, P(None, None), mesh)
        y, back = jax.vjp(jax.jit(exact_product), *on_mesh)
        dx, dw = back(put(dy, rows, mesh))
    x = np.float64(x)
    # float32 sums of 256 or 128 products; two parts of three would be 2^-17 off
    assert error(y, np.einsum("btd,ed->bte", x, w)).max() < 5e-7
    exact = np.einsum("bte,btd->ed", np.float64(dy), x)
    assert np.abs(dw - exact).max() / np.abs(exact).max() < 5e-7
    exact = np.einsum("bte,ed->btd", np.float64(dy), w)
    assert dx.dtype == jnp.bfloat16
    assert np.abs(np.float64(dx) - exact).max() / np.abs(exact).max() < 2**-8
