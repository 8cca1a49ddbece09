"""`dsjax plan`: its report, its JSON, one line for every mistake."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsjax import cli, models
from dsjax.errors import UserError
from dsjax.plan.memory import _used
from dsjax.plan.meshes import candidates
from dsjax.plan.programs import Mode, Work
from dsjax.plan.topology import _wraps, topology
from pallas_kernels import dispatch

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
    not find_spec("libtpu"), reason="needs the TPU compiler"
)
KEYS = {
    "arguments_bytes",
    "temporaries_bytes",
    "peak_bytes",
    "hbm_bytes",
    "fits",
    "flops",
    "hbm_traffic_bytes",
    "collectives",
    "roofline_seconds",
    "mfu_bound",
    "mfu_bound_overlapped",
    "tokens_per_second",
    "compile_seconds",
}


def plan(
    *args: str, program=("-m", "dsjax.cli", "plan")
) -> subprocess.CompletedProcess:
    """`dsjax plan ARGS` as from a shell, where nothing is set for JAX."""
    unset = ("JAX_PLATFORMS", "XLA_FLAGS", "TPU_SKIP_MDS_QUERY")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *program, *args],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


def work(model="tiny_v3", mode=Mode.TRAIN, rows="1", length=128) -> Work:
    return Work(
        config=models.get(model),
        mode=mode,
        batch_per_device=Fraction(rows),
        length=length,
    )


@needs_libtpu
def test_json_has_every_key_and_nothing_else_is_printed():
    done = plan(
        *("tiny-v3", "--topology", "v5p:2x2x1", "--mode", "decode", "--json"),
        *("--mesh", "fsdp=2,expert=2", "--batch-per-device", "2", "--length", "256"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() >= KEYS
    assert found["mesh"] == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
    assert found["devices"] == 4
    assert found["batch"] == 8
    assert found["fits"] is True
    assert 0 < found["arguments_bytes"] < found["hbm_bytes"]
    assert found["roofline_seconds"].keys() == {"compute", "memory", "network"}
    seconds = found["roofline_seconds"].values()
    assert min(seconds) > 0
    assert 0 < found["mfu_bound"] < found["mfu_bound_overlapped"] < 1
    assert found["tokens_per_second"] >= 8 / sum(seconds)
    assert {tuple(sorted(c)) for c in found["collectives"]} == {
        ("axis", "bytes", "kind")
    }
    # The cache is updated in place: 576 values a token would be V3's, here 40.
    cache = found["groups_bytes"]["cache"]
    assert cache == 2 * (4 * 256 * (32 + 8) * 2) + 2 * 4
    assert found["aliased_bytes"] >= cache
    for word in ("tracing", "compiling"):
        assert word in done.stderr
    assert "WARNING" not in done.stderr


@needs_libtpu
def test_latents_in_fp8_are_counted_with_their_scales():
    done = plan(
        *("tiny-v3", "--topology", "v5p:2x2x1", "--mode", "decode", "--json"),
        *("--mesh", "fsdp=2,expert=2", "--batch-per-device", "2", "--length", "256"),
        *("--cache-dtype", "float8_e4m3fn"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["precision"]["cache"] == "float8_e4m3fn"
    cache = found["groups_bytes"]["cache"]
    assert cache == 2 * (4 * 256 * (32 + 4 + 8 * 2)) + 2 * 4
    assert found["aliased_bytes"] >= cache


@needs_libtpu
@pytest.mark.aot
@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_the_report_ranks_meshes(mode):
    done = plan(
        *("tiny-v2-lite", "--topology", "v6e:2x2", "--mode", mode, "--mesh", "auto"),
        *("--batch-per-device", "2", "--length", "256"),
    )
    assert done.returncode == 0, done.stderr
    assert "parameters " + ("float32" if mode == "train" else "bfloat16") in done.stdout
    assert done.stdout.count("fits") == 4  # three of the table, and the best at the top


MISTAKES = [  # and what the line says
    (("v9", "--topology", "v5p:2x2x1"), "unknown model 'v9'"),
    (("v3", "--topology", "v5p:2x2x1", "--mesh", "fsdp=3"), "is 3 devices"),
    (("v3", "--topology", "v5p:2x2x1", "--remat", "some"), "remat 'some'"),
    (("v3", "--topology", "v5p:3x5x1"), "v5p:3x5x1"),
]


@needs_libtpu
def test_mistakes_are_one_line_and_exit_code_2():
    """The first as a command, all of them one after another in one process."""
    done = plan(*MISTAKES[0][0])
    assert (done.returncode, done.stdout) == (2, "")
    one_line_each(done.stderr, MISTAKES[:1])
    program = (
        "import json, sys; from dsjax import cli; "
        "print([cli.main(['plan', *args]) for args in json.loads(sys.argv[1])])"
    )
    done = plan(json.dumps([args for args, _ in MISTAKES]), program=["-c", program])
    assert (done.returncode, done.stdout) == (0, "[2, 2, 2, 2]\n"), done.stderr
    one_line_each(done.stderr, MISTAKES)


def one_line_each(printed: str, mistakes: list[tuple]) -> None:
    for line, (_, words) in zip(printed.splitlines(), mistakes, strict=True):
        assert line.startswith("dsjax: ") and words in line


@pytest.mark.parametrize(
    "name",
    ["v5p", "v5p:8x8", "v6e:2x2x2", "v7:2x2", "v5e:axb", "h200:9", "h200:0", "h100:8"],
)
def test_topologies_that_mean_nothing(name):
    with pytest.raises(UserError, match=name):
        topology(name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("v5p:2x2x1", r"dsjax\[tpu\]"), ("h200:8", "jax-cuda13-plugin")],
)
def test_a_missing_compiler_is_named(monkeypatch, name, advice):
    monkeypatch.setattr("dsjax.plan.topology.find_spec", lambda _: None)
    with pytest.raises(UserError, match=advice):
        topology(name)


def test_a_plug_in_without_its_driver_is_told_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("dsjax.plan.topology.find_spec", lambda _: True)
    monkeypatch.setattr("dsjax.plan.topology.topologies.get_topology_desc", refuse)
    with pytest.raises(UserError, match="'h200': without a GPU, set JAX_PLATFORMS=cpu"):
        topology("h200")


def test_which_dimensions_are_rings():
    assert [_wraps("v5p", size) for size in (2, 4, 8)] == [False, True, True]
    assert [_wraps("v6e", size) for size in (4, 8, 16)] == [False, False, True]


@pytest.mark.parametrize(
    ("rows", "devices", "batch"), [("1", 8, 8), ("1/4", 8, 2), ("0.5", 4, 2)]
)
def test_sequences_in_all(rows, devices, batch):
    assert work(rows=rows).batch(devices) == batch


def test_parts_of_a_sequence_are_refused():
    with pytest.raises(UserError, match="1/3 sequences a device on 8 devices"):
        work(rows="1/3").batch(8)


def test_longer_than_the_model_can_see():
    with pytest.raises(UserError, match="163840"):
        work(model="v3", length=200_000)


def test_candidates_use_all_devices_and_divide_the_model():
    for mode in Mode:
        found = candidates(work("v3", mode), 512)
        assert len({tuple(sizes.items()) for sizes in found}) == len(found) >= 9
        for sizes in found:
            fsdp, data = sizes.get("fsdp", 1), sizes.get("data", 1)
            assert data * fsdp * sizes["expert"] * sizes["tensor"] == 512
            assert 256 % sizes["expert"] == 0


def test_training_cuts_matrices_only_where_sequences_are_few():
    assert {s["tensor"] for s in candidates(work("v3"), 64)} == {1}
    assert {s["tensor"] for s in candidates(work("v3", rows="1/4"), 64)} == {4}


def test_what_the_compiler_ran_out_of():
    message = "RESOURCE_EXHAUSTED: ... Used 133.50G of 95.74G hbm. Exceeded by 38G."
    assert _used(message) == int(133.5 * 2**30)
    assert _used("RESOURCE_EXHAUSTED: hbm") == 0


@pytest.mark.parametrize("options", [[], ["--no-kernels"]])
def test_kernels_may_be_left_out(monkeypatch, options):
    asked = []
    monkeypatch.setattr(
        "dsjax.plan.command.plan", lambda args: asked.append(dispatch.named(None))
    )
    monkeypatch.setattr("dsjax.plan.environment.prepare", lambda: None)
    cli.main(["plan", "v3", "--topology", "v5p:2x2x1", *options])
    assert asked == (["reference"] if options else [None])
