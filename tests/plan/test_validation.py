"""A plan's collectives against those of the program that the TPU compiler makes.

All that carry more than a fiftieth of the bytes are within a twentieth. Sizes are such
that no cut is thinner than the 128 lanes or the 8 rows of a core's tile: below, XLA pads,
and sends sums to all where they could be scattered.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsjax.plan import environment

ROOT = Path(__file__).parents[2]
COMPARE = """
import json, sys
from fractions import Fraction
from dsjax import models
from dsjax.plan import hlo
from dsjax.plan.memory import compiled, memory
from dsjax.plan.plan import estimate
from dsjax.plan.programs import Mode, Work
from dsjax.plan.topology import topology

name, mode, hardware, mesh, d_model, width = sys.argv[1:]
work = Work(
    config=models.shrink(models.get(name), d_model=int(d_model), width=int(width)),
    mode=Mode(mode),
    batch_per_device=Fraction(8 if mode == "decode" else 2),
    length=512,
)
plan = estimate(work, topology(hardware), json.loads(mesh))
made = compiled(plan.program)
flat = lambda sent: [[kind, ",".join(axes), size] for (kind, axes), size in sent.items()]
print(json.dumps({
    "planned": flat(plan.cost.sent),
    "compiled": flat(hlo.collectives(made.as_text(), plan.sizes)),
    "peak": memory(made).peak,
}))
"""
CASES = [
    ("llm_67b", "prefill", "v5p:2x2x1", {"fsdp": 2, "tensor": 2}, 1024, 512),
    *(
        pytest.param(*case, marks=pytest.mark.aot)
        for case in [
            ("llm_67b", "train", "v5p:2x2x2", {"fsdp": 4, "tensor": 2}, 1024, 512),
            ("v3", "prefill", "v5p:2x2x2", {"fsdp": 2, "expert": 4}, 512, 256),
            ("v3", "decode", "v6e:2x2", {"fsdp": 2, "expert": 2}, 512, 256),
            ("v3", "train", "v5p:2x2x2", {"fsdp": 2, "expert": 4}, 512, 256),
            ("v2_lite", "prefill", "v5p:2x2x2", {"data": 2, "expert": 4}, 512, 256),
        ]
    ),
]


@pytest.mark.skipif(not find_spec("libtpu"), reason="needs the TPU compiler")
@pytest.mark.parametrize(
    ("name", "mode", "hardware", "mesh", "d_model", "width"), CASES
)
def test_collectives_are_those_compiled(name, mode, hardware, mesh, d_model, width):
    done = subprocess.run(
        [
            *(sys.executable, "-c", COMPARE, name, mode, hardware, json.dumps(mesh)),
            *(str(d_model), str(width)),
        ],
        env=os.environ
        | environment.LIBTPU
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    planned, compiled = (
        {(kind, axes): size for kind, axes, size in found[which]}
        for which in ("planned", "compiled")
    )
    least = sum(compiled.values()) / 50
    large = {key for key in planned | compiled if planned.get(key, 0) > least}
    large |= {key for key, size in compiled.items() if size > least}
    assert large
    for key in large:
        assert planned.get(key, 0) == pytest.approx(compiled.get(key, 0), rel=0.05), key
    assert found["peak"] > 0
