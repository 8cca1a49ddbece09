"""AdamW as every model of the family was trained (b1 0.9, b2 0.95, weight decay 0.1,
clip 1.0).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

Parameters = dict  # dotted path -> array


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The papers' optimizer. `clip` bounds the global gradient norm; `moments` is the
    dtype both moments rest in (V3: bfloat16).
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    moments: DTypeLike = jnp.float32


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter at this dotted path: to all but
    norms and biases.
    """
    leaf = path.rsplit(".", 1)[-1]
    return leaf != "scale" and "bias" not in leaf


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """Clips the global gradient norm, then AdamW; works on a dictionary of dotted path
    -> array.

    The moments take each parameter's sharding.
    """

    def decay_mask(params: Parameters) -> dict[str, bool]:
        return {path: decays(path) for path in params}

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask
        ),
    )
