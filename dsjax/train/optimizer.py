"""AdamW as every model of the family was trained (b1 0.9, b2 0.95, weight decay 0.1,
clip 1.0).

The learning rate is no part of it: `apply` takes the rate of its step.
"""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dsjax.errors import UserError

Parameters = dict[str, Array]  # dotted path -> array


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

    def __post_init__(self) -> None:
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise UserError(f"b1={self.b1} and b2={self.b2} must be from 0 to below 1")
        if self.eps <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise UserError(
                f"eps={self.eps} and clip={self.clip} must be positive, "
                f"weight_decay={self.weight_decay} not negative"
            )


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter at this dotted path: to all but
    norms and biases.
    """
    leaf = path.rsplit(".", 1)[-1]
    return leaf != "scale" and "bias" not in leaf


def adamw(optimizer: AdamW) -> optax.GradientTransformationExtraArgs:
    """From gradients to what the learning rate multiplies: the global norm clipped,
    Adam's direction, and the decay added.

    Its update takes the keyword `norm`, the gradients' own. The moments take each
    parameter's sharding.
    """

    def decay_mask(params: Parameters) -> dict[str, bool]:
        return {path: decays(path) for path in params}

    return optax.chain(
        _clipped(optimizer.clip),
        _resting(
            optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
            optimizer.moments,
        ),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask),
    )


def global_norm(
    gradients: Parameters, *, apart: Collection[str] = ()
) -> Float[Array, ""]:
    """The norm over all gradients, float32 whatever they rest in.

    Those at the paths `apart` are stacks of what the program has layer by layer: each
    layer is summed by itself, since a sum that reads through a stack is slow on a GPU.
    """

    def squares(x: Array) -> Array:
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    total = jnp.zeros((), jnp.float32)
    for path, gradient in gradients.items():
        parts = gradient if path in apart else [gradient]
        total += sum(map(squares, parts))
    return jnp.sqrt(total)


def apply(
    params: Parameters, updates: Parameters, learning_rate: Float[Array, ""]
) -> Parameters:
    """params - learning_rate * updates, in float32 whatever the parameters rest in."""

    def step(weight: Array, update: Array) -> Array:
        moved = weight.astype(jnp.float32) - learning_rate * update
        return moved.astype(weight.dtype)

    return jax.tree.map(step, params, updates)


def _clipped(most: float) -> optax.GradientTransformationExtraArgs:
    """Gradients of a norm over `most` are scaled down to it, and float32 from here on."""

    def update(gradients, state, params=None, *, norm):
        scale = jnp.where(norm > most, most / norm, 1.0)
        return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _resting(
    inner: optax.GradientTransformation, dtype: DTypeLike
) -> optax.GradientTransformation:
    """`inner` computing in float32 with a state that rests in `dtype`; counters stay."""

    def cast(state: optax.OptState, dtype: DTypeLike) -> optax.OptState:
        return jax.tree.map(
            lambda leaf: (
                leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            ),
            state,
        )

    def init(params: Parameters) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(gradients, state, params=None):
        gradients = cast(gradients, jnp.float32)
        updates, state = inner.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
