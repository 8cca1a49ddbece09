"""Killed, stopped, moved: a run that goes on writes what it would have written."""

import inspect
import json
import os
import random
import shutil
import signal
import socket
import time

import numpy as np
import pytest

import dsjax
from dsjax import cli
from dsjax.checkpoint import export
from dsjax.nn.weights import flat
from dsjax.train import build
from tests.train import runs

STEPS = 24
TOKENS = ["--set", f"tokens={STEPS * 8 * 32}"]


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    stdout = runs.finish(runs.launch(out, *TOKENS, "--json", cache=cache))
    return out, json.loads(stdout)


def weights(directory) -> dict[str, np.ndarray]:
    model = dsjax.load(directory)
    return {path: np.asarray(leaf.get_value()) for path, leaf in flat(model).items()}


def assert_same_weights(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


def test_what_a_run_leaves(finished):
    out, result = finished
    rows = runs.rows(out)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in trained] == [256 * row["step"] for row in trained]
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [
        5,
        10,
        15,
        20,
        24,
    ]
    last = trained[-1]
    assert np.shape(last["load"]) == (3, 8)
    assert np.sum(last["load"], axis=1).tolist() == [2 * 256] * 3
    for row, worst in zip(last["load"], last["max_violation"]):
        assert worst == pytest.approx(max(row) / np.mean(row) - 1, rel=1e-5)
    assert all(0 < entropy <= np.log(8) for entropy in last["entropy"])
    assert last["loss"] < trained[0]["loss"] - 1
    assert not last["skipped"]
    assert result["bits_per_byte"] == rows[-1]["bits_per_byte"]
    assert (result["step"], result["stopped"]) == (STEPS, None)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["22", "24"]
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_every_checkpoint_is_a_model(finished, tmp_path):
    """As `dsjax.save` writes it: it loads, exports, has its tokenizer."""
    out, _ = finished
    assert_same_weights(out / "model", out / "checkpoints" / "24")
    assert (weights(out / "checkpoints" / "22")["embedding_VD"] != 0).any()
    export(out / "checkpoints" / "22", tmp_path / "hf", progress=False)
    model = dsjax.load(tmp_path / "hf")
    assert model.tokenizer.decode(model.tokenizer.encode("def f():")) == "def f():"
    for name, array in weights(out / "checkpoints" / "22").items():
        np.testing.assert_array_equal(flat(model)[name].get_value(), array)


def test_transformers_give_an_exported_run_the_same_loss(finished, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    export(finished[0] / "model", tmp_path / "hf", progress=False)
    ours = dsjax.load(tmp_path / "hf", dtype="float32")
    text = inspect.getsource(json) + inspect.getsource(random)
    tokens = np.array(ours.tokenizer.encode(text)[: 4 * 65]).reshape(4, 65)
    logits = np.float64(ours(tokens[:, :-1]))
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    loss = -np.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    )
    with torch.no_grad():
        tokens = torch.from_numpy(tokens)
        expected = theirs(tokens, labels=tokens).loss.item()
    assert loss < np.log(320) - 1  # it has learnt something
    assert loss == pytest.approx(expected, rel=2e-6)


def test_killed_at_random_points(finished, cache, tmp_path):
    """The same rows, bit for bit, and the same weights as without the kills."""
    out = tmp_path / "killed"
    chance = random.Random(time.time_ns())
    kills = sorted(chance.sample(range(2, STEPS - 2), 2))
    print("kills near steps", kills)
    for number, step in enumerate(kills):
        child = runs.launch(out, *TOKENS, *["--resume"] * (number > 0), cache=cache)
        runs.until(lambda step=step: runs.steps(out) >= step, child)
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        child.communicate()
    runs.finish(runs.launch(out, *TOKENS, "--resume", cache=cache))
    assert runs.rows(out) == runs.rows(finished[0])
    assert_same_weights(out / "model", finished[0] / "model")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_many_times(finished, cache, tmp_path, seed):
    """At any moment, the start and the writing of checkpoints among them."""
    out, chance = tmp_path / "killed", random.Random(seed)
    for _ in range(8):
        resume = ["--resume"] * (out / "experiment.txt").exists()
        child = runs.launch(out, *TOKENS, *resume, cache=cache)
        time.sleep(chance.uniform(3, 12))
        child.kill()
        child.communicate()
    runs.finish(runs.launch(out, *TOKENS, "--resume", cache=cache))
    assert runs.rows(out) == runs.rows(finished[0])
    assert_same_weights(out / "model", finished[0] / "model")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_asked_to_stop(cache, tmp_path, name, code):
    """The step is finished and saved; what comes after is as without the stop."""
    out = tmp_path / "run"
    more = ["tests.train.tiny.dense", "--set", "checkpoints.every_steps=0"]
    more += ["--set", "tokens=1e9", "--set", "evaluation.every_steps=0"]
    child = runs.launch(out, *more, cache=cache)
    runs.until(lambda: runs.steps(out) >= 3, child)
    began = time.monotonic()
    child.send_signal(signal.Signals[name])
    runs.finish(child, code)
    assert time.monotonic() - began < 30
    (saved,) = (out / "checkpoints").iterdir()
    assert int(saved.name) == runs.steps(out) >= 3
    assert not (out / "model").exists()


def test_asked_to_stop_while_it_compiles(tmp_path):
    out = tmp_path / "run"
    child = runs.launch(out)
    runs.until(lambda: (out / "metrics.jsonl").exists(), child)
    time.sleep(1)
    began = time.monotonic()
    child.terminate()
    runs.finish(child)
    assert time.monotonic() - began < 5
    assert runs.rows(out) == []


ON_EIGHT = [f"--set=mesh.{axis}=2" for axis in ("data", "fsdp", "expert")]
ON_EIGHT += ["--set=microbatch=8"]
QUIET = ["--set=evaluation.every_steps=0"]  # one program less to compile


@pytest.fixture(
    scope="module", params=["dense", pytest.param("run", marks=pytest.mark.slow)]
)
def name(request):
    """Of an experiment. What these tests are about is data, checkpoints and resuming,
    not experts, whose step takes most of a minute to compile for several devices.
    """
    return f"tests.train.tiny.{request.param}"


@pytest.fixture(scope="module")
def one(tmp_path_factory, name):
    """The first twelve steps on one device."""
    out = tmp_path_factory.mktemp("runs") / "one"
    args = [name, *TOKENS, *QUIET, "--out", str(out), "--steps=12"]
    assert cli.main(["train", *args]) == 0
    return out


@pytest.fixture(scope="module")
def eight(tmp_path_factory, name):
    """The first six steps on eight devices; how often each step compiled."""
    made, make_step = [], build.make_step

    def noted(*args, **options):
        made.append(make_step(*args, **options))
        return made[-1]

    out = tmp_path_factory.mktemp("runs") / "eight"
    args = [name, *TOKENS, *QUIET, *ON_EIGHT, "--out", str(out), "--steps=6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_step", noted)
        assert cli.main(["train", *args]) == 0
    return out, [step.compiled._cache_size() for step in made]


def assert_close(ours, theirs, *, steps):
    """Losses of the first steps, to float tolerance."""
    rows = [
        [row for row in runs.rows(out) if "loss" in row][:steps]
        for out in (ours, theirs)
    ]
    assert len(rows[0]) == len(rows[1]) == steps
    for one, other in zip(*rows):
        for name in ("loss", "mtp_loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_resumes_on_another_mesh(name, one, eight, cache, tmp_path):
    """Six steps on eight devices, as one program; the rest on one device."""
    out, compiled = shutil.copytree(eight[0], tmp_path / "run"), eight[1]
    assert compiled == [1]
    more = [*TOKENS, *QUIET, "--resume", "--steps=12"]
    runs.finish(runs.launch(out, name, *more, cache=cache))
    assert_close(out, one, steps=12)


def test_two_processes(name, one, eight, cache, tmp_path):
    """Four devices each, as one process of eight; resumed by one process of one device."""
    out = tmp_path / "run"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    together = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    args = [*TOKENS, *QUIET, *ON_EIGHT, "--steps=3", *together]
    children = [
        runs.launch(out, name, *args, f"--process-id={index}", XLA_FLAGS=flags)
        for index in range(2)
    ]
    try:
        outputs = [runs.finish(child) for child in children]
    finally:
        for child in children:
            child.kill()
    assert "saved" in outputs[0]
    assert "saved" not in outputs[1], "gloo prints there, the run does not"
    assert_close(out, eight[0], steps=3)
    more = [*TOKENS, *QUIET, "--resume", "--steps=6"]
    runs.finish(runs.launch(out, name, *more, cache=cache))
    assert_close(out, one, steps=6)


def copy_of(run, place):
    return shutil.copytree(run, place / "run", dirs_exist_ok=False)


def damage(checkpoint, item: str) -> None:
    """Cuts the data files of one part in half."""
    files = [path for path in (checkpoint / item).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("item", ["params", "state", "run"])
def test_a_corrupt_checkpoint_is_named(finished, tmp_path, capsys, item):
    out = copy_of(finished[0], tmp_path)
    damage(out / "checkpoints" / "24", item)
    before = (out / "metrics.jsonl").read_bytes()
    args = ["train", "tests.train.tiny.run", *TOKENS, "--out", str(out), "--resume"]
    assert cli.main(args) == 2
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("dsjax")
    ]
    assert f"checkpoint {out}/checkpoints/24 cannot be read" in line
    assert f"the one before it is {out}/checkpoints/22: --fallback uses it" in line
    assert (out / "metrics.jsonl").read_bytes() == before


def test_the_checkpoint_before_a_corrupt_one(finished, cache, tmp_path):
    out = copy_of(finished[0], tmp_path)
    damage(out / "checkpoints" / "24", "params")
    shutil.rmtree(out / "model")
    done = runs.launch(out, *TOKENS, "--resume", "--fallback", cache=cache)
    assert f"using {out}/checkpoints/22" in runs.finish(done)
    assert runs.rows(out) == runs.rows(finished[0])
    assert_same_weights(out / "model", finished[0] / "model")
    assert (out / "unreadable" / "24").is_dir()


def test_no_readable_checkpoint(finished, tmp_path, capsys):
    out = copy_of(finished[0], tmp_path)
    for step in ("22", "24"):
        damage(out / "checkpoints" / step, "state")
    args = ["train", "tests.train.tiny.run", *TOKENS, "--out", str(out), "--resume"]
    assert cli.main([*args, "--fallback"]) == 2
    assert "checkpoints/22 cannot be read" in (err := capsys.readouterr().err)
    assert "there is none before it" in err


def test_resumed_when_complete(finished, tmp_path, capsys):
    """Nothing changes; a model that was not written yet is."""
    out = copy_of(finished[0], tmp_path)
    shutil.rmtree(out / "model")
    args = ["train", "tests.train.tiny.run", *TOKENS, "--out", str(out), "--resume"]
    assert cli.main(args) == 0
    assert runs.rows(out) == runs.rows(finished[0])
    assert_same_weights(out / "model", finished[0] / "model")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "exists: --resume goes on with it"),
        (
            ["--resume", "--set", "learning_rate.peak=1"],
            "is of another experiment: learning_rate.peak was 0.004, is 1.0",
        ),
    ],
)
def test_a_run_is_never_overwritten(finished, capsys, args, message):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    args = ["tests.train.tiny.run", *TOKENS, "--out", str(out), *args]
    assert cli.main(["train", *args]) == 2
    assert message in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_no_run_to_resume(tmp_path, capsys):
    args = ["train", "tests.train.tiny.run", "--out", str(tmp_path / "no"), "--resume"]
    assert cli.main(args) == 2
    assert "has no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
