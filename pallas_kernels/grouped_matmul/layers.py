"""One layer's matrices among those of all layers, read where they lie.

Letters: Y layers, G groups, N outer, K inner.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class OfLayer(NamedTuple):
    """Stands for `stack[layer]`, which would be a copy of it: a kernel is no part of what
    XLA can fuse, and needs its operands as arrays of their own.
    """

    stack_YGNK: Float[Array, "Y G N K"]
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """[G, N, K]"""
        return self.stack_YGNK.shape[1:]

    @property
    def dtype(self) -> DTypeLike:
        """The stack's."""
        return self.stack_YGNK.dtype

    def astype(self, dtype: DTypeLike) -> "OfLayer | Array":
        """Where that changes anything, of the one layer alone."""
        return self if dtype == self.dtype else apart(self).astype(dtype)


Matrices = Float[Array, "G N K"] | OfLayer


def apart(operand: "Array | OfLayer") -> Array:
    """An array, cut out of the stack if it is in one."""
    if not isinstance(operand, OfLayer):
        return operand
    stack, layer = operand
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def stacked(operand: "Array | OfLayer") -> OfLayer:
    """A matrix for each group as the one layer of a stack, which moves nothing."""
    if isinstance(operand, OfLayer):
        return operand
    return OfLayer(operand.reshape(1, *operand.shape), jnp.zeros((), jnp.int32))
