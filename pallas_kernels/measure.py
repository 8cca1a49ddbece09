"""Times and errors of kernels on the GPU at hand, for the benchmarks.

`python -m pallas_kernels.bench` runs every `Case`: what an operation is asked to do, who
computes it, and what it takes at least.
"""

import enum
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

Operands = tuple[Array, ...]
REPEATS = 10  # calls in a row
ROUNDS = 5  # turns of each contestant
SETTLE = 0.1  # seconds of a contestant's own work before each
REST = 0.12  # seconds of none
MOST_CALLS = 300  # until clocks have settled


class Clocks(enum.StrEnum):
    """What the GPU did before its kernels are timed: clocks follow power and temperature,
    and a product that draws 700 W for a tenth of a second runs a tenth slower than in the
    first milliseconds.
    """

    SETTLED = "settled"  # the same, for SETTLE seconds
    RESTED = "rested"  # nothing, for REST seconds


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    `inputs` draws fresh operands from a key. `contestants` are functions of them, ours
    (through the api) first; `torch` makes further ones, of the same operands as tensors,
    where PyTorch is installed. `exact` is the first output in float32, by any means.
    `flops` and `bytes` are those that the result needs: no padding, each operand once.
    `target` says in words what the first contestant is to reach.
    """

    operation: str
    name: str
    inputs: Callable[[Array], Operands]
    contestants: dict[str, Callable]
    exact: Callable[..., Array]
    flops: int
    bytes: int
    torch: Callable[[], dict[str, Callable]] | None = None
    target: str = ""


def device_ms(run: Callable, *operands: Array, clocks: Clocks) -> float:
    """Milliseconds that the kernels of one call take on the GPU: `kernels_ms` of a
    compiled JAX function.
    """
    last = None

    def once() -> None:
        nonlocal last
        last = run(*operands)

    return kernels_ms(once, lambda: jax.block_until_ready(last), clocks)


def torch_ms(run: Callable, *operands, clocks: Clocks) -> float:
    """The same for a function of PyTorch tensors."""
    import torch

    return kernels_ms(lambda: run(*operands), torch.cuda.synchronize, clocks)


def kernels_ms(
    once: Callable, wait: Callable, clocks: Clocks, repeats: int = REPEATS
) -> float:
    """Milliseconds that the kernels launched by one call of `once` take, by CUPTI, so
    without the host's part: the median of `repeats` calls in a row, after what `clocks`
    says. `wait` returns when all is done.
    """
    from jax.experimental.mosaic.gpu import profiler

    for _ in range(2):  # the first one may load the kernels
        begun = time.perf_counter()
        once()
        wait()
    calls = repeats
    if clocks is Clocks.SETTLED:
        one = time.perf_counter() - begun
        calls += min(math.ceil(SETTLE / one), MOST_CALLS)
    else:
        time.sleep(REST)
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        for _ in range(calls):
            once()
        wait()
    finally:
        times = cupti._cupti_get_timings(True)
    each, others = divmod(len(times), calls)
    if others or not each:
        raise RuntimeError(f"{len(times)} kernels of {calls} calls")
    sums = [
        sum(ms for _, ms in times[i : i + each]) for i in range(0, len(times), each)
    ]
    return statistics.median(sums[-repeats:])


def poison(shapes) -> None:
    """Fills free memory of these arrays' sizes with NaNs, where their like may come to
    lie next: what a kernel forgets to write shows.
    """
    dirty = [
        jnp.full(leaf.shape, jnp.nan, leaf.dtype)
        for leaf in jax.tree.leaves(shapes)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    jax.block_until_ready(dirty)
    for leaf in dirty:
        leaf.delete()


@jax.jit
def relative_error(found: Array, exact: Array) -> Array:
    """|found - exact| / |exact|, both norms over all elements, in float32."""
    exact = exact.astype(jnp.float32)
    difference = found.astype(jnp.float32) - exact
    return jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(exact.ravel())
