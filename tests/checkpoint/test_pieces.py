"""The parts below a conversion: FP8 blocks, safetensors files, windows, regions."""

import itertools
import math
import threading

import numpy as np
import published
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from dsjax.checkpoint import fp8, hf
from dsjax.checkpoint.safetensors import Planned, Writer, plan_shards, read_header
from dsjax.checkpoint.streaming import ordered, size, split, whole


@pytest.mark.parametrize("dtype", [published.BF16, published.F32], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (32, 64), (50, 70)])
def test_fp8_is_exact(rng, block, dtype):
    """All 256 bytes, subnormals and NaN too; any run of rows."""
    bits = (
        rng.permutation(np.arange(200 * 300) % 256).astype(np.uint8).reshape(200, 300)
    )
    weight = bits.view(fp8.E4M3)
    scale = rng.uniform(1e-4, 1e-3, fp8.scale_shape(weight.shape, block))
    scale = scale.astype(np.float32)
    spread = np.kron(scale, np.ones(block, np.float32))[:200, :300]
    expected = (weight.astype(np.float32) * spread).astype(dtype)
    for start, stop in ((0, 200), (17, 130), (199, 200)):
        found = fp8.dequantise(
            weight[start:stop], scale, first_row=start, block=block, dtype=dtype
        )
        assert found.dtype == dtype
        np.testing.assert_array_equal(
            found.astype(np.float32), expected[start:stop].astype(np.float32)
        )


def test_reader_reads_what_the_library_writes(tmp_path, rng):
    arrays = {
        "a": rng.standard_normal((7, 5)).astype(np.float32),
        "b": rng.standard_normal((3, 2, 4)).astype(published.BF16),
        "c": rng.integers(0, 255, (6, 6), np.uint8).view(published.E4M3),
        "d": np.arange(4, dtype=np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    stored = read_header(epath.Path(tmp_path / "x.safetensors"))
    for name, array in arrays.items():
        assert stored[name].rows().tobytes() == array.tobytes()
        assert stored[name].rows(1, 3).tobytes() == array[1:3].tobytes()
        assert stored[name].rows(1, 3).dtype == array.dtype


def test_library_reads_what_the_writer_writes(tmp_path, rng):
    arrays = {
        "model.a": rng.standard_normal((7, 5)).astype(np.float32),
        "model.bb": rng.standard_normal((5,)).astype(published.BF16),
    }
    file = epath.Path(tmp_path / "x.safetensors")
    plan = [Planned(name, array.dtype, array.shape) for name, array in arrays.items()]
    with Writer(file, plan) as writer:
        writer.write(arrays["model.a"][:3])
        writer.write(arrays["model.a"][3:])
        writer.write(arrays["model.bb"])
    for name, array in load_file(tmp_path / "x.safetensors").items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
    assert all(stored.offset % 4 == 0 for stored in read_header(file).values())


def test_shards_keep_order_and_limit():
    sizes = [3, 4, 9, 1, 1, 12, 2]
    planned = [Planned(str(i), np.dtype(np.uint8), (n,)) for i, n in enumerate(sizes)]
    shards = plan_shards(planned, limit=10)
    assert [t for group in shards.values() for t in group] == planned
    totals = [sum(t.nbytes for t in group) for group in shards.values()]
    assert totals == [7, 10, 1, 12, 2]
    assert list(shards)[4] == "model-00005-of-00005.safetensors"
    assert list(plan_shards(planned, limit=100)) == ["model.safetensors"]


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 1, 6), (9, 2)])
@pytest.mark.parametrize("limit", [1, 20, 60, 10**6])
def test_split_covers_everything_once(shape, limit):
    for leading in range(1, len(shape) + 1):
        seen = np.zeros(shape, int)
        inner = math.prod(shape[leading:]) * 2
        for region in split(whole(shape), leading, 2, limit):
            seen[region] += 1
            assert math.prod(size(region)) * 2 <= max(limit, inner)
        assert (seen == 1).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_published_rows(rows):
    """Any cut of a box: the rows that hold it, and the cut inside them."""
    box = (3, 4, 5, 2)
    ours = np.arange(math.prod(box)).reshape(box)
    matrix = ours.reshape(math.prod(box[:rows]), -1)
    ends = [[(0, n), (1, n), (0, 1), (1, 2)] for n in box]
    for bounds in itertools.product(*ends):
        cut = tuple(slice(*pair) for pair in bounds)
        start, stop, shape, inside = hf.published_rows(box, cut, rows)
        found = matrix[start:stop].reshape(shape)[inside]
        np.testing.assert_array_equal(found, ours[cut])


def test_window_is_bounded_and_ordered():
    running, most, lock = 0, 0, threading.Lock()
    begun = 0

    def work(job):
        nonlocal running, most, begun
        with lock:
            running, begun = running + 1, begun + 1
            most = max(most, running)
        with lock:
            running -= 1
        return job * job

    for count, (job, result) in enumerate(ordered(range(50), work, workers=3)):
        assert result == job * job and job == count
        assert begun - count <= 4 + 1
    assert most <= 3


def test_window_stops_at_the_first_error():
    begun = []

    def work(job):
        begun.append(job)
        if job == 3:
            raise OSError("broken")
        return job

    with pytest.raises(OSError, match="broken"):
        list(ordered(range(1000), work, workers=2))
    assert len(begun) < 10
