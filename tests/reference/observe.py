"""What dsjax gives for a case, in the form of the recorded answers."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.nn.cache import Cache, empty_cache
from dsjax.nn.transformer import Transformer


def logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] for int32 tokens [B, T]."""
    return np.asarray(model(jnp.asarray(tokens)))


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Of a model with experts, and None where it has no MTP module.

    indices: [moe layers, B, T, k], ascending for each token; mtp_logits: float32
    [B, T - 1, V] from hidden state i and token i + 1; mtp_indices: [B, T - 1, k].
    """

    indices: np.ndarray
    mtp_logits: np.ndarray | None
    mtp_indices: np.ndarray | None


def observe(model: Transformer, tokens: np.ndarray) -> Observed:
    """Chosen experts and MTP's answers for int32 tokens [B, T]."""
    graph, state = nnx.split(model)
    with jax.set_mesh(model.mesh):
        found = _run(graph, state, jnp.asarray(tokens))
    indices, mtp_logits, mtp_indices = jax.device_get(found)
    return Observed(
        indices=np.sort(indices, axis=-1),
        mtp_logits=mtp_logits,
        mtp_indices=None if mtp_indices is None else np.sort(mtp_indices, axis=-1),
    )


@partial(jax.jit, static_argnums=0)
def _run(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> tuple:
    model = nnx.merge(graph, state)
    output = model.forward(tokens)
    routings = [routing for routing in output.routing if routing is not None]
    indices = jnp.concatenate([routing.indices_BTk for routing in routings])
    if not model.config.mtp:
        return indices, None, None
    hidden, following = output.hidden_BTD[:, :-1], tokens[:, 1:]
    _, routing = model.predict_further(hidden, following)
    return indices, model.mtp_logits(hidden, following), routing.indices_BTk


def decode(model: Transformer, tokens: np.ndarray, prompt: int) -> np.ndarray:
    """float32 logits [B, T - prompt, V] of the tokens after the prompt, by the cache.

    The prompt is read in the plain form, the rest in the one that decoding uses.
    """
    graph, state = nnx.split(model)
    with jax.set_mesh(model.mesh):
        cache = empty_cache(
            model.config,
            batch=tokens.shape[0],
            slots=tokens.shape[1],
            dtype=model.dtype,
            mesh=model.mesh,
        )
        return np.asarray(_decode(graph, state, jnp.asarray(tokens), prompt, cache))


@partial(jax.jit, static_argnums=(0, 3))
def _decode(
    graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, prompt: int, cache: Cache
) -> jax.Array:
    model = nnx.merge(graph, state)
    lengths = jnp.full(tokens.shape[0], prompt)
    cache = model.prefill(tokens[:, :prompt], lengths, cache).cache
    return model.logits(model.decode(tokens[:, prompt:], cache).hidden_BTD)


def largest(difference: np.ndarray) -> float:
    """The largest absolute value; not-a-number stays so, and fails any comparison."""
    return float(np.abs(difference).max())
