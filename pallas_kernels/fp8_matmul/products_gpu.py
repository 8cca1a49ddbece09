"""Products of e4m3 by a Hopper GPU's matrix unit, started and waited for one by one.

What Pallas has for them starts from zeros that a compiler sees, so that the next product
may begin in other registers before the last one is used: too many registers, and an order
that is the compiler's. Here a product goes to the registers of the one before, whose
values are to be used by then, and which the unit does not read: a flag says so that no
compiler knows. Its first operand, 64 rows, is in registers too, read once from shared
memory for all products that take it.

Letters: N columns of a product.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float, Int

ROWS, INNER = 64, 128  # of a product
INNER_STEP = 32  # of an instruction
ATOM = 16  # bytes that shared memory is counted in by descriptors
# The upper half of a descriptor: eight rows of 128 bytes lie together, swizzled so.
UPPER_WORD = 1 << 30 | 8 * INNER // ATOM
WORDS = (ROWS, INNER // 4)  # of `load_rows`: four values each
SWIZZLED = (plgpu.TilingTransform((8, INNER)), plgpu.SwizzleTransform(INNER))
SCALAR = plgpu.Layout.WG_SPLAT(())
SUMS = plgpu.Layout.WGMMA
FRAGMENT = plgpu.Layout._WGMMA_ACC_32BIT


def load_rows(x_ref, offset: Int[Array, ""]) -> Int[Array, "64 32"]:
    """64 x 128 values, `offset` bytes after the start of a swizzled reference, as
    products take them: four in a word.
    """

    def load(_, ref, offset):
        start = llvm.ptrtoint(_i32(), utils.memref_ptr(ref))
        thread = utils.thread_idx()
        lane, warp = _and(thread, 31), _and(_right(thread, 5), 3)
        # A warp loads 16 rows, 8 by 8 rows of 16 bytes: lane by lane, their addresses.
        row, matrix = _and(lane, 7), _right(lane, 3)
        below, right = _and(matrix, 1), _right(matrix, 1)
        rows = _sum(_sum(_left(warp, 4), _left(below, 3)), row)
        column = _left(llvm.xor(right, row), 4)  # where the swizzle puts it
        start = _sum(start, _sum(_left(rows, 7), column))
        words = []
        for step in range(INNER // INNER_STEP):
            here = llvm.xor(start, _constant(step * INNER_STEP))
            here = _sum(here, _scalar(offset))  # last: the rest is the same every time
            words += _assembly(
                *("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",),
                *([_i32()] * 4, [here], ["=r"] * 4 + ["r"]),
            )
        return _array(words, WORDS, FRAGMENT.to_mgpu(), is_signed=True)

    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(SWIZZLED), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(WORDS, jnp.int32, layout=FRAGMENT),
    )(load)(x_ref, offset)


def descriptor(w_ref) -> Int[Array, ""]:
    """Where a swizzled reference starts, as `start` takes it: in units of 16 bytes."""

    def describe(_, ref):
        start = llvm.ptrtoint(_i32(), utils.memref_ptr(ref))
        return fragmented.FragmentedArray.splat(
            *(_right(start, 4), (), SCALAR.to_mgpu()), is_signed=True
        )

    return plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(SWIZZLED),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )(describe)(w_ref)


def start(
    product: Float[Array, "64 N"],
    x: Int[Array, "64 32"],
    w: Int[Array, ""],
    zero: Int[Array, ""],
) -> Float[Array, "64 N"]:
    """Starts x @ w.T in the registers of a product that is no longer needed.

    `w` describes [N, 128]. `zero` must be one that compilers do not know: it keeps them
    from taking other registers.
    """
    N = product.shape[1]

    def run(_, product, x, w, zero):
        count = N // 2
        registers = ", ".join(f"${i}" for i in range(count))
        operands = [_value(word) for word in x.registers.flat]
        operands += [_scalar(w), _scalar(zero)]
        first, *_ = rest = range(2 * count, 2 * count + len(operands))
        w_word, flag = (f"${i}" for i in rest[-2:])
        text = [
            "{ .reg .pred old, more; .reg .b32 word; .reg .b64 w;",
            f"setp.ne.b32 old, {flag}, 0; setp.eq.b32 more, {flag}, {flag};",
            "wgmma.fence.sync.aligned;",
        ]
        for step in range(INNER // INNER_STEP):
            words = ", ".join(f"${first + 4 * step + i}" for i in range(4))
            text += [
                f"add.u32 word, {w_word}, {step * INNER_STEP // ATOM};",
                f"mov.b64 w, {{word, {UPPER_WORD}}};",
                f"wgmma.mma_async.sync.aligned.m64n{N}k32.f32.e4m3.e4m3",
                f"{{{registers}}}, {{{words}}}, w, {'more' if step else 'old'}, 1, 1;",
            ]
        text.append("wgmma.commit_group.sync.aligned; }")
        return _in_place(product, " ".join(text), operands)

    return plgpu.inline_mgpu(
        arg_types=(SUMS, FRAGMENT, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((ROWS, N), jnp.float32, layout=SUMS),
    )(run)(product, x, w, zero)


def finish(product: Float[Array, "64 N"], running: int = 0) -> Float[Array, "64 N"]:
    """The values of a product, once at most the last `running` started are not ready."""

    def run(_, product):
        return _in_place(product, f"wgmma.wait_group.sync.aligned {running};", [])

    return plgpu.inline_mgpu(
        arg_types=(SUMS,),
        return_type=plgpu.ShapeDtypeStruct(product.shape, jnp.float32, layout=SUMS),
    )(run)(product)


def _in_place(product, text: str, operands: list):
    """The array that assembly makes of an array, in the same registers: $0 and so on,
    then, counted once more, those it was in before; then the operands, of 32 bits.
    """
    as_words = product.to_layout(FRAGMENT.to_mgpu())
    registers = [_value(word) for word in as_words.registers.flat]
    count = len(registers)
    constraints = ["=f"] * count + [str(i) for i in range(count)]
    constraints += ["r"] * len(operands)
    values = _assembly(
        *(text, [ir.F32Type.get()] * count, registers + operands, constraints)
    )
    made = _array(values, product.shape, as_words.layout)
    return made.to_layout(product.layout)


def _assembly(text: str, types: list, operands: list, constraints: list[str]) -> list:
    result = llvm.inline_asm(
        *(llvm.StructType.get_literal(types), operands, text, ",".join(constraints)),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(kind, result, [i]) for i, kind in enumerate(types)]


def _array(values: list, shape: tuple[int, int], layout, is_signed=None):
    """Of registers with a value each."""
    kind = ir.VectorType.get((1,), values[0].type)
    registers = np.array(
        [llvm.insertelement(llvm.mlir_undef(kind), v, _constant(0)) for v in values],
        dtype=object,
    ).reshape(layout.registers_shape(shape))
    return fragmented.FragmentedArray(
        _registers=registers, _layout=layout, _is_signed=is_signed
    )


def _value(register):
    return llvm.extractelement(register, _constant(0))


def _scalar(array):
    return array.registers.item()


def _i32():
    return ir.IntegerType.get_signless(32)


def _constant(number: int):
    return llvm.ConstantOp(_i32(), ir.IntegerAttr.get(_i32(), number)).result


def _sum(a, b):
    return llvm.add(a, b, overflow_flags=llvm.IntegerOverflowFlags.none)


def _and(a, number: int):
    return llvm.and_(a, _constant(number))


def _left(a, bits: int):
    none = llvm.IntegerOverflowFlags.none
    return llvm.shl(a, _constant(bits), overflow_flags=none)


def _right(a, bits: int):
    return llvm.lshr(a, _constant(bits))
