"""Models with random weights, made by numpy: quick, and the same on every mesh."""

import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dsjax import models
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import make_mesh


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
        place = variable.get_value().sharding
        variable.set_value(jax.device_put(jnp.asarray(value, variable.dtype), place))
    return model


def random_tokens(model: Transformer, rows: int = 8, length: int = 24) -> np.ndarray:
    """int32 [rows, length], the same in every run."""
    size = model.config.vocab_size
    return np.random.default_rng(1).integers(0, size, (rows, length), dtype=np.int32)
