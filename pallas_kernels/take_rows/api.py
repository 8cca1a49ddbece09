"""The face of taking rows: what it is, and who does it where.

Letters: N rows there are, M rows wanted, D elements of one.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import named, note_choice
from pallas_kernels.take_rows import pallas_gpu, reference

IMPLEMENTATIONS = ("hopper", "pairs", "reference")


def take_rows(
    x_ND: Float[Array, "N D"],
    index_M: Int[Array, " M"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """x[index]; zeros for an index of N or more. An index must not be negative.

    Not differentiable: the gradient is a sum of rows, for which `index` alone is a poor
    guide (`dsjax.nn.rows` has both directions).

    `implementation`: "hopper" is a kernel for NVIDIA's H100 and H200, 16 or 32 bits, D
    that 128 divides; "pairs" is plain JAX that takes two 16-bit elements at once, quicker
    on a GPU; "reference" is plain JAX. None takes the best of the platform that is
    compiled for, and logs its choice in one line.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: the implementation was named and does not take this.
    """
    if x_ND.ndim != 2 or index_M.ndim != 1:
        raise ValueError(f"ranks of {x_ND.shape=}, {index_M.shape=}: not 2, 1")
    if not jnp.issubdtype(index_M.dtype, jnp.integer):
        raise ValueError(f"{index_M.dtype=} is no integer type")
    lacking = pallas_gpu.lacks(len(index_M), x_ND.shape, x_ND.dtype)
    run = functools.partial(jax.lax.platform_dependent, x_ND, index_M)
    match implementation := named(implementation):
        case None:
            note_choice("take_rows", {"cuda": "Mosaic GPU"}, {"cuda": lacking})
            on_gpu = reference.pairs if lacking else pallas_gpu.take_rows
            return run(cuda=on_gpu, default=reference.take_rows)
        case "reference":
            return reference.take_rows(x_ND, index_M)
        case "pairs":
            return reference.pairs(x_ND, index_M)
        case "hopper":
            if lacking:
                raise NotImplementedError(f"the Hopper kernel {lacking}: {x_ND.shape=}")
            return pallas_gpu.take_rows(x_ND, index_M)
    raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}")
