"""Mistakes as edits of a checkpoint.

A correct reader of the edited files behaves like a wrong reader of the original. Each
edit has to move the logits by far more than the parity tolerance; otherwise the
recorded answers could not catch that mistake.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference import checkpoints, files
from tests.reference.cases import CASES
from tests.reference.files import Tensors

Config = dict[str, Any]
Edit = Callable[[Config, Tensors], None]


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A mistake in reading the checkpoint `case`; `mtp`: only MTP's logits show it."""

    case: str
    mistake: str
    edit: Edit
    mtp: bool = False

    def __str__(self) -> str:
        return f"{self.case}-{self.mistake}".replace(" ", "_")

    def write(self, directory: Path) -> Path:
        """Makes `directory` with the edited checkpoint in one file; returns it."""
        case = CASES[self.case]
        config, values = dict(case.config), checkpoints.tensors(case)
        self.edit(config, values)
        return files.write_files(config, values, directory)


def setting(**changes: Any) -> Edit:
    """Other values in config.json."""

    def edit(config: Config, _: Tensors) -> None:
        config.update(changes)

    return edit


def scaling(**changes: Any) -> Edit:
    """Other values in config.json's rope_scaling."""

    def edit(config: Config, _: Tensors) -> None:
        config["rope_scaling"] = config["rope_scaling"] | changes

    return edit


def tensor(ending: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """`change` applied, in float32, to every tensor whose name has this ending."""

    def edit(_: Config, values: Tensors) -> None:
        names = [name for name in values if name.endswith(ending)]
        assert names, ending
        for name in names:
            new = change(values[name].astype(np.float32))
            values[name] = np.ascontiguousarray(new).astype(values[name].dtype)

    return edit


def exchange(first: str, second: str) -> Edit:
    """Tensors whose names differ by these endings swap their values."""

    def edit(_: Config, values: Tensors) -> None:
        names = [name for name in values if name.endswith(first)]
        assert names, first
        for name in names:
            other = name.removesuffix(first) + second
            values[name], values[other] = values[other], values[name]

    return edit


def shift_experts(config: Config, values: Tensors) -> None:
    """Every expert takes the next one's weights."""
    old, count = dict(values), config["n_routed_experts"]
    for name in values:
        head, found, tail = name.partition(".experts.")
        if found:
            number, _, tail = tail.partition(".")
            source = f"{head}{found}{(int(number) + 1) % count}.{tail}"
            values[name] = old[source]


def rotate_halves(config: Config, values: Tensors) -> None:
    """Rotary rows reordered: rotated as pairs, they act like the originals as halves."""
    rope = config["qk_rope_head_dim"]
    head = config["qk_nope_head_dim"] + rope
    order = np.arange(rope).reshape(2, -1).T.reshape(-1)
    for name, value in values.items():
        rows = np.arange(len(value))
        if name.endswith(("q_b_proj.weight", "q_proj.weight")):
            rows = rows.reshape(-1, head)
            rows[:, -rope:] = rows[:, -rope:][:, order]
        elif name.endswith("kv_a_proj_with_mqa.weight"):
            rows[-rope:] = rows[-rope:][order]
        values[name] = value[rows.reshape(-1)]


def magnitude(config: Config) -> float:
    """YaRN's mscale."""
    yarn = config["rope_scaling"]
    return 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1


def drop_mscale(config: Config, values: Tensors) -> None:
    """The softmax scale without mscale squared, put into the queries."""
    name = "q_proj.weight" if config["q_lora_rank"] is None else "q_b_proj.weight"
    tensor(name, lambda x: x / np.float32(magnitude(config) ** 2))(config, values)


def swap_halves(value: np.ndarray) -> np.ndarray:
    """[D, 2D] with its two halves of columns exchanged."""
    return np.roll(value, value.shape[1] // 2, axis=1)


def main_norm(config: Config, values: Tensors) -> None:
    """The MTP module ends in the main model's final norm instead of its own."""
    name = f"model.layers.{config['num_hidden_layers']}.shared_head.norm.weight"
    values[name] = values["model.norm.weight"]


def _all(case: str, edits: dict[str, Edit], *, mtp: bool = False) -> list[Mutation]:
    return [
        Mutation(case=case, mistake=mistake, edit=edit, mtp=mtp)
        for mistake, edit in edits.items()
    ]


_LATENT_ATTENTION: dict[str, Edit] = {
    "half-split rotation": rotate_halves,
    "mscale not in the softmax scale": drop_mscale,
    "no YaRN": setting(rope_scaling=None),
    "wrong YaRN original length": scaling(original_max_position_embeddings=128),
    "wrong YaRN factor": scaling(factor=20),
    "wrong YaRN ramp": scaling(beta_slow=4),
    "latent norm's scale ignored": tensor("kv_a_layernorm.weight", np.ones_like),
}
_EXPERTS: dict[str, Edit] = {
    "experts off by one": shift_experts,
    "gate and up exchanged": exchange("gate_proj.weight", "up_proj.weight"),
    "shared experts ignored": tensor("shared_experts.down_proj.weight", np.zeros_like),
}

MUTATIONS: list[Mutation] = [
    *_all(
        "llama_gqa",
        {
            "no rope scaling": setting(rope_scaling=None),
            "wrong theta": setting(rope_theta=10000.0),
            "scaling without a blend": scaling(high_freq_factor=1.001),
            "kv heads exchanged": tensor("k_proj.weight", lambda x: np.roll(x, 16, 0)),
            "norm scale ignored": tensor("input_layernorm.weight", np.ones_like),
        },
    ),
    *_all("llama_mha", {"wrong theta": setting(rope_theta=500000.0)}),
    *_all(
        "qwen2_untied",
        {
            "query bias ignored": tensor("q_proj.bias", np.zeros_like),
            "key bias ignored": tensor("k_proj.bias", np.zeros_like),
            "value bias ignored": tensor("v_proj.bias", np.zeros_like),
            "tied": exchange("lm_head.weight", "model.embed_tokens.weight"),
        },
    ),
    *_all("qwen2_tied", {"wrong theta": setting(rope_theta=10000.0)}),
    *_all(
        "deepseek_moe",
        {**_EXPERTS, "fewer experts": setting(num_experts_per_tok=3)},
    ),
    *_all(
        "deepseek_v2",
        {
            **_LATENT_ATTENTION,
            **_EXPERTS,
            "scale ignored": setting(routed_scaling_factor=1.0),
            "groups ignored": setting(topk_group=4),
            "query norm's scale ignored": tensor("q_a_layernorm.weight", np.ones_like),
        },
    ),
    *_all("deepseek_v2_lite", {**_LATENT_ATTENTION, **_EXPERTS}),
    *_all(
        "deepseek_v3",
        {
            **_LATENT_ATTENTION,
            **_EXPERTS,
            "scale ignored": setting(routed_scaling_factor=1.0),
            "weights not renormalised": setting(norm_topk_prob=False),
            "groups ignored": setting(topk_group=4),
            "bias ignored": tensor("e_score_correction_bias", np.zeros_like),
        },
    ),
    *_all(
        "deepseek_v3",
        {
            "eh_proj inputs swapped": tensor("eh_proj.weight", swap_halves),
            "norms exchanged": exchange("enorm.weight", "hnorm.weight"),
            "main model's final norm": main_norm,
        },
        mtp=True,
    ),
    *_all(
        "deepseek_v3_fp8",
        {
            "scale ignored": tensor("weight_scale_inv", np.ones_like),
            "scale divides": tensor("weight_scale_inv", lambda x: 1 / x),
            "blocks in reverse": tensor("weight_scale_inv", lambda x: x[::-1, ::-1]),
        },
    ),
    *_all(
        "deepseek_v3_fp8_small_blocks",
        {
            "rows of blocks reversed": tensor("scale_inv", lambda x: x[::-1]),
            "columns of blocks reversed": tensor("scale_inv", lambda x: x[:, ::-1]),
        },
    ),
]
