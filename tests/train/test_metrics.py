"""metrics.jsonl: what a resumed run cuts and keeps; rates, FLOPs, rows of hosts."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import numpy as np
import pytest

from dsjax import chips, hosts, models
from dsjax.count import count, training_flops
from dsjax.errors import UserError
from dsjax.sharding import make_mesh
from dsjax.train import console
from dsjax.train.metrics import FILE, Log
from tests.train import tiny


def test_rows_after_the_step_and_half_a_row_are_cut(tmp_path):
    log = Log(tmp_path, step=0)
    for step in range(1, 5):
        log.write({"step": step, "loss": np.float32(0.1) * step})
    log.write({"step": 4, "bits_per_byte": 2.0})
    log.close()
    whole = (tmp_path / FILE).read_text()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    log = Log(tmp_path, step=4)
    assert log.evaluated == 4
    log.close()
    assert (tmp_path / FILE).read_text() == whole
    log = Log(tmp_path, step=2, writes=False)
    assert log.evaluated == -1
    assert (tmp_path / FILE).read_text() == whole, "another process cuts it"
    Log(tmp_path, step=2).close()
    kept = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["step"] for row in kept] == [1, 2]
    assert np.float32(kept[1]["loss"]) == np.float32(0.1) * 2, "no digit is lost"


def test_what_json_has_no_word_for(tmp_path):
    log = Log(tmp_path, step=0)
    row = {"step": 1, "loss": np.float32("nan"), "load": np.full((2, 2), np.inf)}
    log.write(row)
    log.close()
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": None, "load": [[None] * 2] * 2}


def test_many_loads_only_now_and_then(tmp_path):
    log = Log(tmp_path, step=0)
    for step in (99, 100, 101):
        log.write({"step": step, "load": np.ones((58, 256))})
    log.close()
    rows = map(json.loads, (tmp_path / FILE).read_text().splitlines())
    assert ["load" in row for row in rows] == [False, True, False]


def test_training_flops_of_v3():
    """Three times the forward pass; MTP is a layer, a projection and the head again."""
    config = models.v3()
    plain = training_flops(config, length=4096, mtp=False)
    counted = count(config, context=2048)
    assert plain == 3 * counted.flops
    further = (training_flops(config, length=4096, mtp=True) - plain) / 3
    layer = (counted.active_without_lookup - config.vocab_size * 7168) / 61
    projection = 2 * 7168 * 7168
    expected = 2 * (layer + projection + config.vocab_size * 7168)
    expected += counted.attention_flops / 61
    assert further == pytest.approx(expected, rel=0.02)


def test_rates_leave_pauses_out(monkeypatch):
    clock = iter([0.0, 2.0, 100.0, 101.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    chip = chips.Chip(flops=1e12, memory=1, bandwidth=1, link=1)
    monkeypatch.setattr(chips, "find", lambda kind: chip)
    experiment = tiny.run()
    flops = training_flops(experiment.model, length=experiment.length, mtp=True)
    meter = console.Meter(experiment, jax.devices()[:2])
    assert meter.step(100).tokens is None, "it compiled"
    assert meter.step(100).tokens == 50
    meter.pause()
    assert meter.step(100) == console.Rate(None, None)
    assert meter.step(100).mfu == pytest.approx(100 * flops / 2e12)
    assert meter.recent.tokens == pytest.approx(200 / 3)


def test_mfu_of_an_unknown_chip():
    meter = console.Meter(tiny.run(), jax.devices()[:1])
    meter.step(1)
    assert meter.step(1).mfu is None


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, True),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_the_environment_tells_of_several_processes(environment, several):
    assert hosts.in_a_job(environment) == several


@pytest.mark.parametrize(
    ("workers", "several"), [("a:8470:10.0.0.2,b:8470:10.0.0.3", True), ("a", False)]
)
def test_metadata_tell_of_the_other_hosts_of_a_slice(workers, several):
    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.path.endswith("/attributes/worker-network-endpoints")
            right &= self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write(workers.encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert hosts.in_a_slice(environment) == several
    assert not hosts.in_a_slice(environment), "no server is there any more"
    skip = {"TPU_SKIP_MDS_QUERY": "1"}
    assert not hosts.in_a_slice(environment | skip)


@pytest.mark.parametrize(
    "flags",
    [
        {"coordinator": "a:1"},
        {"processes": 2, "process_id": 0},
        {"coordinator": "a", "processes": 2, "process_id": 0},
        {"coordinator": "a:1", "processes": 2, "process_id": 2},
    ],
)
def test_wrong_flags_of_several_processes(flags):
    with pytest.raises(UserError, match="--coordinator"):
        hosts.start(**flags)


class Device:
    """As much of a device as the sharing of rows needs."""

    def __init__(self, process: int) -> None:
        self.process_index = process


def share(monkeypatch, mesh, processes, rows):
    """The parts that processes bring when device n belongs to processes[n]."""
    placement = hosts.named(hosts.P(hosts.BATCH), (rows,), mesh)
    owners = {d: Device(p) for d, p in zip(mesh.devices.flat, processes)}
    cuts = placement.devices_indices_map((rows,))

    class Placement:
        def devices_indices_map(self, shape):
            return {owners[device]: cut for device, cut in cuts.items()}

    monkeypatch.setattr(hosts, "named", lambda *_: Placement())
    found = []
    for process in sorted(set(processes)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(hosts.part(rows, mesh))
    return found


@pytest.mark.parametrize(
    ("mesh", "processes", "rows", "parts"),
    [
        ({"data": 8}, [0] * 4 + [1] * 4, 8, [(0, 2), (1, 2)]),
        ({"data": 8}, [1] * 4 + [0] * 4, 8, [(1, 2), (0, 2)]),
        ({"data": 8}, [0, 1] * 4, 16, [(0, 2), (1, 2)]),
        ({"data": 2, "tensor": 4}, [0] * 4 + [1] * 4, 4, [(0, 2), (1, 2)]),
        ({"tensor": 8}, [0] * 4 + [1] * 4, 4, [(0, 1), (0, 1)]),
        (
            {"data": 2, "fsdp": 4},
            [0, 0, 1, 1, 2, 2, 3, 3],
            8,
            [(i, 4) for i in range(4)],
        ),
    ],
)
def test_which_rows_a_process_brings(monkeypatch, mesh, processes, rows, parts):
    assert share(monkeypatch, make_mesh(**mesh), processes, rows) == parts


def test_rows_that_cannot_be_shared(monkeypatch):
    mesh = make_mesh(data=4, tensor=2)
    with pytest.raises(UserError, match="cannot be shared equally"):
        share(monkeypatch, mesh, [0, 1, 1, 1, 1, 1, 1, 1], 8)
