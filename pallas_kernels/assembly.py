"""Instructions for a Hopper GPU that Pallas has no word for, on sums in registers."""

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragmented
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

ir, llvm = utils.ir, utils.llvm  # of jaxlib, which is JAX's to ask for
SCALAR = plgpu.Layout.WG_SPLAT(())  # the layout of a number that all lanes have
SUMS = plgpu.Layout.WGMMA  # and that of sums of products
ATOM = 16  # bytes that shared memory is counted in by descriptors
_SHARED = 1 << 18  # bytes that descriptors can tell apart


def address_of(ref):
    """Where a reference to shared memory starts: a word of 32 bits."""
    return llvm.ptrtoint(_i32(), utils.memref_ptr(ref))


def start_of(ref, *, alone: bool):
    """The same in ATOM bytes, as descriptors have it; `alone`, without the bits that say
    which block of a cluster it is, where a descriptor's next field means something.
    """
    start = address_of(ref)
    if alone:
        start = llvm.and_(start, _constant(_SHARED - 1))
    return llvm.lshr(start, _constant(ATOM.bit_length() - 1))


def lane():
    """Which one of a warpgroup's lanes this is: a word of 32 bits."""
    return llvm.and_(utils.thread_idx(), _constant(utils.WARPGROUP_SIZE - 1))


def run_assembly(text: str, words: list) -> None:
    """Runs what changes memory; $0 and so on are the words of 32 bits."""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        words,
        text,
        ",".join(["r"] * len(words) + ["~{memory}"]),
        asm_dialect=0,
        has_side_effects=True,
    )


def in_place(sums, text: str, words: list):
    """The array that assembly makes of an array, in the same registers: $0 and so on,
    then, counted once more, those it was in before; then words of 32 bits. Of every 64
    rows all registers follow each other.
    """
    one_by_one = fragmented.WGMMA_LAYOUT_ACC_32BIT
    registers = sums.to_layout(one_by_one).registers
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
    return made.to_layout(sums.layout)


def _i32():
    return ir.IntegerType.get_signless(32)


def _constant(number: int):
    return llvm.ConstantOp(_i32(), ir.IntegerAttr.get(_i32(), number)).result
