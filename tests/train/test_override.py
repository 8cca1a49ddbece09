"""--set and the experiment's name: every kind of field, and one line for a mistake."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from dsjax.config import Dense, Yarn
from dsjax.data.mixture import Source
from dsjax.errors import UserError
from dsjax.nn.options import Remat
from dsjax.train.experiment import describe
from dsjax.train.objective import Dropping
from dsjax.train.override import find, override
from dsjax.train.schedule import Constant, MultiStep, Piecewise
from tests.train import tiny


def at(experiment, path: str):
    value = experiment
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, tuple) else getattr(value, key)
    return value


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("tokens", "1e9", 10**9),
        ("tokens", "1_000", 1000),
        ("learning_rate.peak", "1e-3", 1e-3),
        ("learning_rate", "0.5", 0.5),
        (
            "learning_rate",
            "Constant(peak=1e-3, warmup=7)",
            Constant(peak=1e-3, warmup=7),
        ),
        (
            "learning_rate",
            "MultiStep(peak=1, fractions=(0.6, 0.9))",
            MultiStep(peak=1.0, fractions=(0.6, 0.9)),
        ),
        (
            "objective.mtp",
            "Piecewise(values=(0.3,0.1),boundaries=(100,))",
            Piecewise(values=(0.3, 0.1), boundaries=(100,)),
        ),
        ("model.segments.1.feed_forward.top_k", "4", 4),
        ("model.segments.1.feed_forward.score", "softmax", tiny.Score.SOFTMAX),
        ("model.segments.1.feed_forward.groups", "None", None),
        ("model.segments.0.feed_forward", "Dense(width=7)", Dense(width=7)),
        ("model.attention.q_rank", "none", None),
        ("model.attention.rope.scaling", "Yarn(factor=40)", Yarn(factor=40.0)),
        ("model.mtp", "false", False),
        ("model.name", "a name", "a name"),
        ("model.name", "None", "None"),
        ("data.sources", "(Source(path='a/b'),)", (Source(path="a/b"),)),
        ("data.sources.root", "/some/where", "/some/where"),
        ("data.held_out", "None", None),
        ("precision.compute", "bfloat16", jnp.dtype("bfloat16")),
        ("remat", "V3", Remat.V3),
        ("remat", "Remat.FULL", Remat.FULL),
        ("objective.dropping", "Dropping(devices=2)", Dropping(devices=2)),
        ("mesh.fsdp", "4", 4),
        ("initial", "some/checkpoint", "some/checkpoint"),
        ("checkpoints.every_minutes", "0.5", 0.5),
    ],
)
def test_set(path, text, value):
    before = tiny.run()
    after = override(before, f"{path}={text}")
    found = at(after, path)
    assert found == value
    assert type(found) is type(value)
    assert at(before, path) != value or path == "data.held_out"
    kept = {line for line in describe(before).splitlines() if path not in line}
    assert kept - {*describe(after).splitlines()} == set()


def test_set_inside_a_tuple_of_sources():
    sources = (Source(path="a"), Source(path="b", weight=2.0))
    before = override(tiny.run(), f"data.sources={sources!r}")
    after = override(before, "data.sources.1.path=c=d")
    assert after.data.sources == (sources[0], replace(sources[1], path="c=d"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tokens", "write path.to.field=value"),
        ("tokns=3", "Experiment has no field 'tokns': near it tokens"),
        ("tokens=many", "'many' is no whole number"),
        ("tokens=1.5", "'1.5' is no whole number"),
        ("tokens=inf", "'inf' is no whole number"),
        ("tokens.more=1", "3072 has no field 'more'"),
        ("batch.start=x", "'x' is no whole number or None"),
        ("model.segments.2.count=1", "'2' is no index from 0 to 1"),
        ("model.segments.x.count=1", "'x' is no index from 0 to 1"),
        ("model.segments.0.feed_forward.top_k=1", "Dense has no field 'top_k'"),
        ("model.segments.1.feed_forward.top_k=99", "top_k=99 is more than"),
        ("model.attention.rope.scaling.factor=4", "None has no field 'factor'"),
        ("model.attention.rope.scaling=Yarn", "Yarn needs fields of factor"),
        ("model.mtp=1", "'1' is no bool"),
        ("precision.compute=int8", "'int8' is no floating-point dtype"),
        ("precision.compute=f99", "'f99' is no floating-point dtype"),
        ("remat=some", "'some' is none of NONE, FULL, OFFLOAD, V3"),
        ("learning_rate=Linear(peak=1)", "is no float or Constant or MultiStep"),
        ("learning_rate=Cosine(peek=1)", "Cosine has no field 'peek': near it peak"),
        ("learning_rate=Cosine(1)", "Cosine needs fields of peak"),
        ("learning_rate=Cosine(peak=x)", "'x' is no float"),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    with pytest.raises(UserError) as raised:
        override(tiny.run(), setting)
    assert str(raised.value).startswith(f"--set {setting}: ")
    assert message in str(raised.value)


def test_find():
    assert find("tests.train.tiny.run") == tiny.run()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run", "write PACKAGE.FUNCTION"),
        ("tests.train.tiny.rum", "tests.train.tiny has no function 'rum': near it run"),
        ("tests.train.tiny.MOE", "has no function 'MOE'"),
        ("tests.train.tinny.run", "no module 'tests.train.tinny': near it tiny"),
        ("dsjx.run", "no module 'dsjx': near it dsjax"),
        ("tests.train.tiny.model", "returned a ModelConfig, no Experiment"),
        ("tests.support.random_model", "missing a required argument: 'name'"),
    ],
)
def test_a_wrong_name_is_named(name, message):
    with pytest.raises(UserError) as raised:
        find(name)
    assert message in str(raised.value)


def test_an_experiments_own_missing_import_is_a_defect(tmp_path, monkeypatch):
    (tmp_path / "broken_experiment.py").write_text("import not_installed_at_all\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        find("broken_experiment.run")
