"""How a model is computed, as opposed to what it is (`dsjax.config`)."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from dsjax.nn.replicas import Slots
from dsjax.nn.weights import filled, weight
from dsjax.sharding import Sharding
from pallas_kernels.flash_attention import api as flash_attention
from pallas_kernels.grouped_matmul import api as grouped_matmul

_KEPT, _INPUT = "kept", "layer input"
COPIES = (
    "convert_element_type",
    "optimization_barrier",
    "reshard",
    "all_gather",
    "split",
)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The dtypes of a model's arithmetic, given in any form that JAX takes.

    `compute`: activations and matrix products. `params`: the weights at rest. `router`:
    affinities and the choice of experts. `softmax`: attention weights. `statistics`:
    norms' variances, logits' log-sum-exp, losses. `logits`: what losses are made of,
    products summed in float32; if of 16 bits, their factors are of the same. float16
    is three bits finer than bfloat16, ends at 65504, and is for GPUs: TPUs have none.
    `gradients`: their sum over microbatches. Defaults are those of the papers.
    """

    compute: DTypeLike = jnp.bfloat16
    params: DTypeLike = jnp.float32
    router: DTypeLike = jnp.float32
    softmax: DTypeLike = jnp.float32
    statistics: DTypeLike = jnp.float32
    logits: DTypeLike = jnp.float32
    gradients: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for field in fields(self):  # one form: equal records compile once
            dtype = jnp.dtype(getattr(self, field.name))
            object.__setattr__(self, field.name, dtype)


FLOAT32 = Precision(compute=jnp.float32)


class Remat(enum.Enum):
    """What the backward pass computes again instead of keeping.

    Weights gathered or cast for their use are never kept, whatever the choice: that
    would be a second copy of the model, and not cut over the devices.
    """

    NONE = "none"
    FULL = "full"  # all but each layer's input
    OFFLOAD = "offload"  # the same, and that input waits in the host's memory
    V3 = "v3"  # norms, MLA up-projections, SwiGLU's product (V3, section 3.2.3)

    def wrap(self, layer: Callable) -> Callable:
        """`layer`, as a body of `jax.lax.scan`, keeping no more than this allows. Where
        several layers are one body, the compiler may see that what would be computed
        again is at hand, and keep it.
        """
        policies = jax.checkpoint_policies
        match self:
            case Remat.NONE:
                policy = _all_but_copies
            case Remat.FULL:
                policy = policies.nothing_saveable
            case Remat.OFFLOAD:
                policy = policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=[_INPUT],
                    offload_src="device",
                    offload_dst="pinned_host",
                )
            case Remat.V3:
                names = _KEPT, flash_attention.KEPT, grouped_matmul.KEPT
                policy = policies.save_only_these_names(*names)
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _all_but_copies(primitive: Primitive, *_, **__) -> bool:
    """A policy of `jax.checkpoint`: casts and gathers are done again."""
    return primitive.name not in COPIES


def keep(x: Array) -> Array:
    """Marks what the backward pass finds again under `Remat.V3`."""
    return checkpoint_name(x, _KEPT)


def layer_input(x: Array) -> Array:
    """Marks what each layer starts from, which `Remat.OFFLOAD` sends to the host."""
    return checkpoint_name(x, _INPUT)


@dataclass(frozen=True, kw_only=True)
class Build:
    """What every part of a model is built with: how weights start, rest and compute, how
    many slots routed experts have, if not one each, and whether a loop runs over stacked
    layers.
    """

    std: float
    sharding: Sharding
    precision: Precision
    rngs: nnx.Rngs
    slots: Slots | None = None
    looped: bool = False

    def weight(self, shape: tuple[int, ...], spec: P) -> nnx.Param:
        """A normal(0, std) weight. `spec` tells how one layer's array rests."""
        options = {"std": self.std, "dtype": self.precision.params}
        return weight(self.rngs, shape, **options, **self.metadata(spec))

    def filled(self, shape: tuple[int, ...], value: float, spec: P) -> nnx.Param:
        """A constant weight."""
        return filled(shape, value, dtype=self.precision.params, **self.metadata(spec))

    def metadata(self, spec: P) -> dict[str, Any]:
        """What a weight's variable knows of its place."""
        storage = self.sharding.storage
        return {"spec": spec, "storage": storage, "looped": self.looped}
