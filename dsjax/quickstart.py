"""The main job in miniature, on text that every machine has: the standard library.

Trains a small V3 (latent attention, experts balanced by bias, multi-token prediction),
saves it, exports it to Hugging Face's form, converts that back, compares logits, scores
held-out files beside lzma, writes some text, and leaves a figure and results.json.
"""

import contextlib
import json
import lzma
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from dsjax.api import load, save
from dsjax.checkpoint import convert, export
from dsjax.config import (
    Dense,
    Groups,
    GroupScore,
    Mla,
    ModelConfig,
    Moe,
    Score,
    Segment,
)
from dsjax.data.loader import batches
from dsjax.data.stdlib import Split, python_source
from dsjax.data.text import read_texts, tokenize
from dsjax.data.tokenizer import Tokenizer, train_bpe
from dsjax.data.windows import Windows
from dsjax.decode.generate import generate
from dsjax.errors import UserError
from dsjax.eval.perplexity import evaluate
from dsjax.models import small_init_std
from dsjax.nn.transformer import Transformer
from dsjax.sharding import make_mesh
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.schedule import Cosine, Progress
from dsjax.train.step import Metrics, init_state, make_step, rates, write_back

PROMPT = "def "


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and rates found to do well in about 3 minutes of 2 CPU cores."""

    d_model: int = 128
    moe_layers: int = 2
    vocab_size: int = 2048
    length: int = 256
    batch_size: int = 4
    steps: int = 750
    warmup: int = 60
    peak_rate: float = 4e-3
    max_seconds: float = 200.0  # of training: a slower machine stops early, and says so
    objective: Objective = Objective(sequence_balance=1e-4, bias_speed=5e-3, mtp=0.3)


def model_config(settings: Settings) -> ModelConfig:
    """V3's architecture: a dense layer, MoE layers, and the MTP module."""
    d_model = settings.d_model
    moe = Moe(
        num_experts=8,
        num_shared=1,
        top_k=2,
        width=3 * d_model // 4,
        score=Score.SIGMOID,
        groups=Groups(count=4, kept=2, score=GroupScore.TOP2_SUM),
        renormalize=True,
        selection_bias=True,
    )
    attention = Mla(
        num_heads=4,
        kv_rank=d_model // 2,
        q_rank=3 * d_model // 4,
        nope_dim=32,
        rope_dim=16,
        value_dim=32,
    )
    return ModelConfig(
        name="quickstart",
        vocab_size=settings.vocab_size,
        d_model=d_model,
        attention=attention,
        segments=(
            Segment(count=1, feed_forward=Dense(width=3 * d_model)),
            Segment(count=settings.moe_layers, feed_forward=moe),
        ),
        max_length=2048,
        mtp=True,
        init_std=small_init_std(d_model),
    )


@dataclass(frozen=True, kw_only=True)
class History:
    """What training left behind, a row for each step; loads count choices [L, E]."""

    loss: np.ndarray
    mtp_loss: np.ndarray
    max_violation: np.ndarray  # [steps, L]
    load: np.ndarray  # [steps, L, E]
    tokens_per_step: int
    seconds: float


def quickstart(
    out: str | Path = "quickstart",
    *,
    steps: int | None = None,
    seed: int = 0,
    force: bool = False,
    split: Split | None = None,
    settings: Settings | None = None,
) -> dict:
    """Runs everything and returns what results.json holds.

    Work goes on in `out`.partial; `out` appears when all is done. Raises UserError when
    `out` exists and `force` does not allow to replace it.
    """
    began = time.monotonic()
    out = Path(out)
    work = _start(out, force=force)
    settings = Settings() if settings is None else settings
    mesh = one_row_per_core(settings.batch_size)
    split = python_source() if split is None else split
    tokenizer, windows = prepare(split, settings, seed=seed)
    model = Transformer.create(model_config(settings), seed=seed, mesh=mesh)
    model.tokenizer = tokenizer
    history = train(model, windows, settings=settings, steps=steps)

    print("saving, exporting to Hugging Face's form, converting back")
    save(model, work / "checkpoint")
    export(work / "checkpoint", work / "huggingface")
    convert(work / "huggingface", work / "converted")
    returned = load(work / "converted", mesh=mesh)
    results = {
        "parameters": _parameter_count(model),
        "steps": len(history.loss),
        "train_tokens": len(history.loss) * history.tokens_per_step,
        "train_seconds": round(history.seconds, 1),
        "train_loss_nats": float(history.loss[-50:].mean()),
        "max_violation": [
            round(float(value), 3) for value in history.max_violation[-50:].mean(axis=0)
        ],
        "round_trip_max_difference": _difference(model, returned, windows),
        "held_out": score(returned, split.held_out, length=settings.length),
        "sample": sample(returned, seed=seed),
    }
    figure(history, work / "figure.png")
    results["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (work / "results.json").write_text(text + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    work.rename(out)
    print(report(results, out))
    return results


def one_row_per_core(batch_size: int) -> jax.sharding.Mesh:
    """A mesh that shares a batch among all devices, and CPU cores as devices.

    XLA runs a small model's step mostly on one core; two devices of one core each make
    it 1.8 times as fast. JAX must not have been used yet: else its devices stay.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(batch_size, os.cpu_count() or 1)
        with contextlib.suppress(RuntimeError):  # JAX is already running
            jax.config.update("jax_num_cpu_devices", cores)
    devices = range(min(batch_size, jax.device_count()), 0, -1)
    return make_mesh(data=next(n for n in devices if batch_size % n == 0))


def _start(out: Path, *, force: bool) -> Path:
    if out.exists() and not force:
        raise UserError(
            f"{out} exists: --force replaces it, --out DIR writes elsewhere"
        )
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def prepare(
    split: Split, settings: Settings, *, seed: int = 0
) -> tuple[Tokenizer, Windows]:
    """A byte-level BPE trained on the training files, and those files in windows."""
    texts = list(read_texts(split.train))
    print(
        f"{len(split.train)} files of the standard library to train on, "
        f"{len(split.held_out)} held out; training a BPE of {settings.vocab_size}"
    )
    tokenizer = train_bpe(texts, vocab_size=settings.vocab_size)
    corpus = tokenize(texts, tokenizer)
    return tokenizer, Windows(corpus, length=settings.length, seed=seed)


def train(
    model: Transformer,
    source: Windows,
    *,
    settings: Settings,
    steps: int | None = None,
) -> History:
    """Trains `model` in place, with a progress bar; stops early at `max_seconds`."""
    steps = settings.steps if steps is None else steps
    warmup = min(settings.warmup, steps)
    schedule = Cosine(peak=settings.peak_rate, warmup=warmup, final=0.02)
    state = init_state(model, AdamW())
    step = make_step(model, optimizer=AdamW(), objective=settings.objective)
    data = batches(source, batch_size=settings.batch_size)
    tokens = settings.batch_size * settings.length
    history: list[Metrics] = []
    began = time.monotonic()
    with tqdm(total=steps, desc="training (first step compiles)", unit="step") as bar:
        while len(history) < steps:
            done = Progress(
                step=len(history),
                tokens=len(history) * tokens,
                total_tokens=steps * tokens,
            )
            batch = {name: rows[None] for name, rows in next(data).items()}
            state, metrics = step(
                state, batch, rates(schedule, settings.objective, done)
            )
            history.append(jax.device_get(metrics))
            if len(history) == 1:
                bar.set_description("training")
                first = time.monotonic()
            now = time.monotonic()
            speed = tokens * (len(history) - 1) / max(now - first, 1e-9)
            bar.set_postfix_str(
                f"loss {history[-1].loss:.3f}, {speed:.0f} tokens/s", refresh=False
            )
            bar.update()
            if now - began > settings.max_seconds:
                bar.write(f"{settings.max_seconds:.0f} s are over: stopping early")
                break
    write_back(model, state)
    return History(
        loss=np.array([m.loss for m in history]),
        mtp_loss=np.array([m.mtp_loss for m in history]),
        max_violation=np.stack([m.max_violation_L for m in history]),
        load=np.stack([m.load_LE for m in history]),
        tokens_per_step=tokens,
        seconds=time.monotonic() - began,
    )


def score(model: Transformer, files: Sequence[Path], *, length: int) -> dict:
    """Held-out bits a byte, beside lzma on the same files: joined, and one by one."""
    texts = list(read_texts(files))
    perplexity = evaluate(model, texts, length=length)
    contents = [text.encode() for text in texts]
    total = sum(map(len, contents))
    return {
        "files": len(contents),
        "bytes": total,
        "nats_per_token": perplexity.nats_per_token,
        "bits_per_byte": perplexity.bits_per_byte,
        "lzma_bits_per_byte": 8 * _lzma(b"".join(contents)) / total,
        "lzma_each_file_bits_per_byte": 8 * sum(map(_lzma, contents)) / total,
    }


def _lzma(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def sample(model: Transformer, *, seed: int = 0, max_new_tokens: int = 128) -> str:
    """The prompt and how the model goes on."""
    (text,) = generate(
        model,
        [PROMPT],
        max_new_tokens=max_new_tokens,
        temperature=0.7,
        top_p=0.95,
        seed=seed,
    )
    return PROMPT + text


def _difference(one: Transformer, other: Transformer, source: Windows) -> float:
    tokens = np.stack([source[index]["tokens"] for index in range(2)])[:, :-1]
    return float(np.abs(np.asarray(one(tokens)) - np.asarray(other(tokens))).max())


def _parameter_count(model: Transformer) -> int:
    from dsjax.nn.weights import flat

    return sum(variable[...].size for variable in flat(model).values())


def figure(history: History, path: Path) -> None:
    """Loss over the steps, and how often each expert of each MoE layer was chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(picture)
    left, right = picture.subplots(1, 2)
    for values, label in [(history.loss, "next token"), (history.mtp_loss, "MTP")]:
        left.plot(values, alpha=0.25, color=(line := f"C{len(left.lines) // 2}"))
        left.plot(_smooth(values), color=line, label=label)
    left.set(xlabel="step", ylabel="loss (nats a token)", title="Training loss")
    left.legend()
    load_LE = history.load[-50:].mean(axis=0)
    load_LE /= load_LE.mean(axis=1, keepdims=True)
    image = right.imshow(load_LE, vmin=0, vmax=2, cmap="coolwarm", aspect="auto")
    names = [f"MoE {n + 1}" for n in range(len(load_LE) - 1)] + ["MTP"]
    right.set_yticks(range(len(names)), names)
    right.set(xlabel="expert", title="Expert load / mean, last 50 steps")
    picture.colorbar(image, ax=right)
    picture.savefig(path, dpi=120)


def _smooth(values: np.ndarray, decay: float = 0.95) -> np.ndarray:
    """An exponential moving average, without its bias towards 0 at the start."""
    weights = decay ** np.arange(min(len(values), 100))
    total = np.convolve(values, weights)[: len(values)]
    return total / np.convolve(np.ones_like(values), weights)[: len(values)]


def report(results: dict, out: Path) -> str:
    """The results in a few lines."""
    held = results["held_out"]
    return f"""
{results["parameters"] / 1e6:.1f}M parameters, {results["steps"]} steps, \
{results["train_tokens"] / 1e6:.2f}M tokens, {results["train_seconds"]:.0f} s of training
held-out files     {held["files"]} files, {held["bytes"]:,} bytes
bits a byte        {held["bits_per_byte"]:.3f}, file by file
    lzma           {held["lzma_each_file_bits_per_byte"]:.3f} file by file, \
{held["lzma_bits_per_byte"]:.3f} of all files joined
expert load        max / mean - 1 in each MoE layer, MTP's last: \
{", ".join(f"{value:.2f}" for value in results["max_violation"])}
round trip         Orbax -> Hugging Face -> Orbax: largest difference of logits \
{results["round_trip_max_difference"]:g}
sample
{results["sample"]}

{results["seconds"]:.0f} s in all. In {out}/: checkpoint/ (Orbax), huggingface/, \
converted/, figure.png, results.json
Next: dsjax generate {out}/huggingface --prompt "class "
"""
