"""What goes wrong during a run, and what a run can be asked for: on one dense layer."""

import json
import os
import subprocess
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax import cli
from dsjax.config import Yarn
from dsjax.errors import UserError
from dsjax.train import build, run
from dsjax.train.experiment import Checkpoints
from dsjax.train.run import train
from dsjax.train.schedule import BatchSize
from tests.train import runs, tiny

pytestmark = pytest.mark.usefixtures("compiled_once")


def dense(**changes):
    experiment = tiny.dense()
    every = Checkpoints(every_minutes=0, every_steps=1, keep=2)
    return replace(experiment, **({"checkpoints": every} | changes))


def test_three_steps_that_are_not_finite_end_a_run(tmp_path, capsys, monkeypatch):
    """One is skipped and counted; the message names the step and a good checkpoint."""
    build_step, calls = build.make_step, []

    def breaks(*args, **options):
        step = build_step(*args, **options)

        def broken(state, batch, rates):
            calls.append(0)
            if len(calls) in (2, 5, 6, 7, 8):
                copy = jax.tree.map(jnp.copy, state)
                nans = {path: jnp.nan * leaf for path, leaf in copy.params.items()}
                _, metrics = step(replace(copy, params=nans), batch, rates)
                return replace(state, step=state.step + 1), metrics
            return step(state, batch, rates)

        return broken

    monkeypatch.setattr(build, "make_step", breaks)
    monkeypatch.setattr("dsjax.train.override.find", lambda name: dense())
    assert cli.main(["train", "x.y", "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite in 3 steps in a row, the last of them step 7" in line
    assert line.endswith(f"the last good checkpoint: {tmp_path}/run/checkpoints/4")
    rows = runs.rows(tmp_path / "run")
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert skipped == [2, 5, 6, 7]
    assert rows[1]["loss"] is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for one checkpoint and not for three."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk(small_disk, capsys, monkeypatch):
    """One line that names what is whole; that loads, and goes on when there is room."""
    out = small_disk / "run"
    every = Checkpoints(every_minutes=0, every_steps=1, keep=9)
    monkeypatch.setattr(
        "dsjax.train.override.find", lambda name: dense(checkpoints=every)
    )
    assert cli.main(["train", "x.y", "--out", str(out)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    whole = sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    assert "the disk is full" in line
    assert (
        f"the newest is {out}/checkpoints/{whole[-1]}: make room and --resume" in line
    )
    for step in whole:
        dsjax.load(out / "checkpoints" / str(step))
    enough = Checkpoints(every_minutes=0, every_steps=1, keep=1)
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    result = train(dense(checkpoints=enough), out=out, resume=True)
    assert result["step"] == 12


def test_length_extension(tmp_path, monkeypatch):
    """A run at length 64 goes on at 256 with YaRN: it starts from those weights, and
    attends further than it ever did before.
    """
    short = dense(
        length=64, tokens=4 * 8 * 64, evaluation=tiny.Evaluation(every_steps=0)
    )
    train(short, out=tmp_path / "short")
    attention = short.model.attention
    yarn = Yarn(factor=4, original_length=64)
    rope = replace(attention.rope, scaling=yarn)
    model = replace(short.model, attention=replace(attention, rope=rope))
    long = replace(
        short,
        model=model,
        length=256,
        tokens=2 * 8 * 256,
        initial=str(tmp_path / "short" / "model"),
    )
    before = dsjax.load(tmp_path / "short" / "model")
    parts = build.build(long, workdir=tmp_path / "data")
    state = build.first_state(long, parts)
    for path, variable in build.flat(before).items():
        weight = (state.params | state.biases)[path]
        np.testing.assert_array_equal(weight, variable.get_value(), err_msg=path)
    result = train(long, out=tmp_path / "long")
    assert np.isfinite(result["held_out_loss"])
    after = dsjax.load(tmp_path / "long" / "model")
    assert after.config.attention.rope.scaling == yarn
    tokens = np.random.default_rng(0).integers(0, 256, (1, 256), dtype=np.int32)
    others = tokens.copy()
    others[:, :100] = (others[:, :100] + 1) % 256
    difference = np.abs(np.asarray(after(tokens) - after(others)))[0, 101:].max(axis=-1)
    assert difference[-1] > 1e-4, "position 255 sees what is 156 and more before it"
    assert np.isfinite(np.asarray(after(tokens))).all()


def test_an_initial_checkpoint_of_another_shape_is_named(tmp_path):
    narrow = dense(tokens=256)
    train(narrow, out=tmp_path / "run")
    wide = replace(narrow.model, vocab_size=640)
    other = replace(narrow, model=wide, initial=str(tmp_path / "run" / "model"))
    with pytest.raises(
        UserError, match=r"embedding_VD is \(320, 64\) there, \(640, 64\)"
    ):
        train(other, out=tmp_path / "other")


def test_profile_and_ramp_and_average(tmp_path, capsys):
    """A trace, a batch that grows, and the average of the weights beside them."""
    batch = BatchSize(sequences=16, start=8, ramp_tokens=4 * 256, increment=8)
    experiment = dense(batch=batch, tokens=4 * 256 + 6 * 512, ema=0.9)
    result = train(experiment, out=tmp_path / "run", profile=True)
    out = tmp_path / "run"
    assert list((out / "profile").rglob("*.xplane.pb"))
    rows = [row for row in runs.rows(out) if "loss" in row]
    sizes = np.diff([0] + [row["tokens"] for row in rows])
    assert sizes.tolist() == [256] * (len(rows) - sizes.tolist().count(512)) + [512] * (
        sizes.tolist().count(512)
    )
    assert {256, 512} == {*sizes.tolist()}
    assert result["tokens"] >= experiment.tokens
    model, average = dsjax.load(out / "model"), dsjax.load(out / "model_ema")
    assert (model.embedding_VD[...] != average.embedding_VD[...]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"microbatch": 3}, "microbatch=3 must divide batch"),
        ({"length": 1024}, "length=1024 is more than model.max_length=512"),
        ({"mesh": tiny.MeshShape(data=16)}, "needs 16 devices, 8 are here"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(dense(**changes), out=tmp_path / "run")


def test_unknown_experiment_is_one_line(capsys):
    assert cli.main(["train", "experiments.pretrain_tiny_v4"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "near it pretrain_tiny_v3" in line


def test_json_alone_on_stdout(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dsjax.train.override.find", lambda name: dense(tokens=256))
    assert cli.main(["train", "x.y", "--out", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == f"{tmp_path}/run/model"
    assert run.PATIENCE == 3
