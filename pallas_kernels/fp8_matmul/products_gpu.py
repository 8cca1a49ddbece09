"""Products of e4m3 by a Hopper GPU's matrix unit, started and waited for one by one.

What Pallas has for them takes registers of the compiler's choice for each product, so the
next may begin before the last one is used: too many registers, and an order that is the
compiler's. Here a product goes to the registers of the one before, whose values are to be
used by then, and which the unit does not read: a flag says so that no compiler knows.

Letters: N columns of a product.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

ir, llvm = utils.ir, utils.llvm  # of jaxlib, which is JAX's to ask for
ROWS, INNER = 64, 128  # of a product
INNER_STEP = 32  # of an instruction
ATOM = 16  # bytes that shared memory is counted in by descriptors
# The upper half of a descriptor: eight rows of 128 bytes lie together, swizzled so.
UPPER_WORD = 1 << 30 | 8 * INNER // ATOM
SWIZZLED = (plgpu.TilingTransform((8, INNER)), plgpu.SwizzleTransform(INNER))
SCALAR = plgpu.Layout.WG_SPLAT(())
SUMS = plgpu.Layout.WGMMA


def descriptor(ref) -> Int[Array, ""]:
    """Where a swizzled reference starts, as `start_product` takes it: in 16 bytes."""

    def describe(_, ref):
        start = llvm.ptrtoint(_i32(), utils.memref_ptr(ref))
        units = llvm.lshr(start, _constant(ATOM.bit_length() - 1))
        layout = SCALAR.to_mgpu()
        return fragmented.FragmentedArray.splat(units, (), layout, is_signed=True)

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
        return _in_place(product, " ".join(text), words)

    return plgpu.inline_mgpu(
        arg_types=(SUMS, SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, N), jnp.float32, layout=SUMS),
    )(run)(product, x, w, zero)


def finish_product(product: Float[Array, "64 N"]) -> Float[Array, "64 N"]:
    """The values of the product that was started, once they are ready."""

    def run(_, product):
        return _in_place(product, "wgmma.wait_group.sync.aligned 0;", [])

    return plgpu.inline_mgpu(
        arg_types=(SUMS,),
        return_type=plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=SUMS),
    )(run)(product)


def _in_place(product, text: str, words: list):
    """The array that assembly makes of an array, in the same registers: $0 and so on,
    then, counted once more, those it was in before; then words of 32 bits.
    """
    one_by_one = fragmented.WGMMA_LAYOUT_ACC_32BIT
    registers = product.to_layout(one_by_one).registers
    values = [llvm.extractelement(pair, _constant(0)) for pair in registers.flat]
    f32, count = ir.F32Type.get(), len(values)
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(words)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count),
        [*values, *words],
        text,
        ",".join(constraints),
        asm_dialect=0,
        has_side_effects=True,
    )
    kind = ir.VectorType.get((1,), f32)
    made = np.empty(count, object)
    for i in range(count):
        value = llvm.extractvalue(f32, result, [i])
        made[i] = llvm.insertelement(llvm.mlir_undef(kind), value, _constant(0))
    made = fragmented.FragmentedArray(
        _registers=made.reshape(registers.shape), _layout=one_by_one, _is_signed=None
    )
    return made.to_layout(product.layout)


def _i32():
    return ir.IntegerType.get_signless(32)


def _constant(number: int):
    return llvm.ConstantOp(_i32(), ir.IntegerAttr.get(_i32(), number)).result
