"""Reading a compiled program: groups of devices, loops, bytes."""

import pytest

from dsjax.plan.hlo import collectives, groups

SIZES = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("[2,4]<=[2,2,2]T(1,0,2), x", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=2] {'b'}, to_apply=%add", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}, to_apply=%add", [[0, 2], [1, 3]]),
        ("mesh['a'=4,'b'=1] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("{}, dimensions={0}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_form(written, expected):
    found = groups(f"%x), channel_id=1, replica_groups={written}", 4)
    assert list(found) == expected


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input.1: bf16[8,256]) -> bf16[8,128] {
  %input.1 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.3 = bf16[8,256]{1,0} all-reduce(%input.1), replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
  ROOT %cut = bf16[8,128]{1,0} dynamic-slice(%all-reduce.3), dynamic_slice_sizes={8,128}
}

%body (state: (s32[], bf16[16,256])) -> (s32[], bf16[16,256]) {
  %state = (s32[]{:T(128)}, bf16[16,256]{1,0}) parameter(0)
  %gather = bf16[16,256]{1,0:T(8,128)(2,1)} all-gather(%part), replica_groups=[4,2]<=[8], dimensions={0}, backend_config={"text":"a
  %not = f32[9,9] all-gather(inside a string, replica_groups=[4,2]<=[8]
"}
  %scatter = bf16[8,128]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (state: (s32[], bf16[16,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %state = (s32[]{:T(128)}, bf16[16,256]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%data (state: (s32[], bf16[16,256])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[16,256]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (p0: bf16[16,256]) -> bf16[16,256] {
  %p0 = bf16[16,256]{1,0} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %counted = (s32[]{:T(128)}, bf16[16,256]{1,0}) tuple(%one, %p0)
  %loop = (s32[]{:T(128)}, bf16[16,256]{1,0}) while(%counted), condition=%condition, body=%body
  %further = (s32[]{:T(128)}, bf16[16,256]{1,0}) while(%counted), condition=%data, body=%body
  %start = (bf16[4,256]{1,0}, bf16[16,256]{1,0}) all-gather-start(%p0), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = bf16[16,256]{1,0} all-gather-done(%start)
  %pair = (f32[8]{0}, f32[]) all-reduce(%a, %b), replica_groups=mesh['x'=8] {'x'}, to_apply=%add
  %exchange = bf16[64,256]{1,0} ragged-all-to-all(%p0, %room, %c, %d, %e, /*index=5*/%f), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %scattered = f32[4,128]{1,0} reduce-scatter(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add
  ROOT %moved = bf16[16,256]{1,0} collective-permute(%p0), source_target_pairs={{0,1},{1,0}}
}
"""


def test_bytes_by_kind_and_axes():
    """The loop starts at 1 and runs 6 times; the one whose length is data, never."""
    assert collectives(PROGRAM, SIZES) == {
        ("all-gather", ("expert",)): 6 * 16 * 256 * 2,
        ("reduce-scatter", ("fsdp",)): 6 * 8 * 256 * 2,
        ("all-gather", ("fsdp", "expert")): 16 * 256 * 2,
        ("all-reduce", ("data", "fsdp", "expert")): 9 * 4,
        ("ragged-all-to-all", ("expert",)): 16 * 256 * 2,
        ("reduce-scatter", ("data",)): 2 * 4 * 128 * 4,
        ("collective-permute", ("expert",)): 16 * 256 * 2,
    }
