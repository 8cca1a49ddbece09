"""The count of what dispatch sends, against sets of devices token by token."""

import numpy as np
import pytest

from benchmarks import dispatch
from dsjax import models
from dsjax.nn.dispatch import destinations
from dsjax.nn.router import route

TOKENS = 24


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("name", ["tiny_v2", "tiny_v3"])
def test_counts(name, devices, skewed):
    config = dispatch.experts_of(models.get(name))
    found = dispatch.counted(config, devices=devices, tokens=TOKENS, skewed=skewed)

    scores_NE, bias_E = dispatch._scores(config, devices * TOKENS, skewed=skewed)
    bias_E = bias_E if config.selection_bias else None
    chosen_Nk = np.asarray(route(scores_NE[None], bias_E, config).indices_BTk)[0]
    device_Nk = chosen_Nk // (config.num_experts // devices)
    own = np.arange(devices * TOKENS) // TOKENS
    reached = [set(row) for row in device_Nk.tolist()]
    away = [sorted(row - {me}) for row, me in zip(reached, own)]

    assert found.mean == np.mean([len(row) for row in reached])
    assert found.largest == max(map(len, reached)) <= found.bound
    assert found.rows == np.mean([len(row) for row in away])
    assert found.choices == (device_Nk != own[:, None]).sum() / len(own)
    assert found.rows <= found.choices


def test_bounds_of_the_published_routings():
    """V2: 3 of 8 groups, 6 experts; V3: 4 of 8 groups, 8 experts."""
    bounds = {
        (model.name, devices): destinations(dispatch.experts_of(model), devices)
        for model, skewed, devices in dispatch.cases()
        if not skewed
    }
    assert bounds == {
        ("v2", 8): 3,
        ("v2", 16): 6,
        ("v2", 32): 6,
        ("v3", 8): 4,
        ("v3", 16): 8,
        ("v3", 32): 8,
        ("v3", 64): 8,
    }
