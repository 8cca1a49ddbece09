"""The checks that other tests rest on: a planted race and a stray read are both caught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.interpret import interpreted


def copied(x, *, wait_first=True, row=0):
    """One row of `x` by a copy of the kernel's own, read before it is waited for if asked."""

    def kernel(row_ref, x_ref, y_ref, buffer, semaphore):
        rows = pl.ds(row_ref[0], 8)
        copy = pltpu.make_async_copy(x_ref.at[rows], buffer, semaphore)
        copy.start()
        if wait_first:
            copy.wait()
        y_ref[...] = buffer[...]
        if not wait_first:
            copy.wait()

    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((8, 128), lambda i, row: (0, 0)),
            scratch_shapes=[pltpu.VMEM((8, 128), x.dtype), pltpu.SemaphoreType.DMA(())],
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
    )
    return jax.block_until_ready(call(jnp.full(1, row), x))


X = jnp.arange(16 * 128, dtype=jnp.float32).reshape(16, 128)


def test_a_copy_waited_for_passes_and_is_counted():
    with interpreted() as copies:
        got = copied(X, row=8)
    np.testing.assert_array_equal(got, X[8:])
    assert copies["dma", 0] == 8 * 128 * 4


def test_a_planted_race_is_caught():
    with pytest.raises(AssertionError, match="a race"), interpreted():
        copied(X, wait_first=False)


def test_a_race_in_an_earlier_kernel_is_caught():
    with pytest.raises(AssertionError, match="a race"), interpreted():
        copied(X, wait_first=False)
        copied(X)


def test_a_stray_read_is_caught():
    with pytest.raises(Exception, match=r"[Oo]ut-of-bounds"), interpreted():
        copied(X, row=12)


def test_running_outside_is_caught():
    with pytest.raises(AssertionError, match="nothing"), interpreted():
        pass
