"""Causal attention on TPUs: JAX's own splash attention, forward and backward.

Its queries and keys may be of another size than its values, so that MLA's 192 and 128
need no padding. What is added here: one pair of functions that share what they keep with
the other implementations (splash's own gradient would keep it in its own form), blocks
that fit into the default VMEM of every generation, lengths that blocks do not divide,
and an estimate of each kernel's work, which splash does not give.

Letters: B batch, T length, K kv heads, G query heads of each, N = K G query heads, H size
of queries and keys, U size of values.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
)
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from pallas_kernels.flash_attention import work
from pallas_kernels.flash_attention.reference import Visible

LARGEST = 1024  # queries or keys of a block
BLOCK_BYTES = (
    768 * 1024
)  # of a block's keys and values: as much as fits in 16 MiB of VMEM
STEP = 2**16  # about 0.2 us of a v5p: assumed, not measured
# Of the gradient of the queries, before its parts are added up: of a group of kv heads,
# and at most, of one.
PARTS_BYTES, MOST_PARTS_BYTES = 2**29, 2**31
LANES = 128


def lacks(q: Array, k: Array, v: Array, visible: Visible) -> str:
    """Why these operands are not for this kernel; empty where they are."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{q.dtype=} is neither bfloat16 nor float32"
    if max(q.shape[-1], v.shape[-1]) > 256 or q.shape[-1] % 8 or v.shape[-1] % 8:
        return f"heads of {q.shape[-1]} and {v.shape[-1]}: not multiples of 8 up to 256"
    return ""


def block_size(length: int, sizes: tuple[int, int], bytes_each: int) -> int:
    """Queries, and keys, of a block: what makes the least of all blocks visited.

    Large blocks do more in vain, on the diagonal and behind the last token; small ones
    cost grid steps, each of them as much as STEP pairs of query and key. `sizes` are
    those of a key and of a value.
    """
    lanes = sum(-(-size // LANES) * LANES for size in sizes)
    largest = LARGEST if LARGEST * lanes * bytes_each <= BLOCK_BYTES else LARGEST // 2

    def cost(size: int) -> int:
        blocks = -(-length // size)
        return blocks * (blocks + 1) // 2 * (size**2 + STEP)

    return min(range(LANES, largest + 1, LANES), key=cost)


def forward(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    visible: Visible,
    *,
    scale: float,
) -> tuple[Float[Array, "B T K G U"], Float[Array, "B T K G"]]:
    """softmax(scale * q k) v, and its log-sum-exp in float32."""

    size = _block(q_BTKGH, v_BTKU)

    def row(part):
        q, k, v, segments = part
        call = functools.partial(
            splash._splash_attention_forward,
            **_options(size),
            save_residuals=True,
            sinks=None,
        )
        estimates = work.estimates(q, k, v, segments, block=size, fused=True)
        call = _with_estimates(call, estimates)
        out_NTU, (lse_NT,) = call(_seen_by_queries(q.shape[1], size), q, k, v, segments)
        return out_NTU, lse_NT

    results = jax.lax.map(row, _operands(q_BTKGH, k_BTKH, v_BTKU, visible, scale, size))
    out_BTNU, lse_BTN = (_tokens_first(x, q_BTKGH.shape[1]) for x in results)
    out_BTKGU = out_BTNU.reshape(*q_BTKGH.shape[:-1], -1)
    return out_BTKGU, lse_BTN.reshape(q_BTKGH.shape[:-1])


def backward(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    visible: Visible,
    out_BTKGU: Float[Array, "B T K G U"],
    lse_BTKG: Float[Array, "B T K G"],
    dout_BTKGU: Float[Array, "B T K G U"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K U"]]:
    """The gradients of q, k and v, from what `forward` gave."""

    size = _block(q_BTKGH, v_BTKU)
    B, T, K, G, H = q_BTKGH.shape
    groups = _head_groups(q_BTKGH, size)
    fused = groups > 0
    groups = groups or 1

    def group(part):
        operands, kept = part
        q, k, v, segments = operands

        def call(masks, q, k, v, segments, out, lse, dout):
            kept = (q, k, v, segments, None, out, lse, *masks)
            options = _options(size, fused=fused) | {"save_residuals": False}
            return splash._splash_attention_bwd(**options, res=kept, do=dout)[3:6]

        estimates = work.estimates(q, k, v, segments, block=size, fused=fused)
        length = q.shape[1]
        by_queries = None if fused else _seen_by_queries(length, size)
        masks = by_queries, _seeing_keys(length, size)
        return _with_estimates(call, estimates)(masks, *operands, *kept)

    kept = [
        _heads_first(x.reshape(B, T, K * G, *x.shape[4:]), size)
        for x in (out_BTKGU, lse_BTKG, dout_BTKGU)
    ]
    *operands, segments = _operands(q_BTKGH, k_BTKH, v_BTKU, visible, scale, size)
    operands, kept = jax.tree.map(
        lambda x: x.reshape(B * groups, -1, *x.shape[2:]), (operands, kept)
    )
    segments = jax.tree.map(lambda x: jnp.repeat(x, groups, axis=0), segments)
    gradients = jax.lax.map(group, ((*operands, segments), kept))
    dq_BTNH, dk_BTKH, dv_BTKU = (
        _tokens_first(x.reshape(B, -1, *x.shape[2:]), T) for x in gradients
    )
    dq_BTNH = _scaled(dq_BTNH, scale)
    return dq_BTNH.reshape(B, T, K, G, H), dk_BTKH, dv_BTKU


def _head_groups(q_BTKGH: Array, size: int) -> int:
    """In how many groups of kv heads the fused backward kernel runs: it leaves the
    gradient of the queries in as many parts as there are blocks of keys, for XLA to add
    up. None (0) if those of a single head are too large: their bytes grow with the square
    of the length, and two kernels, which make scores twice, have no such parts.
    """
    _, T, K, G, H = q_BTKGH.shape
    parts = -(-T // size)
    lanes = -(-H // LANES) * LANES
    head_bytes = parts * parts * size * G * lanes * q_BTKGH.dtype.itemsize
    if head_bytes > MOST_PARTS_BYTES:
        return 0
    least = min(K, -(-K * head_bytes // PARTS_BYTES))
    return next(n for n in range(max(least, 1), K + 1) if K % n == 0)


def _block(q: Array, v: Array) -> int:
    return block_size(q.shape[1], (q.shape[-1], v.shape[-1]), q.dtype.itemsize)


def _options(size: int, *, fused: bool = True) -> dict:
    """Arguments of splash that are the same in all of its kernels."""
    names = ["q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"]
    names += [] if fused else ["q_dq", "kv_dq"]
    sizes = {f"block_{name}": size for name in names}
    return {
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        # One backward kernel: two would make scores and their gradients twice.
        "block_sizes": splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
        "residual_checkpoint_name": None,
        "mask_function": _past_and_itself,
        "attn_logits_soft_cap": None,
        "interpret": False,
    }


def _past_and_itself(queries: Array, keys: Array) -> Array:
    return queries >= keys


def _seen_by_queries(length: int, size: int) -> mask_info.MaskInfo:
    """Which block of keys each step of a walk along the queries takes."""
    query, key = np.indices((length // size,) * 2)
    return _mask(query, key, np.where(key <= query, key, 0), length)


def _seeing_keys(length: int, size: int) -> mask_info.MaskInfo:
    """Which block of queries each step of a walk along the keys takes."""
    query, key = np.indices((length // size,) * 2)
    return _mask(query, key, np.maximum(query, key), length)


def _mask(query, key, taken, length) -> mask_info.MaskInfo:
    """The record that splash's own mask classes come to, without their T x T work.

    A step with nothing to do names the block that the next one needs: no copy is lost.
    """
    kind = np.where(key < query, 2, key == query)  # all, part or nothing of it is seen
    small = np.int8 if taken.max() < 128 else np.int32
    return mask_info.MaskInfo(
        data_next=jnp.asarray(taken[None], small),
        mask_next=None,
        block_mask=jnp.asarray(kind[None], small),
        partial_mask_blocks=None,
        q_sequence=jnp.arange(length, dtype=jnp.int32),
    )


def _operands(q_BTKGH, k_BTKH, v_BTKU, visible, scale, size):
    """As splash takes them: scaled queries, heads before tokens, whole blocks."""
    B, T, K, G, H = q_BTKGH.shape
    q_BTNH = _scaled(q_BTKGH, scale).reshape(B, T, K * G, H)
    segments = visible.segments_BT
    if segments is not None:
        segments = _whole_blocks(segments, 1, size)
        segments = splash.SegmentIds(q=segments, kv=segments)
    return *(_heads_first(x, size) for x in (q_BTNH, k_BTKH, v_BTKU)), segments


def _scaled(x: Array, scale: float) -> Array:
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _heads_first(x: Array, size: int) -> Array:
    """[B, T, heads, ...] -> [B, heads, T in whole blocks, ...]."""
    return _whole_blocks(x.swapaxes(1, 2), 2, size)


def _tokens_first(x: Array, length: int) -> Array:
    return x.swapaxes(1, 2)[:, :length]


def _whole_blocks(x: Array, axis: int, size: int) -> Array:
    """Zeros behind the tokens: no real query sees them, and nothing comes from them."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, padding)


def _with_estimates(function: Callable, estimates: dict) -> Callable:
    """`function` with the estimate of each kernel it calls, found by the kernel's phase.

    JAX's splash attention (0.10 to 0.12) gives none and takes none, without which a cost
    analysis sees no work at all; so the traced program is given them.
    """

    def call(*args):
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        equations = [
            equation.replace(params=equation.params | {"cost_estimate": estimate})
            if equation.primitive.name == "pallas_call"
            and (estimate := estimates[_phase(equation)])
            else equation
            for equation in traced.jaxpr.eqns
        ]
        run = jaxpr_as_fun(
            ClosedJaxpr(traced.jaxpr.replace(eqns=equations), traced.consts)
        )
        results = run(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return call


def _phase(equation) -> str:
    """ "fwd", "dkv" or "dq": the third word of a splash kernel's name."""
    return equation.params["name"].split("_")[2]
