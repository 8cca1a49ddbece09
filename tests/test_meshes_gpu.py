"""GPUs of one host compute in bfloat16, by the Hopper kernels, what one of them does.

JAX_PLATFORMS=cuda pytest -n 0 -m gpu tests/test_meshes_gpu.py
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import ModelConfig, Segment
from dsjax.nn.options import Precision, Remat
from dsjax.nn.transformer import Transformer
from dsjax.sharding import make_mesh
from dsjax.train.objective import Objective, losses, shares
from experiments import speed
from tests.support import fill

GPUS = jax.device_count()
ROWS, LENGTH, VOCABULARY = 8, 512, 4096
TOKENS = np.random.default_rng(1).integers(
    0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs several GPUs"),
]


def config() -> ModelConfig:
    """Two layers of the model that training speed is measured with, at its widths."""
    whole = speed.model()
    segments = tuple(
        Segment(count=1, feed_forward=segment.feed_forward)
        for segment in whole.segments
    )
    return replace(whole, segments=segments, vocab_size=VOCABULARY)


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(graph, state):
    batch = {"tokens": jnp.asarray(TOKENS)}

    def total(state):
        terms = losses(
            nnx.merge(graph, state),
            batch,
            objective=Objective(expert_balance=0.01),
            shares=shares({"tokens": batch["tokens"][None]}),
        )
        return terms.loss + terms.balance_loss

    return jax.value_and_grad(total)(state)


def run(compute=jnp.bfloat16, **mesh) -> tuple[float, dict[str, np.ndarray]]:
    abstract = Transformer.abstract(
        config(),
        mesh=make_mesh(**mesh),
        precision=Precision(compute=compute, params=jnp.bfloat16),
        remat=Remat.V3,
    )
    model = fill(abstract, std=0.03)
    with jax.set_mesh(model.mesh), jax.default_matmul_precision("highest"):
        loss, gradients = jax.device_get(loss_and_gradients(*nnx.split(model)))
    return float(loss), {
        ".".join(map(str, path)): variable.get_value().astype(np.float32)
        for path, variable in nnx.to_flat_state(gradients)
    }


@pytest.fixture(scope="module")
def exact():
    return run(jnp.float32, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def alone(exact):
    return errors(run(devices=jax.devices()[:1]), exact)


def errors(found, exact) -> dict[str, float]:
    """Relative ones, of the loss and of every gradient."""
    (loss, gradients), (exact_loss, exact_gradients) = found, exact
    of_gradients = {
        path: np.linalg.norm(gradients[path] - wanted) / np.linalg.norm(wanted)
        for path, wanted in exact_gradients.items()
    }
    return {"loss": abs(loss / exact_loss - 1)} | of_gradients


@pytest.mark.parametrize("data", [1, 2])
def test_training(data, exact, alone):
    """In bfloat16, a router's close calls fall one way or the other: so several GPUs are
    as far from float32 as one is, rather than near each other.
    """
    assert alone["loss"] < 1e-3 and max(alone.values()) < 0.1, alone
    found = errors(run(data=data, expert=GPUS // data), exact)
    wrong = {
        path: (error, alone[path])
        for path, error in found.items()
        if error > max(1.1 * alone[path], 1e-3)
    }
    assert not wrong
