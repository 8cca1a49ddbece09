"""Work in a bounded window: a few jobs ahead in threads, results in order."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike
from tqdm import tqdm

from dsjax.config import ModelConfig
from dsjax.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Region = tuple[slice, ...]  # one slice with start and stop for each dimension
FLOATS = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))
LOCAL_WORKERS, REMOTE_WORKERS = 4, 16  # object stores answer slowly, but many at once


class Source(Protocol):
    """What a checkpoint is to `assemble`: `HfSource` and `OrbaxSource`."""

    directory: epath.Path

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Stored dtypes by dotted path."""

    def read(self, path: str, region: Region, dtype: np.dtype) -> np.ndarray:
        """A region of an array."""


def ordered(
    jobs: Iterable[Job], run: Callable[[Job], Result], *, workers: int
) -> Iterator[tuple[Job, Result]]:
    """(job, run(job)) for every job, in order; at most `workers` + 1 results wait.

    The first error ends everything: jobs that have not begun are dropped.
    """
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                waiting.append((job, pool.submit(run, job)))
                if len(waiting) > workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def workers(*paths: epath.Path) -> int:
    """How many jobs to run at once for these places."""
    remote = any("://" in str(path) for path in paths)
    return REMOTE_WORKERS if remote else LOCAL_WORKERS


def progress_bar(label: str, total: int, *, done: int = 0, show: bool = True) -> tqdm:
    """Bytes and rate on stderr; nothing when that is no terminal or `show` is false."""
    return tqdm(
        desc=label,
        total=total,
        initial=done,
        unit="B",
        unit_scale=True,
        disable=None if show else True,
    )


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`, without a copy when it is already."""
    return array.astype(dtype, copy=False)


def float_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype that weights are asked for in. Raises UserError for no float of ours."""
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known not in FLOATS:
        names = ", ".join(kind.name for kind in FLOATS)
        raise UserError(f"dtype {dtype!r} is not one of {names}")
    return known


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of an array."""
    return tuple(slice(0, size) for size in shape)


def size(region: Region) -> tuple[int, ...]:
    """The shape of what a region selects."""
    return tuple(part.stop - part.start for part in region)


def split(region: Region, leading: int, itemsize: int, limit: int) -> Iterator[Region]:
    """Cuts a region along its first `leading` dimensions into parts of <= limit bytes.

    The first dimension is cut as little as possible, down to single indices before the
    next one is: parts are runs of rows, of nearly equal size. Dimensions past `leading`
    stay whole.
    """
    inner = itemsize * math.prod(size(region)[1:])
    first, rest = region[0], region[1:]
    count = first.stop - first.start
    if leading == 0 or inner * count <= limit:
        yield region
        return
    parts = -(-count // max(1, limit // inner))
    step = -(-count // parts)
    for start in range(first.start, first.stop, step):
        part = slice(start, min(start + step, first.stop))
        if inner <= limit or leading == 1:
            yield (part, *rest)
        else:
            yield from (
                (part, *tail) for tail in split(rest, leading - 1, itemsize, limit)
            )
