"""Hopper kernels run by JAX's interpreter of Mosaic GPU, on a CPU: barriers, copies and
warpgroups as threads, and races between them fail the test.

What the interpreter lacks is added here: matrix products whose left operand lies in
registers, sums that start from an array, barriers whose last phase nobody waits for; views
of shared memory, of one shape, through which the same bytes lie at the same places; copies
for both blocks of a cluster, which here copy all of it themselves. And what was read of
shared memory before a barrier, or by the warpgroup that copies (which waits for all its
threads), may be overwritten by a copy after it, as JAX's own kernels have it, without a
fence.

Not looked after: products are done at once, so that nobody can be too early for them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic

if jax.__version_info__ >= (0, 11):
    from jax._src.pallas.mosaic_gpu.interpret import (
        gpu_callbacks,
        jaxpr_interpret,
        shared_memory,
    )

    _wgmma_of_refs, _plain_arrive = gpu_callbacks.wgmma, shared_memory.Barrier.arrive
    _plain_resolve = jaxpr_interpret.resolve_ref
    _plain_pre_read = gpu_callbacks.AsyncCopyGmemToSmemTask.pre_read

_plain_copy, _plain_copy_rows = plgpu.copy_gmem_to_smem, mosaic.copy_rows
NOWHERE = 2**20  # a row past the end of any array


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run interpreted; the test is skipped where JAX's interpreter is
    too young. Results have to be ready (`jax.block_until_ready`) before the context ends.

    Raises:
        AssertionError: a race was found (the interpreter itself only prints it), or
            nothing was interpreted.
    """
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX's interpreter of Mosaic GPU knows no wgmma")
    states = []

    class Races(gpu_callbacks.GPURaceDetectionState):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            states.append(self)  # one a kernel, thrown away after it

        def check_write(self, thread, clock, key, access, **rest):
            first = next(iter(access.range), None)
            if not (isinstance(first, slice) and first.start >= NOWHERE):
                super().check_write(thread, clock, key, access, **rest)

    options = {"out_of_bounds_reads": "raise", "uninitialized_memory": "nan"}
    if "on_race" in {field.name for field in fields(plgpu.InterpretGPUParams)}:
        options["on_race"] = "warn"  # from JAX 0.12 on; before, it knew nothing else
    params = plgpu.InterpretGPUParams(detect_races=True, **options)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with (
        mock.patch.object(pl, "run_state", _run_state),
        mock.patch.object(plgpu.ACC, "init", staticmethod(lambda start: start)),
        mock.patch.object(gpu_callbacks, "wgmma", _wgmma),
        mock.patch.object(gpu_callbacks, "GPURaceDetectionState", Races),
        mock.patch.object(jaxpr_interpret, "resolve_ref", _resolve_ref),
        mock.patch.object(plgpu, "copy_gmem_to_smem", _copy),
        mock.patch.object(gpu_callbacks.AsyncCopyGmemToSmemTask, "pre_read", _pre_read),
        mock.patch.object(shared_memory.Barrier, "deallocate", _deallocate),
        mock.patch.object(shared_memory.Barrier, "arrive", _arrive),
        plgpu.force_gpu_interpret_mode(params),
    ):
        try:
            yield
        finally:
            gpu_callbacks.reset_gpu_interpret_mode_state()
    assert states, "nothing was interpreted"
    assert not any(state.races_found for state in states), "a race"


def _run_state(multiply):
    """Of one accumulator that starts from an array."""

    def run(start):
        def scope(acc):
            multiply(acc)
            return acc[...]

        return start + pl.run_scoped(scope, plgpu.ACC(start.shape, start.dtype))

    return run


def _wgmma(**arguments):
    """The interpreter's, or, of a left operand that is an array, our own."""
    left = arguments["a_allocation_key_as_array"]
    if np.ndim(left) != 2:
        return _wgmma_of_refs(**arguments)
    memory, thread = gpu_callbacks._get_shared_memory(), arguments["thread"]
    info = gpu_callbacks.memory.GPULoggingInfo(
        arguments["mesh_location"], thread, arguments["source_info"]
    )

    def buffer(name):
        key = arguments[f"{name}_allocation_key_as_array"]
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        transforms = gpu_callbacks._remove_noop_transforms(
            arguments[f"{name}_transforms"]
        )
        place = key, memory.access(key, jax.tree.map(int, transforms))
        content, *_ = memory.get_buffer_content(*place, thread, logging_info=info)
        return place, content

    (_, right), (place, acc) = buffer("b"), buffer("acc")
    acc = acc + np.matmul(left, right, dtype=acc.dtype)
    memory.store_buffer_content(*place, acc, thread, logging_info=info)
    return arguments["token"]


def _resolve_ref(aval, keys, transforms):
    """The buffer of the first view of the same shape, instead of one of each view's own."""
    own, rest = _plain_resolve(aval, list(range(len(keys))), transforms)
    if rest is transforms:
        return keys, transforms
    shapes = [
        jaxpr_interpret._member_inner_aval(member)
        for member in jaxpr_interpret.union_members(aval)
    ]
    return keys[shapes.index(shapes[own])], rest


def _copy(*operands, collective_axes=None, **options) -> None:
    _plain_copy(*operands, **options)


def _pre_read(copy, *options) -> None:
    if copy.clock is not None:
        copy.clock.commit_smem()
    _plain_pre_read(copy, *options)


def copy_rows(tile, y, start, count) -> None:
    """`mosaic.copy_rows`, for kernels to be interpreted: the interpreter counts copies
    where a GPU counts groups of them, so one is made where there are no rows.
    """
    _plain_copy_rows(tile, y, start, count)

    @pl.when(count <= 0)
    def _():
        nowhere = y.at[pl.ds(NOWHERE + 0 * start, 1)]
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, 1)], nowhere, commit_group=False)


def _deallocate(barrier) -> None:
    with barrier.cv:
        barrier.ref_count -= 1
        assert barrier.ref_count > 0 or barrier.arrivals_count == 0


def _arrive(barrier, thread, clock=None, *rest, **options) -> None:
    if clock is not None:
        clock = clock.copy()
        clock.commit_smem()
    _plain_arrive(barrier, thread, clock, *rest, **options)
