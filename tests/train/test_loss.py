"""The chunked cross-entropy against plain NumPy and the plain loss: value, gradients, layout, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.sharding import BATCH, REST, fit, make_mesh
from dsjax.train.loss import cross_entropy, mtp_targets

B, T, D, V = 8, 11, 16, 32  # T: no chunk divides it
MESHES = {
    "one": {},
    "all": {"fsdp": 2, "expert": 2, "tensor": 2},
    "data": {"data": 2, "fsdp": 2, "tensor": 2},
    "idle": {"fsdp": 2, "expert": 4},  # for 2 sequences: the batch is not cut by all
}


@functools.cache
def example(rows=B):
    """Hidden states, head, targets, weights: logits of a standard deviation near 3, and
    weights of which some are 0."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (rows, T, D)).astype(np.float32)
    head = rng.normal(0, 0.75, (V, D)).astype(np.float32)
    weights = rng.uniform(0.5, 1.5, (rows, T)) * (rng.uniform(size=(rows, T)) < 0.7)
    targets = rng.integers(0, V, (rows, T)).astype(np.int32)
    return hidden, head, targets, weights.astype(np.float32)


def plain(hidden, head, targets, weights, logits=np.float64):
    """The same in float64 NumPy, position by position: loss, and both gradients. Logits
    are rounded to a dtype."""
    hidden, head = np.float64(hidden), np.float64(head)
    total, of_hidden, of_head = 0.0, np.zeros_like(hidden), np.zeros_like(head)
    for at in np.ndindex(targets.shape):
        probability = np.exp(np.float64((head @ hidden[at]).astype(logits)))
        probability /= probability.sum()
        total -= weights[at] * np.log(probability[targets[at]])
        probability[targets[at]] -= 1
        of_hidden[at] = weights[at] * (probability @ head)
        of_head += weights[at] * np.outer(probability, hidden[at])
    return total, of_hidden, of_head


def place(mesh, arrays):
    specs = P(BATCH, None, None), P("tensor", REST), P(BATCH, None), P(BATCH, None)
    return [
        jax.device_put(x, NamedSharding(mesh, fit(spec, x.shape, mesh)))
        for x, spec in zip(arrays, specs)
    ]


def values(mesh, arrays, **options):
    """Loss and gradients on a mesh; the loss enters with a factor of 3."""

    def loss(hidden, head, targets, weights):
        return 3 * cross_entropy(hidden, head, targets, weights, **options)

    with jax.set_mesh(mesh):
        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return compute(*place(mesh, arrays))


@pytest.mark.parametrize("chunk", [4, 30, 10**6])
@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients(mesh, chunk):
    """One chunk and several, a last one that is not full, vocabulary and head cut or not."""
    arrays = example(2 if mesh == "idle" else B)
    mesh = make_mesh(**MESHES[mesh])
    total, *expected = plain(*arrays)
    loss, gradients = values(mesh, arrays, chunk=chunk)
    np.testing.assert_allclose(loss, 3 * total, rtol=1e-6)
    for gradient, wanted, given in zip(gradients, expected, place(mesh, arrays)):
        np.testing.assert_allclose(gradient, 3 * wanted, rtol=1e-6, atol=4e-6)
        assert gradient.sharding.is_equivalent_to(given.sharding, gradient.ndim)


def test_without_gradients_it_is_the_same_loss(mesh):
    arrays = place(mesh, example())
    loss = jax.jit(lambda *arrays: cross_entropy(*arrays, chunk=30))(*arrays)
    np.testing.assert_allclose(loss, plain(*example())[0], rtol=1e-6)


def test_huge_logits_stay_finite(mesh):
    hidden, head = np.float32([[[1.0, 0.0]]]), np.float32([[1e4, 0], [-1e4, 0], [0, 1]])
    arrays = hidden, head, np.int32([[1]]), np.float32([[1.0]])
    loss, (of_hidden, of_head) = values(mesh, arrays)
    np.testing.assert_allclose(loss, 3 * 2e4)
    np.testing.assert_allclose(of_hidden, [[[6e4, 0]]])
    np.testing.assert_allclose(of_head, [[3, 0], [-3, 0], [0, 0]])


def test_bfloat16_products_float32_statistics(mesh):
    """What bfloat16 hidden states and a float32 head give is the loss of the rounded
    arrays; the head's gradient is float32, summed over chunks without rounding."""
    hidden, head, targets, weights = example()
    rounded = [np.asarray(jnp.bfloat16(x), np.float32) for x in (hidden, head)]
    total, _, of_head = plain(*rounded, targets, weights)
    arrays = jnp.bfloat16(hidden), head, targets, weights
    loss, gradients = values(mesh, arrays, chunk=8)
    np.testing.assert_allclose(loss, 3 * total, rtol=1e-6)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    # the logits' gradient is rounded once, by 1/256 of each of its 67 parts
    np.testing.assert_allclose(gradients[1], 3 * of_head, atol=0.06)
    assert np.abs(np.float32(jnp.bfloat16(gradients[1])) - gradients[1]).max() > 1e-3


@pytest.mark.parametrize("mesh", ["one", "all"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_logits_of_16_bits(mesh, dtype):
    """Gradients are those of rounded logits; what is made of these is float32."""
    hidden, head, targets, weights = example()
    arrays = (*(np.asarray(jnp.asarray(x, dtype), np.float32) for x in (hidden, head)),)
    total, *expected = plain(*arrays, targets, weights, logits=dtype)
    _, *exact = plain(*arrays, targets, weights)
    mesh = make_mesh(**MESHES[mesh])
    given = *arrays, targets, weights
    loss, gradients = values(mesh, given, chunk=30, logits=dtype)
    np.testing.assert_allclose(loss, 3 * total, rtol=1e-5)
    # A sum that lies between two numbers may go to the other one.
    tolerance = jnp.finfo(dtype).eps / 16
    for gradient, wanted, unrounded in zip(gradients, expected, exact):
        size = np.linalg.norm(wanted)
        assert np.linalg.norm(gradient / 3 - wanted) < tolerance * size
        assert np.linalg.norm(unrounded - wanted) > 2 * tolerance * size


def sizes(jaxpr):
    """The number of elements of every array in a jaxpr and all that it calls."""
    for equation in jaxpr.eqns:
        yield from (elements(v.aval) for v in equation.outvars)
        for sub in jaxprs_in_params(equation.params):
            yield from sizes(sub)


def elements(aval):
    return int(np.prod(getattr(aval, "shape", ())))


def test_logits_of_the_batch_never_exist(mesh):
    """Neither in the loss nor in its gradients: nothing as large as [B, T, V] is in the
    program, and the compiled one needs less than that beside its arguments."""
    length, vocabulary = 256, 4096
    shapes = [(4, length, D), (vocabulary, D), (4, length), (4, length)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    arrays = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes)]
    loss = jax.grad(functools.partial(cross_entropy, chunk=64), argnums=(0, 1))
    logits = 4 * length * vocabulary
    largest = max(sizes(jax.make_jaxpr(loss)(*arrays).jaxpr))
    assert largest <= logits // 16
    compiled = jax.jit(loss).lower(*arrays).compile()
    assert (
        compiled.memory_analysis().temp_size_in_bytes < logits
    )  # a quarter of its bytes


def test_mtp_targets():
    """Position i predicts token i + 2; the last of the inputs has none."""
    tokens = np.random.default_rng(0).integers(1, V, (3, T + 1))
    targets = mtp_targets(jnp.asarray(tokens))
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 2:])
    np.testing.assert_array_equal(targets[:, -1], 0)
