"""Bytes that expert dispatch sends: a token's row once to each device, or once for each
of its experts.

    python -m benchmarks.dispatch [--tokens 256]

V2's device-limited and V3's node-limited routing on random router scores, as the model
routes (`dsjax.nn.router.route`) and plans its dispatch (`dsjax.nn.dispatch`). Rows
are counted, not sent.

Letters: N tokens of a device, E experts, k chosen experts, P devices, J rows to send.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dsjax import models
from dsjax.config import ModelConfig, Moe, Score
from dsjax.nn import dispatch
from dsjax.nn.router import route
from dsjax.sharding import AXES

DEVICES = (8, 16, 32, 64)
ROW_ITEM = 2  # bytes of a bfloat16
TOLD = 2 * 4  # a choice's number and affinity, both float32, go beside the row

# How uneven the experts are: the standard deviation of what is added to each. Of V2 to
# the logits, whose own is 1; of V3 to the selection bias, beside affinities of 0.2.
SKEWED = {Score.SOFTMAX: 1.0, Score.SIGMOID: 0.2}


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Of the tokens of all devices. `destinations`: devices that a token's experts lie
    on, its own among them; `bound`: the most there can be. `rows`, `choices`: of a token,
    those that leave its device, once per destination and once per expert. `rounds`: of
    the exchange.
    """

    bound: int
    mean: float
    largest: int
    rows: float
    choices: float
    rounds: int


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256, help="of a device")
    args = parser.parse_args()
    print(
        "| routing | experts | expert = | destinations: bound | largest | mean "
        "| sent kB | returned kB | sent as top_k rows kB | ratio | rounds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model, skewed, devices in cases():
        config = experts_of(model)
        found = counted(config, devices=devices, tokens=args.tokens, skewed=skewed)
        print(_row(model, skewed, devices, found), flush=True)


def cases() -> Iterator[tuple[ModelConfig, bool, int]]:
    """Model, whether its experts are uneven, devices: those that divide its experts."""
    for model in (models.v2(), models.v3()):
        for skewed in (False, True):
            for devices in DEVICES:
                if experts_of(model).num_experts % devices == 0:
                    yield model, skewed, devices


def experts_of(model: ModelConfig) -> Moe:
    """What the model's MoE layers are."""
    return next(
        segment.feed_forward
        for segment in model.segments
        if isinstance(segment.feed_forward, Moe)
    )


def counted(config: Moe, *, devices: int, tokens: int, skewed: bool) -> Counted:
    """Routes `tokens` random tokens a device, and counts where their rows go."""
    scores_NE, bias_E = _scores(config, devices * tokens, skewed=skewed)
    bias_E = bias_E if config.selection_bias else None

    def count(chosen_Nk):
        plan = dispatch._to_some(chosen_Nk, config)
        me, apiece = jax.lax.axis_index("expert"), config.num_experts // devices
        real_J = plan.device_J < devices
        token_J = jnp.where(real_J, plan.token_J, tokens)
        destinations_N = jnp.zeros(tokens, jnp.int32).at[token_J].add(1, mode="drop")
        rows = (real_J & (plan.device_J != me)).sum()
        choices = (chosen_Nk // apiece != me).sum()
        return destinations_N, rows, choices, plan.rounds

    @jax.jit
    def run(scores_NE):
        chosen_Nk = route(scores_NE[None], bias_E, config).indices_BTk[0]
        return _on_devices(count, devices)(chosen_Nk.reshape(devices, tokens, -1))

    found = jax.tree.map(np.asarray, run(scores_NE))
    destinations, rows, choices, rounds = found
    return Counted(
        bound=dispatch.destinations(config, devices),
        mean=float(destinations.mean()),
        largest=int(destinations.max()),
        rows=float(rows.sum() / destinations.size),
        choices=float(choices.sum() / destinations.size),
        rounds=int(rounds.max()),
    )


def _on_devices(function: Callable, devices: int) -> Callable:
    """`function` as `shard_map` calls it on each device of the axis, but here, in turn:
    its collectives see the axes of a mesh, of which `expert` alone is longer than one.
    """
    for axis in AXES:
        if axis != "expert":
            function = jax.vmap(
                function, in_axes=None, out_axes=None, axis_name=axis, axis_size=1
            )
    return jax.vmap(function, axis_name="expert", axis_size=devices)


def _scores(
    config: Moe, tokens: int, *, skewed: bool
) -> tuple[Float[Array, "N E"], Float[Array, " E"]]:
    """Affinities from logits of standard deviation 1, and the bias of the choice."""
    rng = np.random.default_rng(0)
    logits_NE = rng.standard_normal((tokens, config.num_experts), np.float32)
    offset_E = rng.standard_normal(config.num_experts, np.float32)
    offset_E *= SKEWED[config.score] if skewed else 0.0
    match config.score:
        case Score.SOFTMAX:
            scores_NE = jax.nn.softmax(logits_NE + offset_E, axis=-1)
        case Score.SIGMOID:
            scores_NE = jax.nn.sigmoid(logits_NE)
    return scores_NE, jnp.asarray(offset_E)


def _row(model: ModelConfig, skewed: bool, devices: int, found: Counted) -> str:
    row = model.d_model * ROW_ITEM
    told = experts_of(model).top_k * TOLD
    sent, returned = found.rows * (row + told), found.rows * row
    alone = found.choices * (row + TOLD)
    kilobytes = (f"{size / 1e3:.1f}" for size in (sent, returned, alone))
    return (
        f"| {model.name} | {'uneven' if skewed else 'even'} | {devices} | {found.bound} "
        f"| {found.largest} | {found.mean:.2f} | {' | '.join(kilobytes)} "
        f"| {sent / alone:.2f} | {found.rounds} |"
    )


if __name__ == "__main__":
    main()
