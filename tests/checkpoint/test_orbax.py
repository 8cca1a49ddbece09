"""What is written is plain Orbax, in chunks that bound the memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import published
import pytest

from dsjax import models
from dsjax.checkpoint import convert, load, orbax, save, table
from dsjax.checkpoint.hf import array_shapes
from dsjax.nn.options import Precision
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import make_mesh


def abstract_tree(config, mesh, dtype) -> dict:
    """ShapeDtypeStructs with shardings, nested: what a user of Orbax alone would pass."""
    model = Transformer.abstract(config, mesh=mesh, precision=Precision(params=dtype))
    leaves = {path: variable.get_value() for path, variable in flat(model).items()}
    return orbax.nested(leaves)


@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3"])
def test_bare_orbax_restores_it_on_eight_devices(tmp_path, kind):
    source = published.make(tmp_path / "hf", kind)
    convert(source, tmp_path / "out", progress=False)
    model = load(source, dtype="bfloat16")
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    tree = abstract_tree(model.config, mesh, "bfloat16")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "params", tree)
    spread = 0
    for path, expected in flat(model).items():
        found = restored
        for key in path.split("."):
            found = found[key]
        spread += not found.sharding.is_fully_replicated
        np.testing.assert_array_equal(np.asarray(found), expected.get_value())
    assert spread > len(flat(model)) / 2


def test_bare_orbax_restores_it_without_a_tree(tmp_path):
    source = published.make(tmp_path / "hf", "llama")
    convert(source, tmp_path / "out", progress=False)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "params")
    embedding = published.tensors(published.config("llama"))
    np.testing.assert_array_equal(
        np.asarray(restored["embedding_VD"]), embedding["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "expert": 4}], ids=str)
def test_save_and_load(tmp_path, mesh):
    """A model, sharded or not, comes back as it was."""
    source = published.make(tmp_path / "hf", "deepseek_v3", dtype=published.F32)
    model = load(source, mesh=make_mesh(**mesh))
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.config == model.config
    for path, expected in flat(model).items():
        found = flat(loaded)[path].get_value()
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_chunks_of_v3():
    """Every chunk is part of one published tensor and at most 16 MiB."""
    config = models.v3()
    shapes = array_shapes(config)
    lines = {tensor.path: tensor for tensor in table.tensors(config, shapes)}
    for path, shape in shapes.items():
        leading, rows = len(lines[path].index), lines[path].rows
        chunk = orbax.chunk_shape(shape, leading=leading, rows=rows, itemsize=2)
        assert chunk[:leading] == (1,) * leading
        assert math.prod(chunk) * 2 <= orbax.CHUNK_BYTES
        # nearly equal parts: less than 2% of what is written is padding
        padded = math.prod(-(-n // c) * c for n, c in zip(shape, chunk))
        assert padded <= 1.02 * math.prod(shape), (path, chunk)


def test_loading_computes_the_same(tmp_path):
    """Both forms and a sharded mesh give the same logits."""
    source = published.make(tmp_path / "hf", "deepseek_v3", dtype=published.F32)
    convert(source, tmp_path / "out", progress=False)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    direct = np.asarray(load(source)(tokens))
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "out")(tokens)), direct)
    mesh = make_mesh(fsdp=2, expert=4)
    sharded = np.asarray(load(tmp_path / "out", mesh=mesh)(tokens))
    np.testing.assert_allclose(sharded, direct, atol=1e-4)
    assert np.isfinite(direct).all() and jax.device_count() == 8
