"""Held-out loss during a run: nats a token and bits a byte.

Letters: B batch, S window (T inputs + 1), T length.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float

from dsjax import hosts
from dsjax.data.held_out import HeldOut
from dsjax.nn.transformer import Transformer
from dsjax.train.objective import head_loss


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model's loss on held-out text."""

    nats_per_token: float
    bits_per_byte: float


def score(model: Transformer, held_out: HeldOut) -> Score:
    """Of all windows, each process bringing its rows; summed in float64."""
    graph, state = nnx.split(model)
    nats = 0.0
    with jax.set_mesh(model.mesh):
        for rows in held_out:
            batch = hosts.assemble(rows, rows=held_out.batch, axis=0, mesh=model.mesh)
            nats += float(_nats(graph, state, batch))
    return Score(
        nats_per_token=nats / held_out.targets,
        bits_per_byte=held_out.bits_per_byte(nats),
    )


@jax.jit(static_argnums=0)
def _nats(
    graph: nnx.GraphDef, state: nnx.State, batch: Mapping[str, Array]
) -> Float[Array, ""]:
    """The summed cross-entropy of the targets that the mask names."""
    model = nnx.merge(graph, state)
    tokens_BS = model.place(batch["tokens"])
    segments_BT = batch["segments"][:, :-1] if "segments" in batch else None
    output = model.forward(tokens_BS[:, :-1], segments_BT=segments_BT)
    mask_BT = model.place(batch["mask"].astype("int32")).astype("float32")
    normed_BTD = model.final_norm(output.hidden_BTD)
    return head_loss(model, normed_BTD, tokens_BS[:, 1:], mask_BT)
