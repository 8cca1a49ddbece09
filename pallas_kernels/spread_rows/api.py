"""The face of spreading rows: what it is, and who does it where.

Letters: N rows, M places, R places of a row at most, D elements of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import named, note_choice
from pallas_kernels.spread_rows import pallas_gpu, reference

IMPLEMENTATIONS = ("hopper", "pairs", "reference")


def spread_rows(
    x_ND: Float[Array, "N D"],
    places_NR: Int[Array, "N R"],
    row_M: Int[Array, " M"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """A copy of each row at each of its places, which are `places`, M or more for none;
    zeros at places that no row goes to.

    `row` is the same in the other direction: the row of each place, N or more for none.
    Implementations read one or the other, so both have to be right; indices are not
    negative. Not differentiable here: `dsjax.nn.rows` has both directions.

    `implementation`: "hopper" is a kernel for NVIDIA's H100 and H200, 16 or 32 bits, D
    that 128 divides; it reads each row once. "pairs" is plain JAX that gathers two 16-bit
    elements at once, quicker on a GPU; "reference" is plain JAX. None takes the best of
    the platform that is compiled for, and logs its choice in one line.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown.
        NotImplementedError: the implementation was named and does not take this.
    """
    if (x_ND.ndim, places_NR.ndim, row_M.ndim) != (2, 2, 1):
        raise ValueError(
            f"ranks of {x_ND.shape=}, {places_NR.shape=}, {row_M.shape=}: not 2, 2, 1"
        )
    if len(places_NR) != len(x_ND):
        raise ValueError(f"{places_NR.shape=} has not the rows of {x_ND.shape=}")
    for index in (places_NR, row_M):
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"{index.dtype} of {index.shape} is no integer type")
    lacking = pallas_gpu.lacks(x_ND.shape, len(row_M), places_NR.shape[1], x_ND.dtype)
    operands = x_ND, places_NR, row_M
    match implementation := named(implementation):
        case None:
            note_choice("spread_rows", {"cuda": "Mosaic GPU"}, {"cuda": lacking})
            on_gpu = reference.by_pairs if lacking else pallas_gpu.spread_rows
            plain = reference.spread_rows
            return jax.lax.platform_dependent(*operands, cuda=on_gpu, default=plain)
        case "reference":
            return reference.spread_rows(*operands)
        case "pairs":
            return reference.by_pairs(*operands)
        case "hopper":
            if lacking:
                raise NotImplementedError(f"the Hopper kernel {lacking}")
            return pallas_gpu.spread_rows(*operands)
    raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}")
