"""The routed experts of one layer on the devices of a mesh.

Three ways lead from tokens to experts, and the same local product is at the end of each:
on one device rows are sorted by expert and multiplied by grouped products; where `expert`
cuts the mesh, rows travel to their experts (`dsjax.nn.dispatch`); and where few tokens
meet many experts, in decoding, every device of the axis sees all of them.

Letters: B batch, T length, D model, E experts, F expert width, k chosen experts, N
tokens, M rows (a token's row for each of its experts), R experts of a token at most.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsjax.config import Moe
from dsjax.nn import cache as kv
from dsjax.nn.dispatch import dispatched
from dsjax.nn.options import Build, keep
from dsjax.nn.router import Routing
from dsjax.nn.rows import (
    count,
    first_places,
    gather_rows,
    inverse,
    sorted_places,
    sum_rows,
)
from dsjax.nn.weights import batch_axes, cast
from dsjax.sharding import axes_of
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_swiglu

Weights = tuple[Array, Array, Array]  # gate [E, F, D], up [E, F, D], down [E, D, F]


class Experts(nnx.Module):
    """The routed experts, cut along `expert` (whole experts), `tensor` and `fsdp`."""

    def __init__(self, config: Moe, d_model: int, *, build: Build):
        self.config = config
        self.dtype, sharding = build.precision.compute, build.sharding
        E, F, D = config.num_experts, config.width, d_model
        self.gate_EFD = build.weight((E, F, D), sharding.expert_in_EFD)
        self.up_EFD = build.weight((E, F, D), sharding.expert_in_EFD)
        self.down_EDF = build.weight((E, D, F), sharding.expert_out_EDF)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], routing: Routing, phase: kv.Phase
    ) -> Float[Array, "B T D"]:
        """Each token's weighted sum over its chosen experts."""
        weights = [
            cast(w, self.dtype) for w in (self.gate_EFD, self.up_EFD, self.down_EDF)
        ]
        in_EFD, _, out_EDF = specs = [jax.typeof(w).sharding.spec for w in weights]
        sizes = jax.sharding.get_abstract_mesh().shape
        split, tensor = (
            name in axes_of(*in_EFD) and sizes[name] > 1
            for name in ("expert", "tensor")
        )
        batch = batch_axes(x_BTD)
        apart = split and "expert" in axes_of(batch)  # each device has its own tokens
        rows = P(batch, None, None)

        def local(x_BTD, chosen_BTk, affinity_BTk, *weights):
            rows = [
                a.reshape(-1, a.shape[-1]) for a in (x_BTD, chosen_BTk, affinity_BTk)
            ]
            weights = tuple(map(_gathered, weights, specs))
            if not split:
                y_ND = apply_experts(*rows, weights)
            elif apart and phase is not kv.Phase.DECODE:
                y_ND = dispatched(apply_experts, *rows, weights, self.config)
            else:
                y_ND = _all_see_all(*rows, weights, gather=apart)
            if tensor:
                y_ND = jax.lax.psum(y_ND, "tensor")
            return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)

        return jax.shard_map(
            local,
            in_specs=(rows, rows, rows, in_EFD, in_EFD, out_EDF),
            out_specs=rows,
            check_vma=False,
        )(x_BTD, self._computed(routing), routing.weights_BTk, *weights)

    def _computed(self, routing: Routing) -> Int[Array, "B T k"]:
        """The chosen experts; a dropped choice names none that exists."""
        if routing.kept_BTk is None:
            return routing.indices_BTk
        nowhere = self.gate_EFD.shape[0]
        return jnp.where(routing.kept_BTk, routing.indices_BTk, nowhere)


def _gathered(weight: Array, spec: P) -> Array:
    """A weight of the experts whole but for `expert` and `tensor`. Gathered by hand, its
    gradient is scattered as it is summed; the compiler would sum all of it everywhere.
    """
    for dimension, entry in enumerate(spec):
        if "fsdp" in axes_of(entry):
            weight = jax.lax.all_gather(weight, "fsdp", axis=dimension, tiled=True)
    return weight


def _all_see_all(
    x_ND: Array, chosen_Nk: Array, affinity_Nk: Array, weights: Weights, *, gather: bool
) -> Float[Array, "N D"]:
    """Each device multiplies what its own experts were chosen for, of the tokens of all
    devices of the axis; the partial sums are added up. Two collectives a layer, whatever
    the routing: what counts where tokens are few.
    """
    rows = x_ND, chosen_Nk, affinity_Nk
    if gather:
        rows = [jax.lax.all_gather(a, "expert", tiled=True) for a in rows]
    x_ND, chosen_Nk, affinity_Nk = rows
    here_Nk = chosen_Nk - jax.lax.axis_index("expert") * weights[0].shape[0]
    likely = -(-here_Nk.size // jax.lax.axis_size("expert"))
    y_ND = apply_experts(x_ND, here_Nk, affinity_Nk, weights, expected=likely)
    if gather:
        return jax.lax.psum_scatter(y_ND, "expert", tiled=True)
    return jax.lax.psum(y_ND, "expert")


def apply_experts(
    x_ND: Float[Array, "N D"],
    chosen_Nk: Int[Array, "N k"],
    affinity_Nk: Float[Array, "N k"],
    weights: Weights,
    *,
    most: int | None = None,
    expected: int | None = None,
) -> Float[Array, "N D"]:
    """The weighted sum over those of each token's experts that are here, in float32.

    `chosen` outside 0..E-1 names experts that are elsewhere. `most` bounds how many
    choices are here in all (N k by default), `expected` is how many are likely.
    """
    gate_EFD, up_EFD, down_EDF = weights
    (N, k), E = chosen_Nk.shape, gate_EFD.shape[0]
    M, R = most or N * k, min(k, E)
    expert_Nk = jnp.where((chosen_Nk >= 0) & (chosen_Nk < E), chosen_Nk, E)
    sizes_E = keep(count(expert_Nk, E))
    place_Nk = sorted_places(expert_Nk.reshape(-1), E, nowhere=M).reshape(N, k)
    place_Nk = keep(place_Nk)
    place_NR = first_places(place_Nk, R, nowhere=M)
    choice_M = keep(inverse(place_Nk.reshape(-1), M, nowhere=N * k))
    token_M = choice_M // k  # N for none

    x_MD = keep(gather_rows(x_ND, token_M, place_NR))
    affinity_M = gather_rows(affinity_Nk.reshape(-1), choice_M, place_Nk.reshape(-1, 1))
    h_MF = grouped_swiglu(x_MD, gate_EFD, up_EFD, sizes_E, expected_rows=expected)
    h_MF = _weighed(h_MF, affinity_M)
    y_MD = grouped_matmul(h_MF, down_EDF, sizes_E, expected_rows=expected)
    return sum_rows(y_MD, place_NR, token_M)


@jax.checkpoint
def _weighed(h_MF: Array, affinity_M: Array) -> Array:
    """Rows times their affinities. Here the gradient with respect to an affinity is a
    sum over F; after the last product, which is linear, it would be one over D.
    """
    return (h_MF.astype(jnp.float32) * affinity_M[:, None]).astype(h_MF.dtype)
