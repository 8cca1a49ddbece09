"""ZeRO-1 (arXiv 1910.02054): the state of training cut along axes that hold copies of
the weights.

Parameters, moments and their average rest cut along `Sharding.state`, beside what the
weights' own layout cuts. A step gathers the parameters along it once, for all of its
microbatches, in the dtype they are computed in; gradients are cut as they are added up,
and the update is each device's own part. Without such axes nothing here does anything.
"""

import math

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import shardings
from dsjax.sharding import axes_of

Weights = dict[str, Array]  # dotted path -> array

# Computed in more than the compute dtype: norms, routers; and the two whose gradients
# are sums over so many tokens that they are taken from the weight as it rests.
WIDE = ("scale", "weight_ED", "embedding_VD", "head_VD")


def is_cut(model: Transformer) -> bool:
    """Whether a state is cut further than the model's weights."""
    return any(model.mesh.shape[axis] > 1 for axis in model.sharding.state)


def at_rest(weights: Weights, model: Transformer) -> Weights:
    """Arrays named like the model's weights (gradients, too), cut as a state is."""
    if not is_cut(model):
        return weights
    places = shardings(model, model.mesh)
    return {
        path: jax.sharding.reshard(
            array,
            spread(places[path].spec, array.shape, model.mesh, model.sharding.state),
        )
        for path, array in weights.items()
    }


def gathered(params: Weights, model: Transformer) -> Weights:
    """The parameters as the model's layout has them, in the dtype of their use."""
    if not is_cut(model):
        return params  # each layer casts its own
    places = shardings(model, model.mesh)
    return {
        path: jax.sharding.reshard(
            array.astype(_dtype(path, model, array.dtype)), places[path].spec
        )
        for path, array in params.items()
    }


def _dtype(path: str, model: Transformer, resting: DTypeLike) -> DTypeLike:
    return resting if path.split(".")[-1] in WIDE else model.dtype


def spread(spec: P, shape: tuple[int, ...], mesh: Mesh, axes: tuple[str, ...]) -> P:
    """`spec` with each of `axes` added to the dimension whose parts are the largest, of
    those that the axis divides. An array without one stays as it is.
    """
    entries = [axes_of(entry) for entry in spec]
    entries += [()] * (len(shape) - len(entries))
    for axis in axes:
        parts = [
            size // math.prod(mesh.shape[name] for name in entry)
            for size, entry in zip(shape, entries, strict=True)
        ]
        fits = [d for d, part in enumerate(parts) if part % mesh.shape[axis] == 0]
        if fits:
            largest = max(fits, key=lambda d: parts[d])
            entries[largest] += (axis,)
    return P(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))
