"""What the Hopper kernels of several operations call Mosaic GPU by."""

import functools
import inspect

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

SMS = 132  # multiprocessors of an H100 or H200
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_NEEDS_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty  # 0.10


def is_hopper() -> bool:
    """Whether the GPU at hand is of Hopper's generation; without one, what is compiled
    ahead of time for a GPU is taken to be.
    """
    if jax.default_backend() != "gpu":
        return True
    return jax.devices()[0].compute_capability.startswith("9.")


def load(ref, *, layout, optimized: bool = True) -> Array:
    """All of a reference, in registers that are laid out so."""
    index = ((),) if _NEEDS_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def store(ref, value: Array) -> None:
    """Writes all of a reference, even where lanes do not fill whole sectors of memory:
    since JAX 0.12 that has to be asked for.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def copy_rows(tile, y, start, count) -> None:
    """Copies the first `count` rows of a tile to rows from `start` on: at once, or in
    runs of powers of two, since the size of a copy is fixed when it is compiled.
    """
    tall = tile.shape[0]

    def copy(first, rows: int):
        here = y.at[pl.ds(start + first, rows)]
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(first, rows)], here, commit_group=False)

    @pl.when(count == tall)
    def _():
        copy(0, tall)

    @pl.when(count < tall)
    def _():
        run = tall // 2
        while run:
            pl.when((count & run) != 0)(
                functools.partial(copy, count & ~(2 * run - 1), run)
            )
            run //= 2
