"""The table of chips: every name has whole and plausible figures, a CPU has none."""

import pytest

from dsjax import chips


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_figures_are_of_one_device_in_base_units(kind):
    """A slip of a unit, or a chip's figure for its two devices, leaves these bounds."""
    chip = chips.find(kind)
    assert 150 <= chip.flops / chip.bandwidth <= 600  # FLOPs that hide one byte
    assert 6 <= chip.memory / chip.bandwidth * 1000 <= 60  # ms to read all of it
    assert 16e9 <= chip.link <= chip.bandwidth / 5


def test_spot_checks():
    assert chips.find("NVIDIA H200").bandwidth == 4.8e12
    assert chips.find("TPU v5 lite") is chips.find("TPU v5e")
    assert 2 * chips.find("TPU7x").flops == 2307e12
    assert chips.find("cpu") is None
