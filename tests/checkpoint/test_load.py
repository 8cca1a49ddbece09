"""Loading reads bounded slabs, each host its own shards, each row once."""

import importlib

import jax
import numpy as np
import published
import pytest
from etils import epath

from dsjax.checkpoint import convert, save
from dsjax.checkpoint.load import SLAB_BYTES, assemble, load, open_source
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import make_mesh

load_module = importlib.import_module("dsjax.checkpoint.load")
MESHES = [
    {},
    {"fsdp": 2, "expert": 4},
    {"tensor": 4, "fsdp": 2},
    {"data": 2, "expert": 2, "tensor": 2},
]


class Recorder:
    """A source that remembers what was read."""

    def __init__(self, source):
        self.source, self.directory, self.reads = source, source.directory, []

    def read(self, path, region, dtype):
        values = self.source.read(path, region, dtype)
        self.reads.append((path, region, values.nbytes))
        return values


def places(config, mesh) -> dict:
    model = Transformer.abstract(config, mesh=mesh)
    return {path: variable.get_value() for path, variable in flat(model).items()}


@pytest.fixture(scope="module")
def both_forms(tmp_path_factory):
    """The same FP8 checkpoint in both forms."""
    directory, block = tmp_path_factory.mktemp("forms"), (16, 32)
    values = published.config(
        "deepseek_v3",
        quantization_config={"quant_method": "fp8", "weight_block_size": list(block)},
    )
    weights = published.quantise(published.tensors(values), block)
    source = published.write(directory / "hf", values, weights, shards=2)
    convert(source, directory / "orbax", dtype="float32", progress=False)
    return source, directory / "orbax"


@pytest.mark.parametrize(
    ("mesh", "slab_bytes"),
    [*((mesh, SLAB_BYTES) for mesh in MESHES), (MESHES[0], 4000), (MESHES[1], 4000)],
    ids=str,
)
def test_slabs_fill_every_shard(both_forms, mesh, slab_bytes):
    """Tiny slabs, placed one by one on each device, give the arrays of one big read."""
    expected = {p: v.get_value() for p, v in flat(load(both_forms[0])).items()}
    for form in both_forms:
        source = Recorder(open_source(epath.Path(form)))
        wanted = places(source.source.config, make_mesh(**mesh))
        count = 0
        for path, array in assemble(source, wanted, slab_bytes=slab_bytes):
            count += 1
            assert array.sharding == wanted[path].sharding
            np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]))
        assert count == len(expected)
        rows = max(
            array.shape[-1] * array.dtype.itemsize for array in expected.values()
        )
        assert max(nbytes for *_, nbytes in source.reads) <= max(slab_bytes, rows)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_row_is_read_once(both_forms, mesh):
    """Devices that keep other columns of the same rows share one read."""
    source = Recorder(open_source(epath.Path(both_forms[1])))
    wanted = places(source.source.config, make_mesh(**mesh))
    total = sum(array.nbytes for _, array in assemble(source, wanted))
    assert sum(nbytes for *_, nbytes in source.reads) == total
    for path, region, _ in source.reads:
        columns = wanted[path].shape[-1]
        assert len(region) == 1 or region[-1] == slice(0, columns), path


def test_a_host_reads_only_its_shards(both_forms, monkeypatch):
    """With half the devices on another host, half the experts are not read here."""
    source = Recorder(open_source(epath.Path(both_forms[1])))
    wanted = places(source.source.config, make_mesh(expert=8))
    here = set(jax.devices()[:4])
    everywhere = load_module._regions
    monkeypatch.setattr(
        load_module,
        "_regions",
        lambda *place: {d: r for d, r in everywhere(*place).items() if d in here},
    )
    monkeypatch.setattr(load_module, "_join", lambda place, buffers: buffers)
    experts = "segments.1.feed_forward.experts.gate_EFD"
    for _, buffers in assemble(source, {experts: wanted[experts]}):
        assert set(buffers) == here
    read = sum(nbytes for *_, nbytes in source.reads)
    assert read * 2 == np.prod(wanted[experts].shape) * 4
    assert all(region[1].stop <= 4 for _, region, _ in source.reads)


def test_dtypes(both_forms):
    assert load(both_forms[0], dtype=None).embedding_VD.dtype == published.BF16
    model = load(both_forms[1], dtype="bfloat16")
    kinds = {path: v.get_value().dtype for path, v in flat(model).items()}
    assert kinds.pop("segments.1.feed_forward.router.bias_E") == np.float32
    assert kinds.pop("mtp.block.feed_forward.router.bias_E") == np.float32
    assert set(kinds.values()) == {published.BF16}


def test_inside_the_mesh_of_a_program(both_forms, tmp_path):
    """A mesh that the caller has entered disturbs none of the steps."""
    mesh = make_mesh(fsdp=2, expert=4)
    with jax.set_mesh(mesh):
        model = load(both_forms[0], mesh=mesh)
        wanted = places(model.config, mesh)
        source = open_source(epath.Path(both_forms[0]))
        for path, array in assemble(source, wanted, slab_bytes=8000):
            found = flat(model)[path].get_value()
            np.testing.assert_array_equal(np.asarray(array), np.asarray(found))
        convert(both_forms[0], tmp_path / "orbax", progress=False)
        save(model, tmp_path / "saved")
