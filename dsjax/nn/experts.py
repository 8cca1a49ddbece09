"""The routed experts of one layer on the devices of a mesh.

Three ways lead from tokens to experts, and the same local product is at the end of each:
on one device rows are sorted by expert and multiplied by grouped products; where `expert`
cuts the mesh, rows travel to their experts (`dsjax.nn.dispatch`); and where few tokens
meet many experts, in decoding, every device of the axis sees all of them.

Letters: B batch, T length, D model, E experts, F expert width, k chosen experts, N
tokens, M rows (a token's row for each of its experts), R experts of a token at most, Y
layers.
"""

import enum
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dsjax.config import Moe
from dsjax.nn import cache as kv
from dsjax.nn.dispatch import dispatched
from dsjax.nn.feed_forward import SwiGlu, swiglu
from dsjax.nn.options import Build, keep
from dsjax.nn.replicas import empty_table, to_slots
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
from dsjax.sharding import axes_of, is_cut
from pallas_kernels.grouped_matmul.api import grouped_feed_forward

# gate [E, F, D], up [E, F, D], down [E, D, F]; or those of all layers, [Y, E, ...]
Weights = tuple[Array, Array, Array]


class Experts(nnx.Module):
    """The routed experts, cut along `expert` (whole experts), `tensor` and `fsdp`."""

    def __init__(self, config: Moe, d_model: int, *, build: Build):
        self.config, self.slots = config, build.slots
        if build.slots is not None:
            self.slots_EX = empty_table(config, build.slots)
            self.config = config = build.slots.moe(config)
        self.dtype, sharding = build.precision.compute, build.sharding
        E, F, D = config.num_experts, config.width, d_model
        self.gate_EFD = build.weight((E, F, D), sharding.expert_in_EFD)
        self.up_EFD = build.weight((E, F, D), sharding.expert_in_EFD)
        self.down_EDF = build.weight((E, D, F), sharding.expert_out_EDF)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        routing: Routing,
        phase: kv.Phase,
        shared: SwiGlu | None = None,
        layer: Int[Array, ""] | int = 0,
    ) -> Float[Array, "B T D"]:
        """Each token's weighted sum over its chosen experts, plus the shared ones'.

        `layer` says which is meant, where the weights are those of all layers.
        """
        rested = self.gate_EFD[...], self.up_EFD[...], self.down_EDF[...]
        way, batch = _way(x_BTD, rested, phase), batch_axes(x_BTD)
        weights, layers = self._weights(rested, way, layer)
        within = () if shared is None else shared.weights()
        if way is not _Way.ALL_SEE_ALL or not _cut_alike(weights[0], *within[:1]):
            within = ()
        in_EFD, _, out_EDF = specs = [jax.typeof(w).sharding.spec for w in weights]
        tensor = is_cut(in_EFD, "tensor")

        tables = () if self.slots is None else (self.slots_EX[...],)
        # Where layers are no loop there are few of them, and memory for SwiGLU's results
        # and for the rows of all tokens.
        few = not self.gate_EFD.get_metadata("looped")
        apply = functools.partial(apply_experts, keep_result=few)

        def local(x_BTD, chosen_BTk, affinity_BTk, weights, within, tables, layers):
            tokens = x_BTD, chosen_BTk, affinity_BTk
            tokens = [a.reshape(-1, a.shape[-1]) for a in tokens]
            for table_EX in tables:
                options = {"slots": self.slots.count, "batch": axes_of(batch)}
                tokens[1] = to_slots(tokens[1], table_EX, **options)
            weights = tuple(map(_gathered, weights, specs))
            match way:
                case _Way.HERE:
                    y_ND = apply(*tokens, weights, *layers)
                case _Way.DISPATCHED:
                    y_ND = dispatched(apply, *tokens, weights, self.config, at_once=few)
                case _Way.ALL_SEE_ALL:
                    gather = "expert" in axes_of(batch)
                    y_ND = _all_see_all(
                        *tokens, weights, *layers, shared=within, gather=gather
                    )
            if tensor:
                y_ND = jax.lax.psum(y_ND, "tensor")
            return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)

        rows = P(batch, None, None)
        y_BTD = jax.shard_map(
            local,
            in_specs=(
                *(rows, rows, rows, (in_EFD, in_EFD, out_EDF), _specs(within)),
                *(_specs(tables), _specs(layers)),
            ),
            out_specs=rows,
            check_vma=False,
        )(
            *(x_BTD, self._computed(routing), routing.weights_BTk),
            *(weights, within, tables, layers),
        )
        if shared is not None and not within:
            y_BTD += shared(x_BTD)
        return y_BTD

    def _weights(
        self, rested: Weights, way: "_Way", layer: Array | int
    ) -> tuple[Weights, tuple[Array, ...]]:
        """Those that are used, and which layer's, where they are those of all.

        What is cast, gathered, or travelled to by a program with a gradient of its own is
        cut out of the stack first.
        """
        layers = ()
        if rested[0].ndim == 4:
            layers = (jnp.asarray(layer, jnp.int32),)
            stays = not any(is_cut(spec, "fsdp") for spec in _specs(rested))
            if stays and rested[0].dtype == self.dtype and way is not _Way.DISPATCHED:
                return rested, layers
            rested = (kv.read(w, *layers) for w in rested)
        looped = self.gate_EFD.get_metadata("looped")
        return tuple(cast(w, self.dtype, looped=looped) for w in rested), ()

    def _computed(self, routing: Routing) -> Int[Array, "B T k"]:
        """The chosen experts; a dropped choice names none that exists."""
        if routing.kept_BTk is None:
            return routing.indices_BTk
        nowhere = self.config.num_experts  # or slots, which are more
        return jnp.where(routing.kept_BTk, routing.indices_BTk, nowhere)


def of_experts(path: tuple, _) -> bool:
    """Of a model's variables, the routed experts' weights, which a layer may be handed
    together with those of all layers: a filter for `nnx.split`.
    """
    return path[-2:-1] == ("experts",) and path[-1] in (
        "gate_EFD",
        "up_EFD",
        "down_EDF",
    )


class _Way(enum.Enum):
    """How tokens meet their experts."""

    HERE = "all experts are on this device"
    DISPATCHED = "rows travel"
    ALL_SEE_ALL = "each device sees the tokens of all, for its own experts"


def _way(x_BTD: Array, weights: Sequence[Array], phase: kv.Phase) -> _Way:
    if not is_cut(jax.typeof(weights[0]).sharding.spec, "expert"):
        return _Way.HERE
    apart = "expert" in axes_of(batch_axes(x_BTD))  # each device has its own tokens
    if apart and phase is not kv.Phase.DECODE:
        return _Way.DISPATCHED
    return _Way.ALL_SEE_ALL


def _cut_alike(in_EFD: Array, *in_FD: Array) -> bool:
    """Whether the shared experts' widths are cut along the axes of the routed ones: then
    both partial sums are added up at once.
    """
    routed, *shared = (set(axes_of(*spec)) for spec in _specs((in_EFD, *in_FD)))
    return bool(shared) and shared[0] == routed - {"fsdp"}


def _specs(arrays: Sequence[Array]) -> tuple[P, ...]:
    return tuple(jax.typeof(x).sharding.spec for x in arrays)


def _gathered(weight: Array, spec: P) -> Array:
    """A weight of the experts whole but for `expert` and `tensor`. Gathered by hand, its
    gradient is scattered as it is summed; the compiler would sum all of it everywhere.
    """
    for dimension, entry in enumerate(spec):
        if "fsdp" in axes_of(entry):
            weight = jax.lax.all_gather(weight, "fsdp", axis=dimension, tiled=True)
    return weight


def _all_see_all(
    x_ND: Array,
    chosen_Nk: Array,
    affinity_Nk: Array,
    weights: Weights,
    layer: Array | None = None,
    *,
    shared: tuple[Array, ...],
    gather: bool,
) -> Float[Array, "N D"]:
    """Each device multiplies what its own experts were chosen for, of the tokens of all
    devices of the axis; the partial sums are added up, those of its part of the shared
    experts among them. Two collectives a layer, whatever the routing: what counts where
    tokens are few.
    """
    tokens = x_ND, chosen_Nk, affinity_Nk
    if gather:
        tokens = [jax.lax.all_gather(a, "expert", tiled=True) for a in tokens]
    x_ND, chosen_Nk, affinity_Nk = tokens
    here_Nk = chosen_Nk - jax.lax.axis_index("expert") * weights[0].shape[-3]
    expected = -(-chosen_Nk.size // jax.lax.axis_size("expert"))
    y_ND = apply_experts(x_ND, here_Nk, affinity_Nk, weights, layer, expected=expected)
    if shared:
        y_ND += swiglu(x_ND, *shared)
    y_ND = y_ND.astype(x_ND.dtype)
    if gather:
        return jax.lax.psum_scatter(y_ND, "expert", tiled=True)
    return jax.lax.psum(y_ND, "expert")


def apply_experts(
    x_ND: Float[Array, "N D"],
    chosen_Nk: Int[Array, "N k"],
    affinity_Nk: Float[Array, "N k"],
    weights: Weights,
    layer: Int[Array, ""] | None = None,
    *,
    most: int | None = None,
    expected: int | None = None,
    keep_result: bool = False,
) -> Float[Array, "N D"]:
    """The weighted sum over those of each token's experts that are here, in float32.

    `chosen` outside 0..E-1 names experts that are elsewhere. `most` bounds how many
    choices are here in all, `expected` is how many are likely. With `layer`, weights are
    those of all layers. `keep_result`: gradients find SwiGLU's results, and do not make
    them again.
    """
    (N, k), E = chosen_Nk.shape, weights[0].shape[-3]
    R = min(k, E)
    M = most or N * R
    expert_Nk = jnp.where((chosen_Nk >= 0) & (chosen_Nk < E), chosen_Nk, E)
    sizes_E = keep(count(expert_Nk, E))
    place_Nk = sorted_places(expert_Nk.reshape(-1), E, nowhere=M).reshape(N, k)
    place_Nk = keep(place_Nk)
    place_NR = first_places(place_Nk, R, nowhere=M)
    choice_M = keep(inverse(place_Nk.reshape(-1), M, nowhere=N * k))
    token_M = choice_M // k  # N for none

    x_MD = keep(gather_rows(x_ND, token_M, place_NR))
    affinity_M = gather_rows(affinity_Nk.reshape(-1), choice_M, place_Nk.reshape(-1, 1))
    # Weighed before the last product, which is linear: that costs no rounding of its
    # own, and the gradient with respect to an affinity is a sum over F, not D.
    options = {"expected_rows": expected, "layer": layer, "keep_result": keep_result}
    y_MD = grouped_feed_forward(x_MD, *weights, sizes_E, scale_M=affinity_M, **options)
    return sum_rows(y_MD, place_NR, token_M)
