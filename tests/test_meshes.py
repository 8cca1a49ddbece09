"""Every mesh of all devices computes what one device does.

On simulated CPU devices there are eight. On the GPUs of a host:

    JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=highest pytest -n 0 tests/test_meshes.py

Loss, gradients, prefill and eight decoding steps, of a dense model and of a MoE whose
routing is skewed: every token chooses experts 0 and 1, none chooses the last three. The
room for rows is small, so that tokens go in chunks, and the rows of a chunk in rounds.
"""

import itertools
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsjax.config import (
    Dense,
    Gqa,
    Groups,
    GroupScore,
    Mla,
    ModelConfig,
    Moe,
    Score,
    Segment,
)
from dsjax.nn import dispatch
from dsjax.nn.cache import empty_cache
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat
from dsjax.sharding import (
    AXES,
    SERVING,
    Sharding,
    axes_of,
    make_mesh,
    with_whole_dense,
)
from dsjax.train.objective import Objective, losses, shares
from tests.support import fill, put, rounds

ROWS, LENGTH, NEW = 8, 16, 8
MOE = Moe(
    num_experts=16,
    num_shared=1,
    top_k=4,
    width=16,
    score=Score.SIGMOID,
    groups=Groups(count=4, kept=2, score=GroupScore.TOP2_SUM),
    renormalize=True,
    selection_bias=True,
)
ALWAYS, NEVER = (0, 1), (13, 14, 15)
SIZES = {"vocab_size": 64, "d_model": 32, "max_length": 64, "init_std": 0.2}
CONFIGS = {
    "dense": ModelConfig(
        name="dense",
        attention=Gqa(num_heads=16, num_kv_heads=8, head_dim=8),
        segments=(Segment(count=2, feed_forward=Dense(width=64)),),
        **SIZES,
    ),
    "moe": ModelConfig(
        name="moe",
        attention=Mla(
            num_heads=8, kv_rank=16, q_rank=16, nope_dim=8, rope_dim=4, value_dim=8
        ),
        segments=(
            Segment(count=1, feed_forward=Dense(width=64)),
            Segment(count=2, feed_forward=MOE),
        ),
        **SIZES,
    ),
}
BIAS = "segments.1.feed_forward.router.bias_E"
OBJECTIVES = {"dense": Objective(), "moe": Objective(sequence_balance=0.05)}
TOKENS = np.random.default_rng(1).integers(0, 64, (ROWS, LENGTH + NEW), np.int32)
LENGTHS = np.array([16, 9, 3, 12, 1, 16, 7, 8], np.int32)

DEVICES = jax.device_count()
FACTORISATIONS = [
    sizes
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if math.prod(sizes) == DEVICES
]
# Each axis alone as far as it goes, and each pair of axes at least once.
DEFAULT = [
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (1, 1, 1, 8),
    (2, 1, 4, 1),
    (1, 2, 2, 2),
    (2, 2, 1, 2),
]
# Decoding in either layout on three of these, so that each cuts along every axis.
DEFAULT_OF_LAYOUT = {
    "training": [(1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 1, 2)],
    "serving": [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2)],
}


def meshes(default: list[tuple[int, ...]], *more: str) -> list:
    """Parameters of all meshes, each behind `more`; all but the default ones slow."""
    return [
        pytest.param(
            *more,
            dict(zip(AXES, sizes)),
            id="-".join(["x".join(map(str, sizes)), *more]),
            marks=() if sizes in default or DEVICES < 8 else pytest.mark.slow,
        )
        for sizes in FACTORISATIONS
    ]


@pytest.fixture(scope="module", autouse=True)
def little_room():
    with pytest.MonkeyPatch.context() as patch:
        restrict(patch)
        yield


def restrict(patch: pytest.MonkeyPatch) -> None:
    """A device has room for 1.25 times an even share of 8 tokens' rows, not a row more:
    several chunks, and several rounds of each."""
    patch.setattr(dispatch, "TILE", 1)
    patch.setattr(dispatch, "CHUNK_BYTES", 8 * MOE.top_k * SIZES["d_model"] * 4)


def model_of(name: str, sharding: Sharding, **mesh) -> Transformer:
    abstract = Transformer.abstract(
        CONFIGS[name], mesh=make_mesh(**mesh), sharding=sharding
    )
    model = fill(abstract, std=0.2)
    if name == "moe":
        bias = flat(model)[BIAS]
        skewed = np.zeros(bias.shape)
        skewed[:, ALWAYS], skewed[:, NEVER] = 10.0, -10.0
        put(bias, skewed)
    return model


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(graph, state, tokens):
    """By name, and how often each expert was chosen."""
    batch = {"tokens": tokens[:, : LENGTH + 1]}

    def total(state):
        model = nnx.merge(graph, state)
        terms = losses(
            model,
            batch,
            objective=OBJECTIVES[model.config.name],
            shares=shares({"tokens": batch["tokens"][None]}),
        )
        return terms.loss + terms.balance_loss, terms

    (loss, terms), gradients = jax.value_and_grad(total, has_aux=True)(state)
    return {"loss": loss, "loads": terms.loads} | _paths(gradients)


@partial(jax.jit, static_argnums=0)
def chosen(graph, state, tokens):
    """The experts of the loss's tokens, in each MoE layer: [L, B T, k]."""
    output = nnx.merge(graph, state).forward(tokens[:, :LENGTH])
    indices_LBTk = output.routing[1].indices_BTk
    return indices_LBTk.reshape(len(indices_LBTk), -1, MOE.top_k)


def _paths(state: nnx.State) -> dict[str, jax.Array]:
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(state)
    }


@partial(jax.jit, static_argnums=0)
def serve(graph, state, tokens):
    """Logits of prompts of unequal length, then of eight tokens, one at a time."""
    model = nnx.merge(graph, state)
    cache = empty_cache(
        model.config, batch=ROWS, slots=LENGTH + NEW, dtype="float32", mesh=model.mesh
    )
    prompts = jnp.where(jnp.arange(LENGTH) < LENGTHS[:, None], tokens[:, :LENGTH], 0)
    out = model.prefill(prompts, LENGTHS, cache)

    def step(cache, given_B):
        out = model.decode(given_B[:, None], cache)
        return out.cache, model.logits(out.hidden_BTD)[:, 0]

    rows = np.arange(ROWS)[:, None]
    given_BN = tokens[rows, LENGTHS[:, None] + np.arange(NEW)]
    _, decoded = jax.lax.scan(step, out.cache, given_BN.T)
    return {"prefill": model.logits(out.hidden_BTD), "decode": decoded}


def run(program, model: Transformer) -> dict[str, np.ndarray]:
    with jax.set_mesh(model.mesh):
        return jax.device_get(program(*nnx.split(model), TOKENS))


@pytest.fixture(scope="module")
def expected() -> dict[str, dict]:
    """By one device: of each model, what each program gives."""
    found = {}
    for name in CONFIGS:
        model = model_of(name, Sharding())
        found[name] = {p: run(p, model) for p in (loss_and_gradients, serve)}
    return found


def compare(got: dict, wanted: dict) -> None:
    """Within 1e-5 of each array's largest value."""
    assert got.keys() == wanted.keys()
    for path, array in wanted.items():
        if path != "loads":
            difference = np.abs(got[path] - array).max()
            assert difference <= 1e-5 * np.abs(array).max(), path


def test_routing_is_skewed(expected):
    """As the module's text says; experts that nothing chooses have no gradient."""
    found = expected["moe"][loss_and_gradients]
    (load_LE,) = found["loads"]
    assert (load_LE[:, ALWAYS] == ROWS * LENGTH).all()
    assert (load_LE[:, NEVER] == 0).all()
    assert (load_LE > 0).sum(axis=1).min() > 4
    gradient = found["segments.1.feed_forward.experts.gate_EFD"]
    assert not gradient[:, NEVER].any() and gradient[:, ALWAYS].any()


@pytest.mark.parametrize("data", [1, 2])
def test_rows_go_in_chunks_and_rounds(data):
    sizes = {"data": data, "expert": DEVICES // data}
    for chosen_Nk in run(chosen, model_of("moe", Sharding())):
        chunks, most = rounds(chosen_Nk, MOE, d_model=SIZES["d_model"], **sizes)
        assert chunks == ROWS * LENGTH // DEVICES // 8 and most > 1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", meshes(DEFAULT))
def test_training(name, sizes, expected):
    found = run(loss_and_gradients, model_of(name, Sharding(), **sizes))
    wanted = expected[name][loss_and_gradients]
    compare(found, wanted)
    for got, load_LE in zip(found["loads"], wanted["loads"], strict=True):
        np.testing.assert_array_equal(got, load_LE)


@pytest.mark.parametrize(
    "axes", [pytest.param({"data": 2}, marks=pytest.mark.slow), {"fsdp": 2}], ids=str
)
def test_training_with_whole_dense_weights(axes, expected):
    """Only weights of the experts are cut along `expert`."""
    sizes = {"expert": DEVICES // 2, **axes}
    model = model_of("moe", with_whole_dense(Sharding()), **sizes)
    cut = {
        path
        for path, weight in flat(model).items()
        if "expert" in axes_of(*jax.typeof(weight.get_value()).sharding.spec)
    }
    experts = {path for path in flat(model) if ".experts." in path}
    assert cut == experts and len(cut) == 3
    found = run(loss_and_gradients, model)
    wanted = expected["moe"][loss_and_gradients]
    compare(found, wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        case
        for layout, default in DEFAULT_OF_LAYOUT.items()
        for case in meshes(default, layout)
    ],
)
def test_prefill_and_decoding(name, layout, sizes, expected):
    sharding = SERVING if layout == "serving" else Sharding()
    compare(run(serve, model_of(name, sharding, **sizes)), expected[name][serve])


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs eight CPU devices")
def test_two_processes():
    """Of four devices each: experts on all eight, and on four with weights cut."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    # Processes meet before anything asks for devices, as importing this module does.
    script = (
        "import sys; from dsjax import hosts; port, rank = sys.argv[1:]; "
        "hosts.start(coordinator=f'127.0.0.1:{port}', processes=2, process_id=int(rank)); "
        "from tests import test_meshes; test_meshes.as_a_host()"
    )
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, port, rank],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"XLA_FLAGS": flags},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


def as_a_host() -> None:
    """Compares the mesh of both processes with a device of this one."""
    assert (jax.local_device_count(), jax.device_count()) == (4, 8)
    restrict(pytest.MonkeyPatch())
    one = model_of("moe", Sharding(), devices=jax.local_devices())
    wanted = {program: run(program, one) for program in (loss_and_gradients, serve)}
    for sizes in ({"expert": 8}, {"fsdp": 2, "expert": 4}):
        model = model_of("moe", Sharding(), **sizes)
        for program, arrays in wanted.items():
            compare(run(on_all(program), model), arrays)


def on_all(program):
    """The program with all of its results on every device."""

    @partial(jax.jit, static_argnums=0)
    def gathered(*arguments):
        return jax.tree.map(lambda x: jax.sharding.reshard(x, P()), program(*arguments))

    return gathered
