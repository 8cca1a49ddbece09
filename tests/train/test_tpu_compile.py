"""The real TPU compiler takes the training step: compiled ahead of time for a topology
that is not here.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

# libtpu asks a metadata server otherwise, and refuses a second compiling process.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "",
}
COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from dsjax import models
from dsjax.nn.options import Precision, Remat
from dsjax.nn.transformer import Transformer
from dsjax.sharding import make_mesh
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.step import Rates, init_state, make_step

topology = topologies.get_topology_desc(topology_name="{topology}", platform="tpu")
config = models.shrink(models.v3(), d_model=256, width=128)
model = Transformer.abstract(
    config,
    mesh=make_mesh(devices=list(topology.devices), **{mesh}),
    precision=Precision(),
    remat=Remat.V3,
)
optimizer = AdamW(moments="bfloat16")
objective = Objective(sequence_balance=1e-4, bias_speed=1e-3, mtp=0.3)
step = make_step(model, optimizer=optimizer, objective=objective)
number = jax.ShapeDtypeStruct((), jnp.float32)
tokens = jax.ShapeDtypeStruct((2, 4, 257), jnp.int32)
state = init_state(model, optimizer)
rates = Rates(learning_rate=number, mtp=number, bias_speed=number)
compiled = step.lower(state, dict(tokens=tokens), rates).compile()
print("peak", compiled.memory_analysis().peak_memory_in_bytes)
"""


@pytest.mark.skipif(not find_spec("libtpu"), reason="needs the TPU compiler")
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v5p:2x2x1", {"fsdp": 2, "expert": 2}),
        ("v6e:2x2", {"data": 2, "tensor": 2}),
    ],
)
def test_training_step_compiles_for_a_tpu(topology, mesh):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(topology=topology, mesh=mesh)],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 0
