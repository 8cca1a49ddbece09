"""Outer products of a group's first and last rows, by a Hopper GPU's matrix unit.

Pallas multiplies 64 rows at a time of tiles whose lines have 128 bytes, and changes them
by way of registers. The instruction takes 16 rows: of a group's last ones, no more than
there are. And where others' rows lie between, zeros need no knowledge of what was there.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.assembly import (
    ATOM,
    SCALAR,
    SUMS,
    address_of,
    in_place,
    lane,
    run_assembly,
    start_of,
)
from pallas_kernels.grouped_matmul.ring_gpu import ALIGN, swizzled
from pallas_kernels.grouped_matmul.tiles_gpu import LINE

SLICE = 16  # rows of an instruction
_EIGHT_LINES = ALIGN * 128 // ATOM  # where the next LINE columns of the same rows lie
_SWIZZLED = 1 << 62  # of a descriptor: lines have 128 bytes
_TILED, _ = swizzled(jnp.bfloat16, LINE)


def _descriptor(columns: int) -> int:
    """Of a tile of so many columns, all but where it starts."""
    next_rows = columns // LINE * _EIGHT_LINES
    return _SWIZZLED | next_rows << 32 | _EIGHT_LINES << 16


def add_slices(
    sums: Float[Array, "R C"],
    dy_ref,
    x_ref,
    slices: Int[Array, ""],
    *,
    dy_columns: int,
    x_columns: int,
) -> Float[Array, "R C"]:
    """Adds the first 16 * slices rows of dy.T @ x: dy [64, R] and x [64, C], bfloat16, in
    shared memory, parts of tiles with so many columns; at most 4 slices. Waits for them.
    """
    rows, columns = sums.shape

    def run(_, sums, dy, x, slices):
        groups, each = rows // 64, columns // 2
        count = groups * each
        dy_word, x_word, slices_word = (f"${2 * count + i}" for i in range(3))
        text = [
            "{ .reg .pred none; .reg .b64 dy, dys, x;",
            f"cvt.u64.u32 dys, {dy_word}; cvt.u64.u32 x, {x_word};",
            f"or.b64 dys, dys, {_descriptor(dy_columns)};",
            f"or.b64 x, x, {_descriptor(x_columns)};",
            "wgmma.fence.sync.aligned;",
        ]
        for number in range(LINE // SLICE):
            text.append(f"setp.le.s32 none, {slices_word}, {number}; @none bra DONE;")
            for group in range(groups):
                first = group * each
                registers = ", ".join(f"${first + i}" for i in range(each))
                text += [
                    f"add.s64 dy, dys, {group * _EIGHT_LINES};",
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16",
                    f"{{{registers}}}, dy, x, 1, 1, 1, 1, 1;",
                ]
            text += [
                f"add.s64 {name}, {name}, {SLICE // ALIGN * width // LINE * _EIGHT_LINES};"
                for name, width in (("dys", dy_columns), ("x", x_columns))
            ]
        text.append("DONE: wgmma.commit_group.sync.aligned;")
        text.append("wgmma.wait_group.sync.aligned 0; }")
        starts = [start_of(operand, alone=True) for operand in (dy, x)]
        words = [*starts, slices.registers.item()]
        return in_place(sums, " ".join(text), words)

    return plgpu.inline_mgpu(
        arg_types=(SUMS, plgpu.RefType(_TILED), plgpu.RefType(_TILED), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, layout=SUMS),
    )(run)(sums, dy_ref, x_ref, slices)


def keep_rows(
    tile, first: Int[Array, ""], last: Int[Array, ""], *, columns: int
) -> None:
    """Zeros in all rows but `first` to `last` of [64, C], bfloat16, in shared memory: part
    of a tile with so many columns. Of eight rows and 64 columns all bytes of a row are in
    a line, wherever in it.
    """
    width = tile.shape[1]
    eight_rows = columns // LINE * _EIGHT_LINES * ATOM

    def run(_, tile, first, last):
        text = [
            "{ .reg .pred zero; .reg .b32 row, here, more;",
            "shr.u32 row, $1, 3; shr.u32 here, $1, 6; and.b32 more, $1, 63;",
            f"mul.lo.u32 here, here, {eight_rows}; shl.b32 more, more, 4;",
            "add.u32 here, here, more; add.u32 here, here, $0;",
        ]
        for _ in range(LINE // SLICE):  # a lane has 16 bytes of a line
            text.append("setp.lt.s32 zero, row, $2; @!zero setp.ge.s32 zero, row, $3;")
            text += [
                f"@zero st.shared.v4.b32 [here + {block * _EIGHT_LINES * ATOM}],"
                "{0, 0, 0, 0};"
                for block in range(width // LINE)
            ]
            text.append(f"add.u32 row, row, 16; add.u32 here, here, {2 * eight_rows};")
        bounds = [bound.registers.item() for bound in (first, last)]
        run_assembly(" ".join(text) + " }", [address_of(tile), lane(), *bounds])

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(_TILED), SCALAR, SCALAR))(run)(
        tile, first, last
    )
    plgpu.commit_smem()
