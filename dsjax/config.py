"""The architecture of every model of the family, as one frozen record.

A `ModelConfig` is a stack of `Segment`s: runs of equal layers. Attention is `Gqa` or
`Mla`, a segment's feed-forward is `Dense` or `Moe`; code matches on these types and on
nothing else. Published values are in `dsjax.models`.

References: DeepSeek LLM (arXiv 2401.02954), DeepSeekMoE (2401.06066), V2 (2405.04434),
V3 (2412.19437).
"""

import enum
import math
from dataclasses import dataclass

from dsjax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), as in V2 (section 3.1.4) and V3."""

    factor: float
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    @staticmethod
    def _magnitude(factor: float, mscale: float) -> float:
        return (
            1.0 if factor <= 1 or not mscale else 0.1 * mscale * math.log(factor) + 1.0
        )

    @property
    def rotation_scale(self) -> float:
        """What cos and sin are multiplied with.

        Exactly 1 when both mscales agree, as in every published model.
        """
        if not self.mscale or not self.mscale_all_dim:
            return self._magnitude(self.factor, 1.0)
        return self._magnitude(self.factor, self.mscale) / self._magnitude(
            self.factor, self.mscale_all_dim
        )

    @property
    def softmax_scale(self) -> float:
        """What the softmax scale 1 / sqrt(head size) is multiplied with.

        The square of mscale: 1.8739 for V3.
        """
        return self._magnitude(self.factor, self.mscale_all_dim) ** 2


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's piecewise frequency scaling, used by the two Llama distills."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding.

    `interleaved`: rotated pairs are neighbours (V2, V3), not halves (LLM, MoE, Llama).
    """

    theta: float = 10000.0
    interleaved: bool = False
    scaling: Yarn | Llama3 | None = None


@dataclass(frozen=True, kw_only=True)
class Gqa:
    """Grouped-query attention; multi-head when num_kv_heads == num_heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope = Rope()
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads={self.num_kv_heads} must divide "
                f"num_heads={self.num_heads}"
            )

    @property
    def cache_values_per_token(self) -> int:
        """Values that one layer keeps for one token."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Mla:
    """Multi-head latent attention (V2, section 2.1).

    `q_rank=None`: queries are projected directly (V2-Lite).
    """

    num_heads: int
    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope = Rope(interleaved=True)

    @property
    def cache_values_per_token(self) -> int:
        """Values that one layer keeps for one token.

        The latent and the rotary key that all heads share; nothing per head.
        """
        return self.kv_rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """Size of a head's query and key: without position, then rotary."""
        return self.nope_dim + self.rope_dim


class Score(enum.Enum):
    """How router logits become affinities."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class GroupScore(enum.Enum):
    """How a group of experts is rated before the best groups are kept."""

    MAX = "max"  # V2: device-limited routing
    TOP2_SUM = "top2_sum"  # V3: node-limited routing


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Group-limited routing: only the `kept` best of `count` groups are used."""

    count: int
    kept: int
    score: GroupScore


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A SwiGLU feed-forward of one width."""

    width: int


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Fine-grained routed experts beside shared ones (DeepSeekMoE, section 3).

    `renormalize` divides the chosen affinities by their sum (V3); `scale` multiplies
    the routed weights. `selection_bias` adds a learnt-by-balancing bias to the
    affinities for the choice only, never for the weights (V3, section 2.1.2).
    `mask_best` of a token's best experts are passed over, the next ones are chosen: to
    measure how much a trained model leans on them (DeepSeekMoE, section 4.5).
    """

    num_experts: int
    num_shared: int
    top_k: int
    width: int
    score: Score = Score.SOFTMAX
    groups: Groups | None = None
    renormalize: bool = False
    scale: float = 1.0
    selection_bias: bool = False
    mask_best: int = 0

    def __post_init__(self) -> None:
        if self.top_k + self.mask_best > self.num_experts:
            masked = f" and mask_best={self.mask_best}" if self.mask_best else ""
            raise UserError(
                f"top_k={self.top_k}{masked} is more than "
                f"num_experts={self.num_experts}"
            )
        if self.groups is None:
            return
        size, rest = divmod(self.num_experts, self.groups.count)
        if rest:
            raise UserError(
                f"groups.count={self.groups.count} must divide "
                f"num_experts={self.num_experts}"
            )
        if not 0 < self.groups.kept <= self.groups.count:
            raise UserError(
                f"groups.kept={self.groups.kept} must be from 1 to "
                f"groups.count={self.groups.count}"
            )
        if self.groups.kept * size < self.top_k:
            raise UserError(
                f"{self.groups.kept} groups of {size} experts hold fewer than "
                f"top_k={self.top_k}"
            )
        if self.groups.score is GroupScore.TOP2_SUM and size < 2:
            raise UserError(
                f"TOP2_SUM needs two experts a group: {self.num_experts} experts, "
                f"{self.groups.count} groups"
            )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`count` equal layers, stored stacked and run by one scan."""

    count: int
    feed_forward: Dense | Moe


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only Transformer of the family.

    `init_std` is the standard deviation of every weight at the start of training: 0.006
    for all published models (the 0.02 of the published config.json files was never
    trained with). `mtp` adds V3's multi-token prediction module, one more layer of the
    last segment's kind.
    """

    name: str
    vocab_size: int
    d_model: int
    attention: Gqa | Mla
    segments: tuple[Segment, ...]
    max_length: int
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    mtp: bool = False
    init_std: float = 0.006

    @property
    def num_layers(self) -> int:
        """Layers of the main model; the MTP module is not counted."""
        return sum(segment.count for segment in self.segments)

    def locate(self, layer: int) -> tuple[int, int]:
        """(segment, index inside it) of a layer counted through the whole model."""
        for number, segment in enumerate(self.segments):
            if layer < segment.count:
                return number, layer
            layer -= segment.count
        raise IndexError(layer)
