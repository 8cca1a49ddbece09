"""Times and errors of kernels on the GPU at hand, for the benchmarks.

`python -m pallas_kernels.bench` runs every `Case`: what an operation is asked to do, who
computes it, and what it takes at least.
"""

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
WARM_UP = 0.1  # seconds of its own work before each: clocks follow what ran before


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


def device_ms(run: Callable, *operands: Array, repeats: int = REPEATS) -> float:
    """Milliseconds that the kernels of one call take on the GPU: the median of several,
    by CUPTI, so without the host's part. `run` is compiled.
    """
    from jax.experimental.mosaic.gpu import profiler

    warm_up(lambda: jax.block_until_ready(run(*operands)))
    _, times = profiler.measure(run, iterations=repeats)(*operands)
    return statistics.median(times)


def torch_ms(run: Callable, *operands, repeats: int = REPEATS) -> float:
    """The same for a function of PyTorch tensors, by CUDA events around each call."""
    import torch

    def once() -> None:
        run(*operands)
        torch.cuda.synchronize()

    warm_up(once)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for begin, end in zip(marks[::2], marks[1::2]):
        begin.record()
        run(*operands)
        end.record()
    torch.cuda.synchronize()
    pairs = zip(marks[::2], marks[1::2])
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def warm_up(once: Callable[[], object]) -> None:
    """Calls it for WARM_UP seconds, at least once."""
    end = time.perf_counter() + WARM_UP
    once()
    while time.perf_counter() < end:
        once()


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
