"""Generation as two compiled programs: read the prompts, then loop over new tokens.

Letters: B batch, T padded prompt length, N room for new tokens.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Key

from dsjax.decode.sample import Sampling, choose
from dsjax.nn.cache import Cache, empty_cache
from dsjax.nn.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Generation:
    """A batch on its way: the first `count` columns of `new_BN` are made.

    A row that met a stop token is done; what later columns hold for it means nothing.
    """

    cache: Cache
    new_BN: Int[Array, "B N"]
    count: Int[Array, ""]
    done_B: Bool[Array, " B"]


def bucket(length: int, smallest: int = 16) -> int:
    """The next power of two: lengths within one bucket share a compiled program."""
    return max(1 << (length - 1).bit_length(), smallest)


def start(
    model: Transformer,
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    *,
    slots: int,
    room: int,
    sampling: Sampling,
    keys_B: Key[Array, " B"],
    stops: Int[Array, " S"],
    cache_dtype: DTypeLike | None = None,
) -> Generation:
    """Reads prompts padded on the right and makes the first new token of every row.

    slots: cache slots a row; room: how many new tokens fit; stops: ids that end a row;
    cache_dtype: by default the model's; float8_e4m3fn is for latents.
    """
    graph, state = nnx.split(model)
    dtype = jnp.dtype(model.dtype if cache_dtype is None else cache_dtype)
    sizes = (slots, room, dtype)
    with jax.set_mesh(model.mesh):
        return _start(
            graph, state, prompts_BT, lengths_B, sizes, sampling, keys_B, stops
        )


def run(
    model: Transformer,
    generation: Generation,
    limit: int,
    *,
    sampling: Sampling,
    keys_B: Key[Array, " B"],
    stops: Int[Array, " S"],
) -> Generation:
    """Goes on until `limit` tokens are made or every row is done: one program.

    `generation` is consumed: its cache becomes the new one's. `limit` is data, so the
    same program makes one token or a thousand.
    """
    graph, state = nnx.split(model)
    with jax.set_mesh(model.mesh):
        return _run(graph, state, generation, limit, sampling, keys_B, stops)


@partial(jax.jit, static_argnums=(0, 4))
def _start(graph, state, prompts_BT, lengths_B, sizes, sampling, keys_B, stops):
    model: Transformer = nnx.merge(graph, state)
    (batch, length), (slots, room, dtype) = prompts_BT.shape, sizes
    cache = empty_cache(
        model.config, batch=batch, slots=slots, dtype=dtype, mesh=model.mesh
    )
    output = model.prefill(prompts_BT, lengths_B, cache)
    last_BT = jnp.arange(length) == output.cache.lengths_B[:, None] - 1
    last_B1D = jnp.where(last_BT[..., None], output.hidden_BTD, 0).sum(1, keepdims=True)
    new_BN = model.place(jnp.zeros((batch, room), jnp.int32))
    done_B = output.cache.lengths_B < 0
    empty = Generation(
        cache=output.cache, new_BN=new_BN, count=jnp.int32(0), done_B=done_B
    )
    return _append(model, empty, last_B1D, sampling, keys_B, stops)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _run(graph, state, generation, limit, sampling, keys_B, stops):
    model: Transformer = nnx.merge(graph, state)

    def unfinished(generation: Generation) -> Array:
        return (generation.count < limit) & ~generation.done_B.all()

    def step(generation: Generation) -> Generation:
        last_B1 = jax.lax.dynamic_slice_in_dim(
            generation.new_BN, generation.count - 1, 1, axis=1
        )
        output = model.decode(last_B1, generation.cache)
        generation = replace(generation, cache=output.cache)
        return _append(model, generation, output.hidden_BTD, sampling, keys_B, stops)

    return jax.lax.while_loop(unfinished, step, generation)


def _append(model, generation, hidden_B1D, sampling, keys_B, stops) -> Generation:
    """Chooses every row's next token from its last hidden state."""
    logits_BV = model.logits(hidden_B1D)[:, 0]
    token_B = choose(logits_BV, sampling, keys_B, generation.count)
    here_N = jnp.arange(generation.new_BN.shape[1]) == generation.count
    return replace(
        generation,
        new_BN=jnp.where(here_N, token_B[:, None], generation.new_BN),
        count=generation.count + 1,
        done_B=generation.done_B | (token_B[:, None] == stops).any(axis=1),
    )
