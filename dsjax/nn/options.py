"""How a model is computed, as opposed to what it is (`dsjax.config`)."""

import enum
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a model's arithmetic.

    `compute`: activations and matrix products. `params`: the weights at rest. `router`:
    affinities and the choice of experts. `softmax`: attention weights. `statistics`:
    norms' variances, logits' log-sum-exp, losses. `gradients`: their sum over
    microbatches. Defaults are those of the papers.
    """

    compute: DTypeLike = jnp.bfloat16
    params: DTypeLike = jnp.float32
    router: DTypeLike = jnp.float32
    softmax: DTypeLike = jnp.float32
    statistics: DTypeLike = jnp.float32
    gradients: DTypeLike = jnp.float32


class Remat(enum.Enum):
    """What the backward pass computes again instead of keeping."""

    NONE = "none"
    FULL = "full"  # all but each layer's input
    V3 = "v3"  # norms and MLA up-projections (V3, section 3.2.3)
