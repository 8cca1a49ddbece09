"""Choosing the next token from logits: greedy, temperature, top-k, top-p.

Letters: B batch, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, Int, Key

from dsjax.errors import UserError
from dsjax.nn.weights import batch_axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose. Values are data, not code: changing one compiles nothing anew.

    temperature: 0 takes the likeliest token. top_k: keep that many tokens, 0 keeps all.
    top_p: keep the likeliest tokens until they hold this share of the probability.
    """

    temperature: float | Array = 0.0
    top_p: float | Array = 1.0
    top_k: int | Array = 0

    @classmethod
    def checked(cls, **values: float | int) -> "Sampling":
        """Raises UserError for a value out of its range."""
        sampling = cls(**values)
        if not sampling.temperature >= 0:
            raise UserError(f"temperature={sampling.temperature} must not be negative")
        if not 0 < sampling.top_p <= 1:
            raise UserError(f"top_p={sampling.top_p} must be above 0 and at most 1")
        if sampling.top_k < 0:
            raise UserError(f"top_k={sampling.top_k} must not be negative")
        return sampling


def row_keys(seed: int, rows: int) -> Key[Array, " B"]:
    """A key a row, so that what a row samples does not depend on the mesh."""
    return jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(rows)
    )


def choose(
    logits_BV: Float[Array, "B V"],
    sampling: Sampling,
    keys_B: Key[Array, " B"],
    step: Int[Array, ""] | int,
) -> Int[Array, " B"]:
    """The next token of every row; `step` tells one draw of a row from the next."""
    batch = batch_axes(logits_BV)
    return jax.shard_map(
        _choose,
        in_specs=(P(batch, None), P(batch), P(), P()),
        out_specs=P(batch),
        check_vma=False,
    )(reshard(logits_BV, P(batch, None)), reshard(keys_B, P(batch)), sampling, step)


def _choose(logits_BV: Array, keys_B: Array, sampling: Sampling, step: Array) -> Array:
    def greedy() -> Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        kept_BV = filtered(logits_BV / sampling.temperature, sampling)
        return jax.vmap(jax.random.categorical)(step_keys_B, kept_BV).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, greedy)


def filtered(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """-inf for every token that top-k or top-p leaves out; the likeliest one stays.

    Both cut a sorted row at a rank, so that the two share one sort. Tokens tied with
    the last one kept are kept too.
    """
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    rank_V = jnp.arange(logits_BV.shape[-1])
    keep_BV = before_BV < sampling.top_p
    keep_BV &= (rank_V < sampling.top_k) | (jnp.asarray(sampling.top_k) == 0)
    last_B = jnp.where(keep_BV, sorted_BV, jnp.inf).min(axis=-1)
    return jnp.where(logits_BV >= last_B[:, None], logits_BV, -jnp.inf)
