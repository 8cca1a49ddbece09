"""The scaling laws at the budgets whose answers are known."""

import json

import pytest

from dsjax import cli
from dsjax.errors import UserError
from dsjax.train.scaling import flops_per_token, scaling


@pytest.mark.parametrize(
    ("flops", "rate", "batch"),
    [
        (1e17, 2.34e-3, 106e3),
        (1e18, 1.75e-3, 226e3),
        (1e19, 1.32e-3, 479e3),
        (1e20, 9.86e-4, 1.02e6),
        (8.456e22, 4.25e-4, 9.22e6),  # DeepSeek LLM 7B on 2T tokens
        (9.946e23, 3.12e-4, 20.65e6),  # and 67B
    ],
)
def test_learning_rate_and_batch(flops, rate, batch):
    found = scaling(flops)
    assert found.learning_rate == pytest.approx(rate, rel=5e-3)
    assert found.batch_tokens == pytest.approx(batch, rel=6e-3)
    assert found.batch_sequences == found.batch_tokens / 4096


@pytest.mark.parametrize(
    ("layers", "d_model", "flops"), [(30, 4096, 4.228e10), (95, 8192, 4.973e11)]
)
def test_model_size_is_the_papers(layers, d_model, flops):
    found = flops_per_token(layers=layers, d_model=d_model)
    assert found == pytest.approx(flops, rel=1e-3)


def test_model_times_data_is_compute():
    """The paper's exponents add up to 1 and its factors multiply to 1.000."""
    for exponent in range(17, 26):
        found = scaling(10.0**exponent)
        product = found.flops_per_token * found.tokens
        assert product == pytest.approx(10.0**exponent, rel=2e-4)


@pytest.mark.parametrize("exponent", [15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25])
def test_the_suggested_shape_is_near(exponent):
    found = scaling(10.0**exponent)
    size = flops_per_token(layers=found.layers, d_model=found.d_model)
    assert found.suggested_flops_per_token == size
    wide = 0.35 if exponent < 18 else 0.1  # few whole heads to choose from
    assert size == pytest.approx(found.flops_per_token, rel=wide)
    assert found.d_model % 128 == 0
    assert 40 < found.d_model / found.layers < 260
    assert found.parameters == 12 * found.layers * found.d_model**2


def test_nonsense_is_refused():
    for flops in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="flops="):
            scaling(flops)


def test_command(capsys):
    assert cli.main(["scaling", "--flops", "1e20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scaling(1e20).as_dict()
    assert cli.main(["scaling", "--flops", "1e20"]) == 0
    printed = capsys.readouterr().out
    assert "9.860e-04" in printed and "non-embedding" in printed
    assert cli.main(["scaling", "--flops", "-1"]) == 2
