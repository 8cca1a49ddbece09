"""The main job on a tiny budget: everything is there, and nothing is overwritten."""

import json

import numpy as np
import pytest

from dsjax import quickstart as qs
from dsjax.data.stdlib import python_source
from dsjax.data.text import Corpus
from dsjax.data.windows import Windows
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer
from dsjax.train.step import Metrics
from tests.support import fill

SETTINGS = qs.Settings(
    d_model=48, moe_layers=1, vocab_size=300, length=32, batch_size=2, steps=6, warmup=2
)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    for number in range(40):
        lines = [f"def f{line}(x):\n    return x + {line}\n" for line in range(20)]
        (root / f"m{number}.py").write_text("\n".join(lines))
    return python_source(root=root, held_out_percent=20)


@pytest.fixture(scope="module")
def finished(split, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "quickstart"
    return out, qs.quickstart(out, settings=SETTINGS, split=split)


def test_everything_is_there(finished):
    out, results = finished
    assert {path.name for path in out.iterdir()} == {
        "checkpoint",
        "huggingface",
        "converted",
        "figure.png",
        "results.json",
    }
    assert (out / "huggingface" / "tokenizer.json").exists()
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "results.json").read_text()) == results
    assert not out.with_name("quickstart.partial").exists()


def test_results_are_true(finished, split):
    _, results = finished
    assert results["round_trip_max_difference"] == 0.0
    assert results["steps"] == 6 and results["train_tokens"] == 6 * 2 * 32
    held = results["held_out"]
    assert held["bytes"] == sum(path.stat().st_size for path in split.held_out)
    assert 0.5 < held["bits_per_byte"] < 12
    assert 0 < held["lzma_bits_per_byte"] < held["lzma_each_file_bits_per_byte"]
    assert results["sample"].startswith("def ")


def test_an_existing_directory_is_refused_before_any_work(finished):
    out, _ = finished
    with pytest.raises(UserError, match=r"exists: --force replaces it"):
        qs.quickstart(out)


def test_training_stops_when_its_time_is_over(monkeypatch, capsys):
    """A clock that runs 100 s a step: the cap of 200 s ends training within 4 steps."""
    zeros = np.zeros
    metrics = Metrics(
        loss=zeros(()),
        mtp_loss=zeros(()),
        balance_loss=zeros(()),
        gradient_norm=zeros(()),
        load_LE=zeros((2, 8)),
        max_violation_L=zeros(2),
        entropy_L=zeros(2),
        skipped=zeros((), bool),
    )
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(qs.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        qs, "make_step", lambda *_, **__: lambda state, *_: (state, metrics)
    )
    model = fill(Transformer.abstract(qs.model_config(SETTINGS)), std=0.1)
    corpus = Corpus(tokens=np.arange(2000) % 300, starts=np.zeros(1, int))
    history = qs.train(model, Windows(corpus, length=32), settings=SETTINGS, steps=50)
    assert 1 <= len(history.loss) <= 4
    assert "stopping early" in capsys.readouterr().out


def test_a_failed_run_leaves_no_result(split, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(qs, "train", fail)
    made = lambda config, *, seed, mesh: Transformer.abstract(config, mesh=mesh)  # noqa: E731
    monkeypatch.setattr(Transformer, "create", made)
    out = tmp_path / "quickstart"
    with pytest.raises(KeyboardInterrupt):
        qs.quickstart(out, settings=SETTINGS, split=split)
    assert not out.exists()


def test_smoothing_has_no_bias():
    np.testing.assert_allclose(qs._smooth(np.full(300, 3.0)), 3.0)
    rising = qs._smooth(np.arange(300.0))
    assert (np.diff(rising) > 0).all() and rising[-1] < 299
