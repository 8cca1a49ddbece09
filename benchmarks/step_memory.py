"""Memory of a training step with V3's vocabulary, as XLA plans it.

    python -m benchmarks.step_memory [--length 4096] [--layers 4] [--d-model 1024]

Compiles the step for abstract arrays: nothing is computed, and no memory of that size
is needed. Rows: the plain loss (logits of the whole batch) beside the chunked one, and
each choice of what the backward pass computes again.
"""

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Dense, Mla, ModelConfig, Moe, Score, Segment
from dsjax.nn.options import Precision, Remat
from dsjax.nn.transformer import Transformer
from dsjax.train import loss, objective
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.step import Rates, init_state, make_step

VOCABULARY = 129_280


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=1024)
    args = parser.parse_args()
    model = config(d_model=args.d_model, layers=args.layers)
    print("| loss | remat | arguments GB | temporaries GB |")
    print("|---|---|---|---|")
    for name, remat, entropy in cases():
        objective.loss.cross_entropy = entropy
        memory = compiled(model, length=args.length, remat=remat).memory_analysis()
        figures = (
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
        )
        numbers = " | ".join(f"{figure / 1e9:.2f}" for figure in figures)
        print(f"| {name} | {remat.value} | {numbers} |", flush=True)


def cases() -> Iterator[tuple]:
    """Name of the loss, remat, and the loss."""
    chunked = loss.cross_entropy  # before `main` puts another in its place
    yield "plain", Remat.NONE, plain
    for remat in Remat:
        yield "chunked", remat, chunked


def plain(hidden_BTD, head_VD, targets_BT, weights_BT, *, statistics):
    """The loss as one would write it first."""
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV",
        hidden_BTD,
        head_VD.astype(hidden_BTD.dtype),
        preferred_element_type=statistics,
    )
    logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    is_target_BTV = targets_BT[..., None] == jnp.arange(VOCABULARY)
    picked_BT = jnp.sum(jnp.where(is_target_BTV, logp_BTV, 0.0), axis=-1)
    return -jnp.sum(picked_BT * weights_BT)


def config(*, d_model: int, layers: int) -> ModelConfig:
    """V3's architecture with its vocabulary: one dense layer, then MoE, then MTP."""
    moe = Moe(
        num_experts=8,
        num_shared=1,
        top_k=2,
        width=d_model // 4,
        score=Score.SIGMOID,
        renormalize=True,
        selection_bias=True,
    )
    return ModelConfig(
        name="step_memory",
        vocab_size=VOCABULARY,
        d_model=d_model,
        attention=Mla(
            num_heads=d_model // 128,
            kv_rank=d_model // 4,
            q_rank=d_model // 2,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
        ),
        segments=(
            Segment(count=1, feed_forward=Dense(width=3 * d_model)),
            Segment(count=layers - 1, feed_forward=moe),
        ),
        max_length=4096,
        mtp=True,
    )


def compiled(config: ModelConfig, *, length: int, remat: Remat) -> jax.stages.Compiled:
    """The step for one sequence, on this machine's first device."""
    model = Transformer.abstract(config, precision=Precision(), remat=remat)
    terms = Objective(sequence_balance=1e-4, bias_speed=1e-3, mtp=0.3)
    step = make_step(model, optimizer=AdamW(), objective=terms)
    tokens = jax.ShapeDtypeStruct((1, 1, length + 1), jnp.int32)
    number = np.float32(0)
    rates = Rates(learning_rate=number, mtp=number, bias_speed=number)
    state = init_state(model, AdamW())
    return step.lower(state, {"tokens": tokens}, rates).compile()


if __name__ == "__main__":
    main()
