"""Two processes: each reads its own shards, both save one checkpoint."""

import os
import socket
import subprocess
import sys

import numpy as np
import published

from dsjax.checkpoint import convert, load
from dsjax.nn.weights import flat

HOST = """
import sys
import jax
port, rank, source, out = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from dsjax.checkpoint import load, save
from dsjax.sharding import make_mesh
model = load(source, mesh=make_mesh(fsdp=2, expert=2))
shards = model.segments[1].feed_forward.experts.gate_EFD.get_value().addressable_shards
assert len(shards) == 2 < len(jax.devices())
save(model, out)
"""


def test_two_hosts(tmp_path):
    source = published.make(tmp_path / "hf", "deepseek_v3", dtype=published.F32)
    convert(source, tmp_path / "orbax", progress=False)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2"
    arguments = (str(tmp_path / "orbax"), str(tmp_path / "out"))
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, port, rank, *arguments],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for host in hosts:
            _, errors = host.communicate(timeout=120)
            assert host.returncode == 0, errors[-3000:]
    finally:
        for host in hosts:
            host.kill()
    saved = flat(load(tmp_path / "out"))
    for path, expected in flat(load(source)).items():
        np.testing.assert_array_equal(
            np.asarray(saved[path].get_value()), np.asarray(expected.get_value())
        )
