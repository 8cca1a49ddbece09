"""Float32 products of bfloat16 activations on units that multiply bfloat16.

A float32 number is the sum of three bfloat16 ones. Activations are bfloat16 already, so
three products, in one, give what float32 arithmetic would; a matrix unit needs six for two
float32 operands, and a GPU leaves its matrix units for them altogether.

Letters: B batch, T length, D model, E experts, P parts of a float32 number.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, BFloat16, Float32

from dsjax.nn.weights import spec_of

BITS = {"exponent_bits": 8, "mantissa_bits": 7}  # bfloat16's


@jax.custom_vjp
def exact_product(
    x_BTD: BFloat16[Array, "B T D"], w_ED: Float32[Array, "E D"]
) -> Float32[Array, "B T E"]:
    """x @ w.T as float32 arithmetic has it, and so the gradient with respect to `w`; that
    of `x` has the dtype of `x`.
    """
    y_BTPE = jnp.einsum(
        "BTD,PED->BTPE", x_BTD, _parts(w_ED), preferred_element_type=jnp.float32
    )
    return y_BTPE.sum(axis=2)


def _forward(x_BTD, w_ED):
    return exact_product(x_BTD, w_ED), (x_BTD, w_ED)


def _backward(saved, dy_BTE):
    x_BTD, w_ED = saved
    dy_PBTE = _parts(dy_BTE)
    # The result is bfloat16: first parts, and one step beyond them.
    (dy, dy_rest, _), (w, w_rest, _) = dy_PBTE, _parts(w_ED)
    dx_BTD = jnp.einsum(
        "PBTE,PED->BTD",
        jnp.stack([dy, dy, dy_rest]),
        jnp.stack([w, w_rest, w]),
        preferred_element_type=jnp.float32,
    )
    dw_ED = jnp.einsum(
        "PBTE,BTD->PED",
        dy_PBTE,
        x_BTD,
        preferred_element_type=jnp.float32,
        out_sharding=P(None, *spec_of(w_ED)),
    )
    return dx_BTD.astype(x_BTD.dtype), dw_ED.sum(axis=0)


exact_product.defvjp(_forward, _backward)


def _parts(x: Float32[Array, "..."]) -> BFloat16[Array, "P ..."]:
    """Three bfloat16 arrays whose sum is `x`."""
    parts = []
    for _ in range(3):
        # Not a cast and back, which the compiler may take for nothing.
        parts.append(jax.lax.reduce_precision(x, **BITS))
        x -= parts[-1]
    return jnp.stack(parts).astype(jnp.bfloat16)
