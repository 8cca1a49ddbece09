"""The key table: published tensor names and ours, read in both directions.

Every weight keeps the published [out, in] orientation, so an entry says only which of our
dimensions make up the rows of the published matrix: each tensor is a reshape of one box
of one of our stacked arrays. An architecture's table is put together from shared pieces.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsjax.config import Dense, Gqa, Mla, ModelConfig, Moe


@dataclass(frozen=True)
class Entry:
    """One line of the table: a published name, our path, how many dimensions are rows."""

    name: str
    path: str
    rows: int = 1


@dataclass(frozen=True)
class Tensor:
    """One published tensor and its box in ours.

    `index` selects the box in the stacked array (layer, expert); `box` is its shape, of
    which the first `rows` dimensions are the published tensor's first.
    """

    name: str
    path: str
    index: tuple[int, ...]
    box: tuple[int, ...]
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The published shape."""
        first = math.prod(self.box[: self.rows])
        if self.rows == len(self.box):
            return (first,)
        return first, math.prod(self.box[self.rows :])


EMBEDDING = Entry("model.embed_tokens.weight", "embedding_VD")
FINAL_NORM = Entry("model.norm.weight", "final_norm.scale")
HEAD = Entry("lm_head.weight", "head_VD")

LAYER_NORMS = (
    Entry("input_layernorm.weight", "attention_norm.scale"),
    Entry("post_attention_layernorm.weight", "feed_forward_norm.scale"),
)
GQA = (
    Entry("self_attn.q_proj.weight", "attention.q_KGHD", 3),
    Entry("self_attn.k_proj.weight", "attention.k_KHD", 2),
    Entry("self_attn.v_proj.weight", "attention.v_KHD", 2),
    Entry("self_attn.o_proj.weight", "attention.o_DKGH"),
)
GQA_BIAS = (
    Entry("self_attn.q_proj.bias", "attention.q_bias_KGH", 3),
    Entry("self_attn.k_proj.bias", "attention.k_bias_KH", 2),
    Entry("self_attn.v_proj.bias", "attention.v_bias_KH", 2),
)
MLA = (
    Entry("self_attn.kv_a_proj_with_mqa.weight", "attention.kv_down_CD"),
    Entry("self_attn.kv_a_layernorm.weight", "attention.kv_norm.scale"),
    Entry("self_attn.kv_b_proj.weight", "attention.kv_up_NHL", 2),
    Entry("self_attn.o_proj.weight", "attention.o_DNH"),
)
MLA_DIRECT_QUERY = (Entry("self_attn.q_proj.weight", "attention.q_NHD", 2),)
MLA_LATENT_QUERY = (
    Entry("self_attn.q_a_proj.weight", "attention.q_down_QD"),
    Entry("self_attn.q_a_layernorm.weight", "attention.q_norm.scale"),
    Entry("self_attn.q_b_proj.weight", "attention.q_up_NHQ", 2),
)
DENSE = (
    Entry("mlp.gate_proj.weight", "feed_forward.gate_FD"),
    Entry("mlp.up_proj.weight", "feed_forward.up_FD"),
    Entry("mlp.down_proj.weight", "feed_forward.down_DF"),
)
MOE = (
    Entry("mlp.gate.weight", "feed_forward.router.weight_ED"),
    Entry("mlp.experts.{expert}.gate_proj.weight", "feed_forward.experts.gate_EFD"),
    Entry("mlp.experts.{expert}.up_proj.weight", "feed_forward.experts.up_EFD"),
    Entry("mlp.experts.{expert}.down_proj.weight", "feed_forward.experts.down_EDF"),
)
SELECTION_BIAS = (
    Entry("mlp.gate.e_score_correction_bias", "feed_forward.router.bias_E"),
)
SHARED_EXPERTS = (
    Entry("mlp.shared_experts.gate_proj.weight", "feed_forward.shared.gate_FD"),
    Entry("mlp.shared_experts.up_proj.weight", "feed_forward.shared.up_FD"),
    Entry("mlp.shared_experts.down_proj.weight", "feed_forward.shared.down_DF"),
)
MTP = (
    Entry("enorm.weight", "mtp.embedding_norm.scale"),
    Entry("hnorm.weight", "mtp.hidden_norm.scale"),
    Entry("eh_proj.weight", "mtp.merge_DM"),
    Entry("shared_head.norm.weight", "mtp.final_norm.scale"),
)
# What the MTP layer repeats of the main model; ours are shared.
MTP_COPIES = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}


def layer_table(attention: Gqa | Mla, feed_forward: Dense | Moe) -> tuple[Entry, ...]:
    """The lines of one layer: names below "model.layers.{n}.", paths below its segment."""
    match attention:
        case Gqa(qkv_bias=bias):
            lines = GQA + (GQA_BIAS if bias else ())
        case Mla(q_rank=None):
            lines = MLA + MLA_DIRECT_QUERY
        case Mla():
            lines = MLA + MLA_LATENT_QUERY
    match feed_forward:
        case Dense():
            lines += DENSE
        case Moe() as moe:
            lines += MOE
            lines += SELECTION_BIAS if moe.selection_bias else ()
            lines += SHARED_EXPERTS if moe.num_shared else ()
    return LAYER_NORMS + lines


def tensors(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Tensor]:
    """Every published tensor of `config`, in the order of the published files.

    shapes: our arrays by dotted path (`dsjax.nn.weights.flat`), layers stacked.
    """
    yield _whole(EMBEDDING, shapes)
    for layer in range(config.num_layers):
        segment, index = config.locate(layer)
        feed_forward = config.segments[segment].feed_forward
        for entry in layer_table(config.attention, feed_forward):
            yield from _layer(layer, entry, f"segments.{segment}", (index,), shapes)
    yield _whole(FINAL_NORM, shapes)
    if not config.tied_embeddings:
        yield _whole(HEAD, shapes)
    if config.mtp:
        for entry in MTP:
            yield from _layer(config.num_layers, entry, None, (), shapes)
        for entry in layer_table(config.attention, config.segments[-1].feed_forward):
            yield from _layer(config.num_layers, entry, "mtp.block", (), shapes)


def copies(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Tensor]:
    """Tensors that a published MTP layer repeats: what they repeat, by their own name."""
    if not config.mtp:
        return
    for name, entry in MTP_COPIES.items():
        source = EMBEDDING if config.tied_embeddings else entry
        name = f"model.layers.{config.num_layers}.{name}"
        yield _whole(Entry(name, source.path), shapes)


def _whole(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    return Tensor(entry.name, entry.path, (), shapes[entry.path], entry.rows)


def _layer(
    layer: int,
    entry: Entry,
    scope: str | None,
    index: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Tensor]:
    """The tensors of one line in one layer: one, or one for each expert."""
    path = f"{scope}.{entry.path}" if scope else entry.path
    name, shape = f"model.layers.{layer}.{entry.name}", shapes[path][len(index) :]
    if "{expert}" not in name:
        yield Tensor(name, path, index, shape, entry.rows)
        return
    for expert in range(shape[0]):
        place = (*index, expert)
        yield Tensor(name.format(expert=expert), path, place, shape[1:], entry.rows)
