"""The benchmark of several GPUs, at sizes for a test, on simulated devices."""

import numpy as np
import pytest

from benchmarks import gpus

MESHES = [gpus.mesh_of(1), gpus.mesh_of(2)]


def test_rows_that_leave():
    """4 tokens on 2 GPUs of 3 experts each; of 8, the last 4 on 2 more: by hand."""
    chosen_Nk = np.array([[0, 1], [0, 5], [3, 4], [2, 1]])
    # the second goes to GPU 1, the fourth (of GPU 1) to GPU 0
    assert gpus.rows_that_leave(chosen_Nk, 2, 2, 6) == 2
    assert gpus.rows_that_leave(np.tile(chosen_Nk, (2, 1)), 2, 2, 6) == 4


@pytest.mark.parametrize(
    "work", [gpus.dispatch, pytest.param(gpus.decode, marks=pytest.mark.slow)]
)
def test_a_line_for_each_number(work):
    one, two = work(MESHES, 1, tiny=True)
    assert (one["gpus"], two["gpus"]) == (1, 2)
    if work is gpus.dispatch:
        assert one["sent_mb_each"] == 0 < two["sent_mb_each"]


@pytest.mark.slow
def test_training_scales_its_batch():
    one, two = gpus.train(MESHES, 1, tiny=True)
    assert one["share_of_linear"] == 1.0 and two["share_of_linear"] > 0
