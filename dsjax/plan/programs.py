"""The programs that a plan compiles: a training step, reading prompts, one decode step.

Abstract arrays alone: nothing is allocated. Letters: B batch, T length, S cache slots, V
vocabulary.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from dsjax.config import ModelConfig, Moe
from dsjax.errors import UserError
from dsjax.nn.cache import Cache, empty_cache
from dsjax.nn.options import Precision, Remat
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import batch_axes
from dsjax.sharding import SERVING, Sharding, fit
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.step import Rates, init_state, make_step


class Mode(enum.Enum):
    """What the hardware is planned for."""

    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One program of one model. `length`: tokens of a sequence; to decode, of the cache.

    `batch_per_device` sequences times the devices are the batch, whatever the mesh.
    `mtp`: train the multi-token prediction module of a model that has one. `remat` and
    the optimizer's `moments` are those of training; `cache` is the dtype of what is
    kept of a sequence, float8_e4m3fn for MLA's latents.
    """

    config: ModelConfig
    mode: Mode
    batch_per_device: Fraction
    length: int
    remat: Remat = Remat.FULL
    mtp: bool = True
    moments: DTypeLike = jnp.bfloat16
    cache: DTypeLike = jnp.bfloat16

    def __post_init__(self) -> None:
        if self.length > self.config.max_length:
            raise UserError(
                f"length {self.length} is more than {self.config.name} can see: "
                f"{self.config.max_length}"
            )

    def batch(self, devices: int) -> int:
        """Sequences in all. Raises UserError for a part of one."""
        rows = self.batch_per_device * devices
        if rows.denominator != 1 or rows < 1:
            raise UserError(
                f"{self.batch_per_device} sequences a device on {devices} devices is "
                f"{float(rows):g}, no whole number of sequences"
            )
        return int(rows)

    def tokens(self, devices: int) -> int:
        """Tokens that one run of the program makes or reads."""
        rows = self.batch(devices)
        return rows if self.mode is Mode.DECODE else rows * self.length

    @property
    def trains_mtp(self) -> bool:
        """Whether the MTP module runs."""
        return self.mode is Mode.TRAIN and self.mtp and self.config.mtp


@dataclass(frozen=True, kw_only=True)
class Program:
    """A traced program. `arguments`: abstract arrays by what they are ("parameters",
    "moments", "cache", ...); `gradients`: those that training holds for a while.
    """

    traced: jax.stages.Traced
    arguments: dict[str, Any]
    gradients: Any = ()
    precision: dict[str, str]


def trace(work: Work, mesh: Mesh) -> Program:
    """The program on the mesh, traced but not compiled."""
    make = {Mode.TRAIN: _train, Mode.PREFILL: _prefill, Mode.DECODE: _decode}[work.mode]
    with jax.set_mesh(mesh):
        return make(work, mesh)


def _train(work: Work, mesh: Mesh) -> Program:
    """Float32 parameters and gradients, bfloat16 compute; one microbatch."""
    precision = Precision()
    model = Transformer.abstract(
        work.config, mesh=mesh, precision=precision, remat=work.remat
    )
    optimizer = AdamW(moments=work.moments)
    step = make_step(model, optimizer=optimizer, objective=_objective(work))
    state = init_state(model, optimizer)
    shape = (1, work.batch(mesh.size), work.length + 1)
    tokens = _array(shape, jnp.int32, P(None, *Sharding().tokens_BT), mesh)
    number = _array((), jnp.float32, P(), mesh)
    rates = Rates(learning_rate=number, mtp=number, bias_speed=number)
    gradients = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, precision.gradients, sharding=leaf.sharding
        )
        for path, leaf in state.params.items()
    }
    return Program(
        traced=step.compiled.trace(state, {"tokens": tokens}, rates),
        arguments={
            "parameters": (state.params, state.biases),
            "moments": state.moments,
            "tokens": tokens,
        },
        gradients=gradients,
        precision={
            "parameters": jnp.dtype(precision.params).name,
            "gradients": jnp.dtype(precision.gradients).name,
            "moments": jnp.dtype(work.moments).name,
            "compute": jnp.dtype(precision.compute).name,
        },
    )


def _objective(work: Work) -> Objective:
    """V3's, as far as the model has something for it."""
    moe = [
        segment.feed_forward
        for segment in work.config.segments
        if isinstance(segment.feed_forward, Moe)
    ]
    return Objective(
        sequence_balance=1e-4 if moe else 0.0,
        bias_speed=1e-3 if any(part.selection_bias for part in moe) else 0.0,
        mtp=0.3 if work.trains_mtp else 0.0,
    )


def _prefill(work: Work, mesh: Mesh) -> Program:
    """bfloat16 weights; every prompt is `length` long; the cache is made inside."""
    config, rows = work.config, work.batch(mesh.size)

    def run(model: Transformer, tokens_BT: jax.Array):
        cache = empty_cache(
            config, batch=rows, slots=work.length, dtype=work.cache, mesh=mesh
        )
        lengths_B = jnp.full((rows,), work.length, jnp.int32)
        output = model.prefill(tokens_BT, lengths_B, cache)
        return _likeliest(model, output.hidden_BTD[:, -1:]), output.cache

    tokens_BT = _tokens((rows, work.length), mesh)
    return _inference(run, work, mesh, {"tokens": tokens_BT})


def _decode(work: Work, mesh: Mesh) -> Program:
    """bfloat16 weights; one token a row is added to a cache of `length`, which is updated
    in place.
    """
    rows = work.batch(mesh.size)

    def run(model: Transformer, tokens_B1: jax.Array, cache: Cache):
        output = model.decode(tokens_B1, cache)
        return _likeliest(model, output.hidden_BTD), output.cache

    cache = jax.eval_shape(
        lambda: empty_cache(
            work.config, batch=rows, slots=work.length, dtype=work.cache, mesh=mesh
        )
    )
    cache = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(mesh, leaf.sharding.spec),
        ),
        cache,
    )
    inputs = {"tokens": _tokens((rows, 1), mesh), "cache": cache}
    return _inference(run, work, mesh, inputs, donated=(2,))


def _inference(
    run: Callable,
    work: Work,
    mesh: Mesh,
    inputs: dict[str, Any],
    donated: tuple[int, ...] = (),
) -> Program:
    """`run(model, *inputs)`, the model's weights an argument. MTP is no part of it."""
    precision = Precision(params=jnp.bfloat16)
    config = replace(work.config, mtp=False)
    sharding = SERVING if work.mode is Mode.DECODE else Sharding()
    model = Transformer.abstract(
        config, mesh=mesh, precision=precision, sharding=sharding
    )
    graph, state = nnx.split(model)

    def program(state: nnx.State, *inputs):
        return run(nnx.merge(graph, state), *inputs)

    jitted = jax.jit(program, donate_argnums=donated)
    names = {"parameters": "bfloat16", "compute": "bfloat16"}
    names["cache"] = jnp.dtype(work.cache).name
    return Program(
        traced=jitted.trace(state, *inputs.values()),
        arguments={"parameters": state, **inputs},
        precision=names,
    )


def _likeliest(model: Transformer, hidden_B1D: jax.Array) -> jax.Array:
    """The next token of every row, greedily: int32 [B]."""
    logits_BV = model.logits(hidden_B1D)[:, 0]
    rows = P(batch_axes(logits_BV), None)
    logits_BV = jax.sharding.reshard(logits_BV, rows)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _tokens(shape: tuple[int, ...], mesh: Mesh) -> jax.ShapeDtypeStruct:
    return _array(shape, jnp.int32, Sharding().tokens_BT, mesh)


def _array(
    shape: tuple[int, ...], dtype: DTypeLike, spec: P, mesh: Mesh
) -> jax.ShapeDtypeStruct:
    place = NamedSharding(mesh, fit(spec, shape, mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
