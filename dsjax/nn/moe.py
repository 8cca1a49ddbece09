"""The mixture of experts: shared experts for all tokens, routed ones for some.

Every token's k rows are sorted by expert and multiplied by grouped products, so the cost
follows the chosen rows. None is dropped, unless training asks for it as V2 did.

Letters: B batch, T length, D model, E experts, F expert width, k chosen experts, M rows
(one for each token and choice).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsjax.config import Moe
from dsjax.nn import cache as kv
from dsjax.nn.feed_forward import SwiGlu
from dsjax.nn.options import Build, keep
from dsjax.nn.router import Router, Routing
from dsjax.nn.weights import batch_axes, use
from pallas_kernels.grouped_matmul.api import grouped_matmul


class MixtureOfExperts(nnx.Module):
    """h = sum of shared experts + sum of the chosen routed ones (2401.06066, eq. 9)."""

    def __init__(self, config: Moe, d_model: int, *, build: Build):
        self.config = config
        self.router = Router(config, d_model, build=build)
        self.experts = Experts(config, d_model, build=build)
        if config.num_shared:
            self.shared = SwiGlu(d_model, config.num_shared * config.width, build=build)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], context: kv.Context
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The layer's contribution to the residual stream, and where tokens went."""
        routing = self.router(x_BTD, context)
        y_BTD = self.experts(x_BTD, routing)
        if self.config.num_shared:
            y_BTD += self.shared(x_BTD)
        return y_BTD, routing


class Experts(nnx.Module):
    """The routed experts, cut along `expert` (whole experts), `tensor` and `fsdp`."""

    def __init__(self, config: Moe, d_model: int, *, build: Build):
        self.dtype, sharding = build.precision.compute, build.sharding
        E, F, D = config.num_experts, config.width, d_model
        self.gate_EFD = build.weight((E, F, D), sharding.expert_in_EFD)
        self.up_EFD = build.weight((E, F, D), sharding.expert_in_EFD)
        self.down_EDF = build.weight((E, D, F), sharding.expert_out_EDF)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], routing: Routing
    ) -> Float[Array, "B T D"]:
        """Each token's weighted sum over its chosen experts.

        Each device multiplies the rows that its own experts were chosen for: tokens are
        gathered along the expert axis, and the partial sums are scattered back.
        """
        weights = [
            use(w, self.dtype) for w in (self.gate_EFD, self.up_EFD, self.down_EDF)
        ]
        in_EFD, _, out_EDF = (jax.typeof(w).sharding.spec for w in weights)
        batch = batch_axes(x_BTD)
        axes = (batch,) if isinstance(batch, str) else batch or ()
        split_experts = "expert" in _axes(in_EFD)
        gather = split_experts and "expert" in axes
        rows_BT = P(batch, None, None)

        def local(x, indices, affinities, gate, up, down):
            if gather:
                x, indices, affinities = (
                    jax.lax.all_gather(a, "expert", tiled=True)
                    for a in (x, indices, affinities)
                )
            if split_experts:
                indices = indices - jax.lax.axis_index("expert") * gate.shape[0]
            y = _apply_experts(x, indices, affinities, gate, up, down)
            if "tensor" in _axes(in_EFD):
                y = jax.lax.psum(y, "tensor")
            if gather:
                y = jax.lax.psum_scatter(y, "expert", tiled=True)
            elif split_experts:
                y = jax.lax.psum(y, "expert")
            return y.astype(x.dtype)

        return jax.shard_map(
            local,
            in_specs=(rows_BT, rows_BT, rows_BT, in_EFD, in_EFD, out_EDF),
            out_specs=rows_BT,
            check_vma=False,
        )(x_BTD, self._computed(routing), routing.weights_BTk, *weights)

    def _computed(self, routing: Routing) -> Int[Array, "B T k"]:
        """The chosen experts; a dropped choice names none that exists."""
        if routing.kept_BTk is None:
            return routing.indices_BTk
        nowhere = self.gate_EFD.shape[0]
        return jnp.where(routing.kept_BTk, routing.indices_BTk, nowhere)


@jax.custom_vjp
def _product(x_MK: Array, w_GNK: Array, sizes_G: Array) -> Array:
    """`grouped_matmul` that keeps only its operands for the gradient.

    It has a branch for each platform; by themselves all would keep what theirs needs.
    """
    return grouped_matmul(x_MK, w_GNK, sizes_G)


def _product_forward(x_MK, w_GNK, sizes_G):
    return grouped_matmul(x_MK, w_GNK, sizes_G), (x_MK, w_GNK, sizes_G)


def _product_backward(saved, dy_MN):
    x_MK, w_GNK, sizes_G = saved
    _, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_G), x_MK, w_GNK)
    return *back(dy_MN), None


_product.defvjp(_product_forward, _product_backward)


# The gradient of a gather is a scatter, which adds up atomically on a GPU. Both orders
# being known, these gather in both directions.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_ND: Array, order_M: Array, back_M: Array, k: int) -> Array:
    """Each token's row, k times, in the order of the experts."""
    return x_ND[order_M // k]


def _spread_forward(x_ND, order_M, back_M, k):
    return _spread(x_ND, order_M, back_M, k), back_M


def _spread_backward(k, back_M, dy_MD):
    dy_NkD = dy_MD[back_M].reshape(-1, k, dy_MD.shape[-1])
    return dy_NkD.sum(axis=1, dtype=jnp.float32).astype(dy_MD.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _permute(x_MD: Array, order_M: Array, back_M: Array) -> Array:
    """x[order]; `back` is the inverse of `order`."""
    return x_MD[order_M]


def _permute_forward(x_MD, order_M, back_M):
    return x_MD[order_M], back_M


def _permute_backward(back_M, dy_MD):
    return dy_MD[back_M], None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _axes(spec: P) -> set[str]:
    """All mesh axes a spec names."""
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return set().union(*entries)


def _apply_experts(x_BTD, indices_BTk, affinities_BTk, gate_EFD, up_EFD, down_EDF):
    """The weighted sum over those of each token's experts that are here, in float32.

    `indices` outside 0..E-1 name experts of other devices: their rows sort to the end,
    lie past the group sizes and give zero.
    """
    B, T, D = x_BTD.shape
    E, k = gate_EFD.shape[0], indices_BTk.shape[-1]
    expert_M = indices_BTk.reshape(-1)
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)
    order_M = keep(jnp.argsort(expert_M, stable=True))
    sizes_E = jnp.bincount(expert_M, length=E + 1)[:E].astype(jnp.int32)
    back_M = keep(jnp.argsort(order_M))  # from sorted rows back to token order
    rows_MD = keep(_spread(x_BTD.reshape(-1, D), order_M, back_M, k))
    gate_MF = keep(_product(rows_MD, gate_EFD, sizes_E))
    up_MF = keep(_product(rows_MD, up_EFD, sizes_E))
    out_MD = keep(_product(jax.nn.silu(gate_MF) * up_MF, down_EDF, sizes_E))
    out = _permute(out_MD, back_M, order_M).reshape(B, T, k, D).astype(jnp.float32)
    return (out * affinities_BTk[..., None]).sum(axis=2)
