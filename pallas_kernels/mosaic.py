"""What Mosaic GPU is called by in all versions of JAX that the kernels run with."""

import inspect

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

_HAS_INDEX = "idx" in inspect.signature(plgpu.load).parameters  # until JAX 0.11


def load(ref, *, layout, optimized: bool = True) -> Array:
    """All of a reference, in registers that are laid out so."""
    index = ((),) if _HAS_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)
