"""Cross-entropy straight from hidden states, in chunks of tokens.

Logits of a whole batch never exist, unless asked for: with V3's vocabulary of 129,280
those of one sequence of 4,096 tokens are 2 GB in float32, and so is their gradient. One
chunk's logits are made, turned into its losses and its gradients, and dropped. Gradients
are taken in the forward pass, as fused cross-entropies do (the LLM paper's too, section
2.4): recomputing the logits in the backward pass would be a fourth product by the head,
and nothing would be saved, since the backward pass starts here. What waits is the
gradient of the hidden states, no larger than they are, and that of the head, float32,
already where the head rests. Neither is ever whole on a device of a large mesh: along
`fsdp` the vocabulary is cut and the tokens of a chunk are gathered, a small part of the
head's bytes.

Letters: B batch, S window (T inputs + 1), T length, C chunk of it, D model, V vocabulary.
Losses are in nats.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from dsjax.sharding import axes_of
from pallas_kernels.cross_entropy.api import cross_entropy as cross_entropy_rows

# Tokens whose logits exist at once on a device: at least so many, and more of a small
# vocabulary, up to so many logits (512 MiB). Each chunk reads and writes the head's
# gradient, [V, D] in float32: fewer tokens would make that the cost.
CHUNK, LOGITS = 1024, 2**27


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk: int | None = None,
    statistics: DTypeLike = jnp.float32,
    logits: DTypeLike = jnp.float32,
) -> Float[Array, ""]:
    """The sum over all positions of -log p(target), each times its weight.

    `hidden` has its norm behind it; products are in its dtype. `head` is the weight as
    it rests on the mesh, in any dtype and layout; its vocabulary may be cut. What is made
    of `logits` is `statistics`: see `Precision`. `chunk` bounds the tokens whose logits
    exist at once on a device, others' among them. Targets and weights have no gradient.
    """
    chunk = chunk or max(CHUNK, LOGITS // head_VD.shape[0])
    dtypes = _Dtypes(jnp.dtype(statistics), jnp.dtype(logits))
    return _cross_entropy(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, dtypes)


def mtp_targets(tokens_BS: Int[Array, "B S"]) -> Int[Array, "B T"]:
    """What the first MTP module predicts at each of the T inputs: the token two on (V3,
    section 2.2).

    The last input has no such token in the window; its entry is 0, and its weight has
    to be.
    """
    return jnp.pad(tokens_BS[:, 2:], ((0, 0), (0, 1)))


class _Dtypes(NamedTuple):
    """Those of `Precision`."""

    statistics: DTypeLike
    logits: DTypeLike

    def multiply(self, hidden_BCD: Array, head_VD: Array) -> Float[Array, "B C V"]:
        """A chunk's logits."""
        of = (hidden_BCD, head_VD)
        if jnp.finfo(self.logits).bits == 16:  # matrix units have one dtype of 16 bits
            of = [x.astype(self.logits) for x in of]
        return jnp.einsum("BCD,VD->BCV", *of, preferred_element_type=self.logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, dtypes):
    cut = _Cut.of(hidden_BTD, head_VD)
    local = functools.partial(_chunks, cut=cut, chunk=chunk, dtypes=dtypes)
    return jax.shard_map(
        lambda *arrays: local(*arrays, gradients=False)[0],
        in_specs=(cut.hidden, cut.head, cut.rows, cut.rows),
        out_specs=P(),
        check_vma=False,
    )(hidden_BTD, head_VD, targets_BT, weights_BT)


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, dtypes):
    cut = _Cut.of(hidden_BTD, head_VD)
    local = functools.partial(_chunks, cut=cut, chunk=chunk, dtypes=dtypes)
    loss, of_hidden_BTD, of_head_VD = jax.shard_map(
        lambda *arrays: local(*arrays, gradients=True),
        in_specs=(cut.hidden, cut.head, cut.rows, cut.rows),
        out_specs=(P(), cut.hidden, cut.head),
        check_vma=False,
    )(hidden_BTD, head_VD, targets_BT, weights_BT)
    return loss, (of_hidden_BTD, of_head_VD.astype(head_VD.dtype))


def _backward(chunk, dtypes, saved, gradient):
    scaled = [(gradient * array).astype(array.dtype) for array in saved]
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Cut:
    """How the mesh cuts the arrays; the axes of an entry, major ones first."""

    hidden: P
    head: P

    @classmethod
    def of(cls, hidden_BTD: Array, head_VD: Array) -> "_Cut":
        specs = (jax.typeof(x).sharding.spec for x in (hidden_BTD, head_VD))
        return cls(*specs)

    @property
    def rows(self) -> P:
        """Of targets and weights."""
        return P(self.hidden[0], None)

    @property
    def batch(self) -> tuple[str, ...]:
        return axes_of(self.hidden[0])

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return axes_of(self.head[0])

    @property
    def shared(self) -> tuple[str, ...]:
        """Axes along which each device sees all tokens, and a part of the vocabulary."""
        return tuple(axis for axis in self.vocabulary if axis in self.batch)

    # One axis at a time, here and below: two at once compile to an all-reduce.

    def gather(self, head_VD: Array) -> Array:
        """The head whole along D."""
        for axis in reversed(axes_of(self.head[1])):
            head_VD = jax.lax.all_gather(head_VD, axis, axis=1, tiled=True)
        return head_VD

    def gather_rows(self, x: Array) -> Array:
        """The rows of all devices along the shared axes."""
        for axis in reversed(self.shared):
            x = jax.lax.all_gather(x, axis, tiled=True)
        return x

    def scatter_rows(self, x: Array) -> Array:
        """Sums over the parts of the vocabulary, for this device's rows."""
        for axis in self.shared:
            x = jax.lax.psum_scatter(x, axis, tiled=True)
        return jax.lax.psum(x, tuple(a for a in self.vocabulary if a not in self.batch))

    def scatter(self, gradient_VD: Array) -> Array:
        """The head's gradient, summed over the batch and cut as the head is."""
        stored = axes_of(self.head[1])
        for axis in stored:
            if axis in self.batch:
                gradient_VD = jax.lax.psum_scatter(
                    gradient_VD, axis, scatter_dimension=1, tiled=True
                )
            else:  # the same on all devices of the axis: each keeps its part
                size = gradient_VD.shape[1] // jax.lax.axis_size(axis)
                start = jax.lax.axis_index(axis) * size
                gradient_VD = jax.lax.dynamic_slice_in_dim(gradient_VD, start, size, 1)
        done = (*stored, *self.shared)
        return jax.lax.psum(
            gradient_VD, tuple(axis for axis in self.batch if axis not in done)
        )


def _chunks(
    hidden_BTD: Array,
    head_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    cut: _Cut,
    chunk: int,
    dtypes: _Dtypes,
    gradients: bool,
) -> tuple[Array, Array | None, Array | None]:
    """On one device: the loss of the whole batch and, if asked, its gradients with
    respect to this device's part of hidden states and head.
    """
    rows, length, _ = hidden_BTD.shape
    head_VD = cut.gather(head_VD.astype(hidden_BTD.dtype))
    together = math.prod(map(jax.lax.axis_size, cut.shared))
    count = min(-(-rows * length * together // chunk), length)
    whole = math.prod(map(jax.lax.axis_size, cut.vocabulary)) == 1

    def body(sums, part):
        loss, of_head_VD = sums
        hidden_BCD, targets_BC, weights_BC = map(cut.gather_rows, part)
        logits_BCV = dtypes.multiply(hidden_BCD, head_VD)
        if gradients and whole:
            losses_BC, of_logits_BCV = _fused(
                *(logits_BCV, targets_BC, weights_BC),
                statistics=dtypes.statistics,
                dtype=hidden_BTD.dtype,
            )
        else:
            logits_BCV = logits_BCV.astype(dtypes.statistics)
            losses_BC, of_logits_BCV = _by_parts(logits_BCV, targets_BC, cut)
            of_logits_BCV *= weights_BC[..., None]
            of_logits_BCV = of_logits_BCV.astype(hidden_BTD.dtype)
        loss += jnp.sum(losses_BC * weights_BC)
        if not gradients:
            return (loss, None), None
        of_hidden_BCD = jnp.einsum(
            *("BCV,VD->BCD", of_logits_BCV, head_VD),
            preferred_element_type=hidden_BTD.dtype,
        )
        of_head_VD += jnp.einsum(
            "BCV,BCD->VD", of_logits_BCV, hidden_BCD, preferred_element_type=jnp.float32
        )
        return (loss, of_head_VD), cut.scatter_rows(of_hidden_BCD)

    zeros = jnp.zeros(head_VD.shape, jnp.float32) if gradients else None
    parts = (_split(x, count) for x in (hidden_BTD, targets_BT, weights_BT))
    (loss, of_head_VD), of_hidden = jax.lax.scan(
        body, (jnp.zeros((), jnp.float32), zeros), tuple(parts)
    )
    loss = jax.lax.psum(loss, tuple(a for a in cut.batch if a not in cut.shared))
    if not gradients:
        return loss, None, None
    return loss, _join(of_hidden, length), cut.scatter(of_head_VD)


def _fused(
    logits_BCV: Array,
    targets_BC: Array,
    weights_BC: Array,
    *,
    statistics: DTypeLike,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B C"], Float[Array, "B C V"]]:
    """The losses of a chunk, and their weighted gradient, of a whole vocabulary."""
    rows = (logits_BCV.reshape(-1, logits_BCV.shape[-1]), targets_BC.reshape(-1))
    options = {"statistics": statistics, "dtype": dtype}
    losses, gradient = cross_entropy_rows(*rows, weights_BC.reshape(-1), **options)
    return losses.reshape(targets_BC.shape), gradient.reshape(logits_BCV.shape)


def _by_parts(
    logits_BCV: Array, targets_BC: Array, cut: _Cut
) -> tuple[Float[Array, "B C"], Float[Array, "B C V"]]:
    """The losses of a chunk, and their gradient: softmax minus one-hot. V is this
    device's part of the vocabulary; sums and the largest logit are over all of it.
    """
    size = logits_BCV.shape[-1]
    first = jax.lax.axis_index(cut.vocabulary) * size if cut.vocabulary else 0
    is_target_BCV = targets_BC[..., None] == first + jnp.arange(size)
    largest_BC = jax.lax.pmax(logits_BCV.max(axis=-1), cut.vocabulary)
    shifted_BCV = logits_BCV - largest_BC[..., None]
    target_BC = jnp.sum(jnp.where(is_target_BCV, shifted_BCV, 0), axis=-1)
    total_BC = jnp.sum(jnp.exp(shifted_BCV), axis=-1)
    target_BC, total_BC = jax.lax.psum((target_BC, total_BC), cut.vocabulary)
    softmax_BCV = jnp.exp(shifted_BCV) / total_BC[..., None]
    return jnp.log(total_BC) - target_BC, softmax_BCV - is_target_BCV


def _split(x: Array, count: int) -> Array:
    """[B, T, ...] -> [count, B, C, ...]; what is missing at the end is zeros."""
    missing = -x.shape[1] % count
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def _join(x: Array, length: int) -> Array:
    """[count, B, C, D] -> [B, T, D], the reverse of `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, :length]
