"""Products of e4m3 by a Hopper GPU's matrix unit, started and waited for one by one.

What Pallas has for them takes registers of the compiler's choice for each product, so the
next may begin before the last one is used: too many registers, and an order that is the
compiler's. Here a product goes to the registers of the one before, whose values are to be
used by then, and which the unit does not read: a flag says so that no compiler knows.

Letters: N columns of a product.
"""

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.assembly import ATOM, SCALAR, SUMS, in_place, start_of
from pallas_kernels.grouped_matmul.ring_gpu import swizzled

ROWS, INNER = 64, 128  # of a product
INNER_STEP = 32  # of an instruction
# The upper half of a descriptor: eight rows of 128 bytes lie together, swizzled so.
UPPER_WORD = 1 << 30 | 8 * INNER // ATOM
SWIZZLED, _ = swizzled(jnp.float8_e4m3fn, INNER)


def descriptor(ref) -> Int[Array, ""]:
    """Where a swizzled reference starts, as `start_product` takes it: in 16 bytes."""

    def describe(_, ref):
        layout = SCALAR.to_mgpu()
        return fragmented.FragmentedArray.splat(
            start_of(ref, alone=False), (), layout, is_signed=True
        )

    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(SWIZZLED),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )(describe)(ref)


def start_product(
    product: Float[Array, "64 N"],
    x: Int[Array, ""],
    w: Int[Array, ""],
    zero: Int[Array, ""],
) -> Float[Array, "64 N"]:
    """Starts x @ w.T of [64, 128] and [N, 128], where the descriptors say, in the
    registers of a product that is no longer needed. `zero` is to be one that compilers
    do not know: it keeps them from taking other registers.
    """
    N = product.shape[1]

    def run(_, product, x, w, zero):
        count = N // 2
        flag = f"${2 * count + 2}"
        registers = ", ".join(f"${i}" for i in range(count))
        text = [
            "{ .reg .pred old, more; .reg .b32 word; .reg .b64 x, w;",
            f"setp.ne.b32 old, {flag}, 0; setp.eq.b32 more, {flag}, {flag};",
            "wgmma.fence.sync.aligned;",
        ]
        for step in range(INNER // INNER_STEP):
            for operand, name in enumerate("xw"):
                text += [
                    f"add.u32 word, ${2 * count + operand},",
                    f"{step * INNER_STEP // ATOM};",
                    f"mov.b64 {name}, {{word, {UPPER_WORD}}};",
                ]
            text += [
                f"wgmma.mma_async.sync.aligned.m64n{N}k32.f32.e4m3.e4m3",
                f"{{{registers}}}, x, w, {'more' if step else 'old'}, 1, 1;",
            ]
        text.append("wgmma.commit_group.sync.aligned; }")
        words = [operand.registers.item() for operand in (x, w, zero)]
        return in_place(product, " ".join(text), words)

    return plgpu.inline_mgpu(
        arg_types=(SUMS, SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, N), jnp.float32, layout=SUMS),
    )(run)(product, x, w, zero)


def finish_product(product: Float[Array, "64 N"]) -> Float[Array, "64 N"]:
    """The values of the product that was started, once they are ready."""

    def run(_, product):
        return in_place(product, "wgmma.wait_group.sync.aligned 0;", [])

    return plgpu.inline_mgpu(
        arg_types=(SUMS,),
        return_type=plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=SUMS),
    )(run)(product)
