"""The face of softmax attention on given queries, keys and values: who computes it where.

Letters: B batch, T queries, S keys, K kv heads, G query heads of each, H size of queries
and keys, U size of values.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import named, note_choice
from pallas_kernels.flash_attention import cudnn, pallas_gpu, pallas_tpu, reference
from pallas_kernels.flash_attention.reference import Visible

KERNELS = {"splash": pallas_tpu, "hopper": pallas_gpu, "cudnn": cudnn}
PLATFORMS = {"tpu": ("splash",), "cuda": ("hopper", "cudnn")}  # the best one first
IMPLEMENTATIONS = ("reference", *KERNELS)
KEPT = "flash_attention"  # the `checkpoint_name` of what the gradient needs


def flash_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"],
    *,
    scale: float,
    segments_BT: Int[Array, "B T"] | None = None,
    segments_BS: Int[Array, "B S"] | None = None,
    last_BT: Int[Array, "#B T"] | None = None,
    softmax_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Float[Array, "B T K G U"]:
    """softmax(scale * q k) v over the keys that a query sees; nothing quadratic is kept
    for the gradients. ("hopper" has a temporary of that kind, of up to 2.5 GiB.)

    A query sees the keys up to index `last`, by default its own, and of them those of
    its own segment. Differentiable in `q`, `k` and `v`: the operands, the result and a
    log-sum-exp for each query and head are kept for that, the last two named KEPT for
    policies of `jax.checkpoint`. Results have the dtype of `q`. On a mesh of Explicit
    axes, batch and kv heads may be cut. A query without any key gives no NaN, and
    nothing of use.

    `implementation`: "splash" is JAX's kernel for TPUs, bfloat16 or float32; "cudnn"
    runs on Hopper GPUs, 16-bit and without segments; "hopper" is the same with gradients
    of our own, for the heads of the models and lengths that 8 divides, from 128 on. All
    are causal (no `last_BT`) and have their softmax in float32. "reference" is plain JAX.
    None takes the best kernel for the platform that is compiled for, else the reference,
    and says so once.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.
        NotImplementedError: the implementation was named and does not take this.
    """
    visible = Visible(last_BT, segments_BT, segments_BS)
    _check(q_BTKGH, k_BSKH, v_BSKU, visible)
    dtype = jnp.dtype(softmax_dtype)
    lacking = {  # why a kernel is not for this
        name: _no_causal_float32(visible, dtype)
        or kernel.lacks(q_BTKGH, k_BSKH, v_BSKU, visible)
        for name, kernel in KERNELS.items()
    }
    match implementation := named(implementation):
        case None:
            best = {
                on: _best(candidates, lacking) for on, candidates in PLATFORMS.items()
            }
            names = tuple(name for name in best.values() if not lacking[name])
            reasons = {on: lacking[name] for on, name in best.items()}
            note_choice("flash_attention", best, reasons)
        case "reference":
            names = ()
        case name if name in KERNELS:
            if lacking[name]:
                raise NotImplementedError(f"{name} does not take {lacking[name]}")
            names = (name,)
        case _:
            raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}")
    call = _Call(names, implementation is not None, scale, dtype)
    return _attention(call, q_BTKGH, k_BSKH, v_BSKU, visible)


def _best(candidates: tuple[str, ...], lacking: dict[str, str]) -> str:
    """The first that lacks nothing, else the last."""
    able = [name for name in candidates if not lacking[name]]
    return able[0] if able else candidates[-1]


def _no_causal_float32(visible: Visible, dtype: np.dtype) -> str:
    if visible.last_BT is not None or visible.segments_BS is not None:
        return "queries that are not the keys' own"
    return "" if dtype == jnp.float32 else f"a softmax in {dtype}"


def _check(q: Array, k: Array, v: Array, visible: Visible) -> None:
    shapes = f"{q.shape=}, {k.shape=}, {v.shape=}"
    if q.ndim != 5 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"ranks of {shapes}: not 5, 4, 4")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"keys and values differ: {shapes}")
    if (q.shape[0], q.shape[2], q.shape[4]) != (k.shape[0], k.shape[2], k.shape[3]):
        raise ValueError(f"batch, kv heads or size of q and k differ: {shapes}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"dtypes differ: {q.dtype=}, {k.dtype=}, {v.dtype=}")
    if visible.last_BT is None and q.shape[1] != k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries, {k.shape[1]} keys, and no last_BT")
    ours, theirs = visible.segments_BT, visible.segments_BS
    if theirs is None:  # then they are the queries' own
        theirs = ours
    elif ours is None:
        raise ValueError("segments_BS without segments_BT")
    if ours is not None and (ours.shape[1:], theirs.shape[1:]) != (
        q.shape[1:2],
        k.shape[1:2],
    ):
        raise ValueError(f"segments {ours.shape}, {theirs.shape} for {shapes}")


class _Call(NamedTuple):
    """What is fixed while tracing: the kernels to choose among, and the arithmetic."""

    kernels: tuple[str, ...]
    only: bool  # the one kernel, wherever this is compiled for
    scale: float
    dtype: np.dtype

    def implementation(self, step: str) -> Callable:
        """`step`, "forward" or "backward", of what each platform runs."""
        plain = functools.partial(
            getattr(reference, step), scale=self.scale, dtype=self.dtype
        )
        fused = {
            name: functools.partial(getattr(KERNELS[name], step), scale=self.scale)
            for name in self.kernels
        }
        if not fused:
            return plain
        if self.only:
            return fused[self.kernels[0]]
        where = {
            on: fused[name]
            for on, candidates in PLATFORMS.items()
            for name in candidates
            if name in fused
        }
        return functools.partial(jax.lax.platform_dependent, **where, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, q, k, v, visible):
    return _forward(call, q, k, v, visible)[0]


def _forward(call, q, k, v, visible):
    run = call.implementation("forward")
    if call.kernels:
        run = _on_each_device(run, q, visible, results="qr")
    out, lse = (checkpoint_name(x, KEPT) for x in run(q, k, v, visible))
    return out, (q, k, v, visible, out, lse)


def _backward(call, kept, dout):
    q, k, v, visible, out, lse = kept
    run = call.implementation("backward")
    if call.kernels:
        run = _on_each_device(run, q, visible, results="qkk")
    dq, dk, dv = run(q, k, v, visible, out, lse, dout)
    return dq, dk, dv, Visible()


_attention.defvjp(_forward, _backward)


def _on_each_device(run: Callable, q_BTKGH: Array, visible: Visible, results: str):
    """`run` on each device's own rows and kv heads, where the mesh cuts them.

    `results`: which of them are cut like the queries (q), one number of each (r), or the
    keys (k).
    """
    sharding = jax.typeof(q_BTKGH).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return run
    batch, _, heads, *_ = sharding.spec
    cuts = {"q": P(batch, None, heads, None, None), "k": P(batch, None, heads, None)}
    cuts["r"] = cuts["k"]  # [B, T, K, G] here, [B, T, K, H] there
    q, k, r = cuts["q"], cuts["k"], cuts["r"]
    seen = jax.tree.map(lambda _: P(batch, None), visible)

    def call(*args):
        return jax.shard_map(
            run,
            in_specs=(q, k, k, seen, q, r, q)[: len(args)],
            out_specs=tuple(cuts[letter] for letter in results),
            check_vma=False,
        )(*args)

    return call
