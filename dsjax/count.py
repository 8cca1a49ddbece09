"""What a model costs, from its configuration alone: parameters, cache bytes, FLOPs.

Nothing is allocated. The shapes are those of `Transformer.abstract`, so that what is
counted is the model that runs, not a second description of it.
"""

from dataclasses import asdict, dataclass

from etils import epath

from dsjax import models
from dsjax.config import Dense, Gqa, Mla, ModelConfig, Moe, Segment
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat

BF16_BYTES = 2
GQA_GROUPS = 8  # of the grouped-query attention that the cache is compared with
PRETRAINING_LENGTH = 4096


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters of a model; bytes of cache and forward FLOPs of one token.

    `parameters`: the main model's, both embeddings included. `mtp_parameters`: what the
    multi-token prediction module adds to them. `active`: those that one token uses, of
    the routed experts its `top_k`. `active_without_lookup`: the same without the input
    embedding, of which a token reads one row.

    `cache_bytes`: keys and values in bfloat16, in all layers. `cache_bytes_fp8`: with
    MLA's latents in e4m3, a scale for each; None without latents. `cache_bytes_mha`,
    `cache_bytes_gqa`: the same heads with keys and values of their own, or shared in 8
    groups (V2, section 2.1.4).

    `matmul_flops`: 2 for every weight that a token is multiplied with, so the active
    ones but lookup, norms and biases. `attention_flops`: scores and the weighted sum of
    values over `context` positions, keys and values unfolded for every head. The MTP
    module is in neither.
    """

    name: str
    parameters: int
    active: int
    active_without_lookup: int
    mtp_parameters: int
    cache_bytes: int
    cache_bytes_fp8: int | None
    cache_bytes_mha: int
    cache_bytes_gqa: int
    context: int
    matmul_flops: int
    attention_flops: int

    @property
    def flops(self) -> int:
        """All forward FLOPs of one token."""
        return self.matmul_flops + self.attention_flops

    def as_dict(self) -> dict[str, int | str | None]:
        """Every number by its name, for JSON."""
        return asdict(self) | {"flops": self.flops}


def find(target: str) -> ModelConfig:
    """The configuration of a checkpoint, Hugging Face or Orbax, or of a known name.

    A directory comes before a name. Raises UserError when `target` is neither.
    """
    directory = epath.Path(target)
    if directory.is_dir():
        return _read(directory)
    if "/" in target:
        raise UserError(f"{target}: no such directory")
    return models.get(target)


def _read(directory: epath.Path) -> ModelConfig:
    # Imported here: a name needs neither Orbax nor the second that it takes to import.
    from dsjax.checkpoint import config_json, hf_config

    values = config_json.read_json(directory / "config.json")
    if config_json.is_ours(values):
        return config_json.parse(values).config
    return hf_config.read(values, name=directory.name)


def count(config: ModelConfig, *, context: int | None = None) -> Count:
    """Counts a model that attends to `context` positions: 4096, or all it can see."""
    context = context or min(PRETRAINING_LENGTH, config.max_length)
    sizes = {
        path: leaf.size for path, leaf in flat(Transformer.abstract(config)).items()
    }
    main = {path: size for path, size in sizes.items() if not path.startswith("mtp.")}
    used = {path: _active(config, path, size) for path, size in main.items()}
    lookup = 0 if config.tied_embeddings else used["embedding_VD"]
    unmultiplied = sum(size for path, size in used.items() if _is_added(path))
    active = sum(used.values())
    cache = config.num_layers * BF16_BYTES
    return Count(
        name=config.name,
        parameters=sum(main.values()),
        active=active,
        active_without_lookup=active - lookup,
        mtp_parameters=sum(sizes.values()) - sum(main.values()),
        cache_bytes=cache * config.attention.cache_values_per_token,
        cache_bytes_fp8=_fp8_cache_bytes(config),
        cache_bytes_mha=cache * 2 * _heads_values(config.attention),
        cache_bytes_gqa=cache * 2 * _heads_values(config.attention, most=GQA_GROUPS),
        context=context,
        matmul_flops=2 * (active - lookup - unmultiplied),
        attention_flops=config.num_layers * _attention_flops(config.attention, context),
    )


def training_flops(config: ModelConfig, *, length: int, mtp: bool) -> int:
    """FLOPs of one token, forward and backward (twice the forward), in sequences of
    `length`: a token attends to half of it on average.

    With `mtp` the MTP module and its use of the head are in it. What is computed again
    instead of kept is not: these are the model's FLOPs, not the hardware's.
    """
    context = (length + 1) // 2
    counted = count(config, context=context)
    forward = counted.matmul_flops + counted.attention_flops
    if mtp and config.mtp:
        forward += _mtp_flops(config, context)
    return 3 * forward


def _mtp_flops(config: ModelConfig, context: int) -> int:
    """Forward FLOPs of one token in the MTP module and, behind it, in the head."""
    sizes = flat(Transformer.abstract(config)).items()
    used = [
        _active(config, path, leaf.size)
        for path, leaf in sizes
        if path.startswith("mtp.") and not _is_added(path)
    ]
    head = config.vocab_size * config.d_model
    return 2 * (sum(used) + head) + _attention_flops(config.attention, context)


def _active(config: ModelConfig, path: str, size: int) -> int:
    """How many of the `size` parameters at `path` one token uses."""
    if ".experts." not in path:
        return size
    segment = -1 if path.startswith("mtp.") else int(path.split(".")[1])
    moe = config.segments[segment].feed_forward
    return size * moe.top_k // moe.num_experts


def _is_added(path: str) -> bool:
    """Norm scales and biases: no matrix product."""
    name = path.rpartition(".")[2]
    return name == "scale" or "bias" in name


def _heads_values(attention: Gqa | Mla, *, most: int | None = None) -> int:
    """Values in one key, or one value, of `most` heads (of all of them by default)."""
    heads = attention.num_heads if most is None else min(most, attention.num_heads)
    match attention:
        case Gqa(head_dim=size) | Mla(nope_dim=size):
            return heads * size


def _fp8_cache_bytes(config: ModelConfig) -> int | None:
    """A byte for each part of a latent, a float32 scale, the rotary part in bfloat16."""
    match config.attention:
        case Mla(kv_rank=latent, rope_dim=rope):
            return config.num_layers * (latent + 4 + BF16_BYTES * rope)
        case Gqa():
            return None


def _attention_flops(attention: Gqa | Mla, context: int) -> int:
    """FLOPs of one query token in one layer: scores, then the sum of values."""
    match attention:
        case Gqa(head_dim=size):
            per_position = size + size
        case Mla(query_dim=query, value_dim=value):
            per_position = query + value
    return 2 * attention.num_heads * per_position * context


def table(config: ModelConfig, counted: Count) -> str:
    """The count for a reader: a line on the architecture, then one a number."""
    c = counted
    groups = min(GQA_GROUPS, config.attention.num_heads)
    mtp = ("  MTP module, beside these", _short(c.mtp_parameters, "B"), "")
    fp8 = ("  latents in FP8", f"{c.cache_bytes_fp8 or 0:,}", "float8_e4m3fn, scales")
    rows = [
        ("parameters", _short(c.parameters, "B"), "both embeddings included"),
        ("  active for a token", _short(c.active, "B"), _percent(c)),
        ("  without embedding lookup", _short(c.active_without_lookup, "B"), ""),
        *([mtp] if c.mtp_parameters else []),
        ("cache bytes a token", f"{c.cache_bytes:,}", "bfloat16"),
        *([fp8] if c.cache_bytes_fp8 else []),
        ("  as MHA", f"{c.cache_bytes_mha:,}", _times(c.cache_bytes_mha, c)),
        (
            f"  as GQA, {groups} groups",
            f"{c.cache_bytes_gqa:,}",
            _times(c.cache_bytes_gqa, c),
        ),
        ("forward FLOPs a token", _short(c.flops, "G"), ""),
        ("  2 for every weight used", _short(c.matmul_flops, "G"), ""),
        (
            "  attention",
            _short(c.attention_flops, "G"),
            f"over {c.context:,} positions",
        ),
    ]
    lines = [f"{label:28}{number:>12}  {note}".rstrip() for label, number, note in rows]
    return "\n".join([_describe(config), *lines])


def _short(number: int, billions: str) -> str:
    """671026419200 -> "671.026 B"; `billions` is the letter for 10^9."""
    for power, letter in ((9, billions), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:,.3f} {letter}"
    return str(number)


def _percent(counted: Count) -> str:
    return f"{counted.active / counted.parameters:.1%}"


def _times(other: int, counted: Count) -> str:
    return f"{other / counted.cache_bytes:.1f} x"


def _describe(config: ModelConfig) -> str:
    match config.attention:
        case Gqa(num_heads=heads, num_kv_heads=kv_heads) if heads == kv_heads:
            kind = f"MHA of {heads} heads"
        case Gqa(num_heads=heads, num_kv_heads=kv_heads):
            kind = f"GQA of {heads} heads in {kv_heads} groups"
        case Mla(num_heads=heads, kv_rank=kv_rank):
            kind = f"MLA of {heads} heads on a latent of {kv_rank}"
    parts = [f"{config.name}: {config.num_layers} layers", f"d_model {config.d_model}"]
    return ", ".join([*parts, kind, *map(_describe_segment, config.segments)])


def _describe_segment(segment: Segment) -> str:
    match segment.feed_forward:
        case Dense(width=width):
            return f"{segment.count} x dense of {width}"
        case Moe() as moe:
            experts = f"{moe.top_k} of {moe.num_experts} experts + {moe.num_shared}"
            return f"{segment.count} x {experts} shared of {moe.width}"
