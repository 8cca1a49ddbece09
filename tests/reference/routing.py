"""Routing of all three generations in numpy, and its well-known mistakes.

Written from the papers (DeepSeekMoE section 3; V2 2.2.2; V3 2.1.2) to prove that the
recorded choices can tell right from wrong: each `Mistake` has to change some of them.
"""

import enum
from collections.abc import Mapping
from typing import Any

import numpy as np


class Mistake(enum.Enum):
    """What implementations got wrong."""

    MASK_WITH_ZERO = "masked groups get 0, which beats a negative biased affinity"
    NO_BIAS = "the bias does not take part in the choice"
    NO_GROUPS = "experts of all groups compete"
    OTHER_GROUP_SCORE = "groups are rated by the other generation's rule"
    FIRST_EXPERTS = "the chosen indices are lost: experts 0 to k - 1 are used"


def choose(
    logits: np.ndarray,
    config: Mapping[str, Any],
    bias: np.ndarray | None = None,
    mistake: Mistake | None = None,
) -> np.ndarray:
    """Ascending indices [.., k] of the experts that router logits [.., E] lead to.

    `config` is the checkpoint's config.json, `bias` [E] the selection bias.
    """
    choice, allowed = choice_scores(logits, config, bias, mistake)
    masked = 0.0 if mistake is Mistake.MASK_WITH_ZERO else -np.inf
    top_k = config["num_experts_per_tok"]
    if mistake is Mistake.FIRST_EXPERTS:
        return np.broadcast_to(np.arange(top_k), (*logits.shape[:-1], top_k))
    best = np.argsort(-np.where(allowed, choice, masked), axis=-1, kind="stable")
    return np.sort(best[..., :top_k], axis=-1)


def choice_scores(
    logits: np.ndarray,
    config: Mapping[str, Any],
    bias: np.ndarray | None = None,
    mistake: Mistake | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores that decide the choice, whether an expert may be chosen), [.., E]."""
    choice = affinities(logits.astype(np.float64), config)
    if bias is not None and mistake is not Mistake.NO_BIAS:
        choice = choice + bias
    groups = config.get("n_group") or 1
    if groups == 1 or mistake is Mistake.NO_GROUPS:
        return choice, np.ones(choice.shape, bool)
    score = group_scores(choice, config, mistake)
    kept = np.argsort(-score, axis=-1, kind="stable")[..., : config["topk_group"]]
    group_of = np.arange(choice.shape[-1]) // (choice.shape[-1] // groups)
    return choice, (group_of[:, None] == kept[..., None, :]).any(-1)


def affinities(logits: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Softmax or sigmoid of the router's logits [.., E]."""
    if config["scoring_func"] == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


def group_scores(
    choice: np.ndarray, config: Mapping[str, Any], mistake: Mistake | None = None
) -> np.ndarray:
    """Each group's rating [.., groups]: its best score (V2) or sum of two best (V3)."""
    ordered = np.sort(
        choice.reshape(*choice.shape[:-1], config["n_group"], -1), axis=-1
    )
    top2 = config["topk_method"] == "noaux_tc"
    if top2 != (mistake is Mistake.OTHER_GROUP_SCORE):
        return ordered[..., -2:].sum(-1)
    return ordered[..., -1]


def margin(
    logits: np.ndarray, config: Mapping[str, Any], bias: np.ndarray | None = None
) -> float:
    """The narrowest lead of a chosen expert or group: how far off scores may be."""
    choice, allowed = choice_scores(logits, config, bias)
    lead = _lead(np.where(allowed, choice, -np.inf), config["num_experts_per_tok"])
    if (config.get("n_group") or 1) == 1:
        return lead
    return min(lead, _lead(group_scores(choice, config), config["topk_group"]))


def _lead(scores: np.ndarray, kept: int) -> float:
    ordered = -np.sort(-scores, axis=-1)
    return float((ordered[..., kept - 1] - ordered[..., kept]).min())
