"""Causal attention at V3's and V2-Lite's shapes, for `python -m pallas_kernels.bench`.

Letters: B batch, T length, N heads, H size of queries and keys, U size of values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.flash_attention.api import flash_attention
from pallas_kernels.measure import Case, Operands

QUERY, VALUE = 192, 128  # sizes of a head of V2 and V3
SCALE = QUERY**-0.5
SHAPES = {  # sequences, length, heads
    "V3, 1 of 4096, 128 heads": (1, 4096, 128),
    "16 of 2048, 10 heads": (16, 2048, 10),
}


def _inputs(key: Array, *, shape: tuple[int, int, int]) -> Operands:
    """q, k [B, T, N, H], v and the result's gradient [B, T, N, U]."""
    keys = jax.random.split(key, 4)
    sizes = (QUERY, QUERY, VALUE, VALUE)
    return tuple(
        jax.random.normal(key, (*shape, size), jnp.bfloat16)
        for key, size in zip(keys, sizes)
    )


def _attention(q, k, v, implementation=None):
    options = {"scale": SCALE, "implementation": implementation}
    return flash_attention(q[:, :, :, None], k, v, **options)[:, :, :, 0]


def _forward(implementation: str | None):
    return lambda q, k, v, dout: _attention(q, k, v, implementation)


def _both(implementation: str | None):
    """Result and gradients; the gradient of q first, which is what is compared."""

    def run(q, k, v, dout):
        attention = lambda *operands: _attention(*operands, implementation)  # noqa: E731
        out, back = jax.vjp(attention, q, k, v)
        return *back(dout), out

    return run


def _float32(run):
    return lambda *operands: jax.tree.leaves(
        run(*(x.astype(jnp.float32) for x in operands))
    )[0]


def _torch(gradients: bool):
    """PyTorch's attention, by cuDNN."""

    def contestants():
        import torch
        from torch.nn import attention
        from torch.nn.functional import scaled_dot_product_attention

        def run(q, k, v, dout):
            q, k, v, dout = (x.swapaxes(1, 2).detach() for x in (q, k, v, dout))
            for x in (q, k, v):
                x.requires_grad_(gradients)
            with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
                out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
            if not gradients:
                return out.swapaxes(1, 2)
            return torch.autograd.grad(out, (q, k, v), dout)[0].swapaxes(1, 2)

        return {"torch, cuDNN": run}

    return contestants


def _case(name: str, shape: tuple[int, int, int], *, gradients: bool) -> Case:
    rows, length, heads = shape
    run = _both if gradients else _forward
    pairs = rows * heads * length**2 // 2
    bytes_each = 2 * rows * length * heads
    # Gradients: five products of pairs and a head, three of the queries' size.
    products = 4 * QUERY + 3 * VALUE if gradients else QUERY + VALUE
    operands = 4 * QUERY + 4 * VALUE if gradients else 2 * QUERY + 2 * VALUE
    return Case(
        operation="flash_attention",
        name=f"{name}, {'forward and gradients' if gradients else 'forward'}",
        inputs=lambda key: _inputs(key, shape=shape),
        contestants={
            "ours": run(None),
            "cuDNN": run("cudnn"),
            "reference": run("reference"),
        },
        exact=_float32(run("reference")),
        flops=2 * pairs * products,
        bytes=bytes_each * operands,
        torch=_torch(gradients),
        target="cuDNN > 1x" if gradients else "cuDNN's",
    )


CASES = [
    _case(name, shape, gradients=gradients)
    for name, shape in SHAPES.items()
    for gradients in (False, True)
]
