"""Models with random weights, made by numpy: quick, and the same on every mesh."""

import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsjax import models
from dsjax.config import Moe
from dsjax.nn import dispatch
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import BATCH, make_mesh


def random_model(name: str, *, std: float = 0.125, **mesh: int) -> Transformer:
    """A tiny model whose logits have a standard deviation near 1 and whose norm scales
    and biases are no ones and zeros, so that a mistake in any of them shows."""
    config = replace(models.get(name), init_std=std)
    return fill(Transformer.abstract(config, mesh=make_mesh(**mesh)), std=std)


def fill(model: Transformer, *, std: float) -> Transformer:
    """Gives an abstract model its weights."""
    for path, variable in flat(model).items():
        seed = zlib.crc32(path.encode())
        value = np.random.default_rng(seed).standard_normal(variable.shape)
        if path.endswith("scale"):
            value = 1 + 0.2 * value
        else:
            value = value * (0.2 if "bias" in path else std)
        put(variable, value)
    return model


def put(variable: nnx.Variable, value: np.ndarray) -> None:
    """Places a value as the variable rests: each process its own devices' parts."""
    value = np.asarray(value, variable.dtype)
    place = variable.get_value().sharding
    variable.set_value(
        jax.make_array_from_callback(value.shape, place, lambda index: value[index])
    )


def random_tokens(model: Transformer, rows: int = 8, length: int = 24) -> np.ndarray:
    """int32 [rows, length], the same in every run."""
    size = model.config.vocab_size
    return np.random.default_rng(1).integers(0, size, (rows, length), dtype=np.int32)


def rounds(
    chosen_Nk: np.ndarray, moe: Moe, *, d_model: int, **sizes: int
) -> tuple[int, int]:
    """(chunks, most rounds of one) in which rows of float32 go to their experts, on a
    mesh of such sizes."""

    def local(chosen_Nk):
        row_bytes = moe.top_k * d_model * 4
        chunks = dispatch._chunks(len(chosen_Nk), row_bytes, 0.0)
        parts = chosen_Nk.reshape(chunks, -1, moe.top_k)
        most = jax.lax.map(lambda part: dispatch._plan(part, moe).rounds, parts).max()
        return jnp.stack([jnp.int32(chunks), most])

    with jax.set_mesh(make_mesh(**sizes)):
        chosen_Nk = jax.sharding.reshard(jnp.asarray(chosen_Nk), P(BATCH))
        planned = jax.shard_map(
            local, in_specs=P(BATCH), out_specs=P(), check_vma=False
        )
        chunks, most = np.asarray(jax.jit(planned)(chosen_Nk))
    return int(chunks), int(most)
