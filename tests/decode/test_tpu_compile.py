"""The decoding loop, compiled by the real TPU compiler for a topology that is not here."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsjax import models
from dsjax.config import Dense, Segment
from dsjax.decode import engine
from dsjax.decode.sample import Sampling
from dsjax.nn.cache import empty_cache
from dsjax.nn.options import Precision
from dsjax.nn.transformer import Transformer
from dsjax.sharding import BATCH, make_mesh
from tests.pallas_kernels.aot import tpu

LAYERS, ROWS, SLOTS = 8, 32, 8192
CONFIG = replace(
    models.tiny_v3(),
    attention=replace(models.v3().attention, num_heads=16, q_rank=128),
    segments=(Segment(count=LAYERS, feed_forward=Dense(width=256)),),
    max_length=SLOTS,
)


def compiled_loop(topology: str, **mesh: int) -> jax.stages.Compiled:
    model = Transformer.abstract(
        CONFIG,
        mesh=make_mesh(devices=list(tpu(topology).devices), **mesh),
        precision=Precision(params=jnp.bfloat16),
    )
    graph, state = nnx.split(model)

    forms = []

    def generation():
        """Leaf by leaf: the shape check of the tests wants arrays in a cache's place."""
        cache = empty_cache(
            CONFIG, batch=ROWS, slots=SLOTS, dtype=jnp.bfloat16, mesh=model.mesh
        )
        leaves, form = jax.tree.flatten(
            engine.Generation(
                cache=cache,
                new_BN=model.place(jnp.zeros((ROWS, 16), jnp.int32)),
                count=jnp.int32(1),
                done_B=jax.sharding.reshard(jnp.zeros(ROWS, bool), jax.P(BATCH)),
            )
        )
        forms.append(form)
        return leaves

    def run(leaves, state, limit, keys_B, stops):
        return engine._run(
            graph,
            state,
            jax.tree.unflatten(forms[0], leaves),
            limit,
            Sampling(temperature=0.0),
            keys_B,
            stops,
        )

    with jax.set_mesh(model.mesh):
        leaves = jax.eval_shape(generation)
        limit, stops = (jax.ShapeDtypeStruct(n, jnp.int32) for n in ((), (1,)))
        keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
        loop = jax.jit(run, donate_argnums=0)
        return loop.lower(leaves, state, limit, keys_B, stops).compile()


def copies_no_cache(topology: str, **mesh: int) -> None:
    """Every layer's kernels are inside, and nothing of the cache's size lies beside it."""
    compiled = compiled_loop(topology, **mesh)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert {"mla_decode", "mla_append"} <= set(re.findall(r"%(mla_[a-z]+)", text))
    batch = mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("expert", 1)
    cache = LAYERS * ROWS // batch * SLOTS * (512 + 64) * 2
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 20
    stacked = rf"\[{LAYERS},{ROWS // batch},(?:{SLOTS},512|64,{SLOTS})\]\S* copy"
    assert not re.findall(stacked, text)


def test_decoding_copies_no_cache():
    copies_no_cache("v6e:2x2", data=2, tensor=2)


@pytest.mark.aot
@pytest.mark.parametrize("mesh", [{"expert": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_decoding_copies_no_cache_anywhere(topology, mesh):
    copies_no_cache(topology, **mesh)
