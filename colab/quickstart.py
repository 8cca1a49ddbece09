# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A small V3, by hand
#
# What `dsjax quickstart` does, step by step: text, tokenizer, model, training with
# experts balanced by bias, Orbax and Hugging Face checkpoints, held-out bits a byte.
# It runs on a CPU; on Colab choose a T4 or a TPU. On a T4 the kernels written for newer
# chips step aside for plain JAX, and say so in one line.

# %% [markdown]
# **Install.** Nothing happens where dsjax is already installed. Elsewhere (Colab) put a
# clone of the repository beside this notebook. Colab's jax belongs to its accelerator:
# the constraints keep pip from replacing it.

# %%
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("dsjax") is None:
    clones = [
        d for d in (Path(), Path(".."), Path("dsjax")) if (d / "setup.py").exists()
    ]
    if not clones:
        raise SystemExit("no clone of dsjax here: git clone it beside this notebook")
    keep = [d for d in ("jax", "jaxlib") if importlib.util.find_spec(d)]
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in keep]
    Path("constraints.txt").write_text("\n".join(pins))
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "constraints.txt"]
    subprocess.run([*pip, str(clones[0].resolve())], check=True)

# %%
import lzma
import os
import shutil

import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm.auto import tqdm

import dsjax
from dsjax.checkpoint import convert, export
from dsjax.config import Dense, Mla, ModelConfig, Moe, Score, Segment
from dsjax.data.loader import batches
from dsjax.data.stdlib import python_source
from dsjax.data.text import read_texts, tokenize
from dsjax.data.tokenizer import train_bpe
from dsjax.data.windows import Windows
from dsjax.eval.perplexity import evaluate
from dsjax.models import small_init_std
from dsjax.nn.transformer import Transformer
from dsjax.train.objective import Objective
from dsjax.train.optimizer import AdamW
from dsjax.train.schedule import Cosine, Progress
from dsjax.train.step import init_state, make_step, rates, write_back

STEPS = int(os.environ.get("DSJAX_NOTEBOOK_STEPS", "400"))
print(jax.__version__, jax.devices())

# %% [markdown]
# **Data.** The Python standard library's own source, whole files held out. A byte-level
# BPE is trained on the training files; they are packed end to end and cut into windows,
# which Grain shuffles.

# %%
split = python_source()
texts = list(read_texts(split.train))
tokenizer = train_bpe(texts, vocab_size=2048)
windows = Windows(tokenize(texts, tokenizer), length=256)
data = batches(windows, batch_size=4)
print(
    len(split.train),
    "files,",
    windows.tokens_per_epoch,
    "tokens;",
    len(split.held_out),
    "held out",
)
print(tokenizer.decode(next(data)["tokens"][0, :60]))

# %% [markdown]
# **Model.** One frozen config says it all: latent attention, a dense layer, then two
# layers of 8 routed experts and a shared one, and V3's multi-token prediction module.

# %%
d_model = 128
config = ModelConfig(
    name="by_hand",
    vocab_size=2048,
    d_model=d_model,
    attention=Mla(
        num_heads=4, kv_rank=64, q_rank=96, nope_dim=32, rope_dim=16, value_dim=32
    ),
    segments=(
        Segment(count=1, feed_forward=Dense(width=384)),
        Segment(
            count=2,
            feed_forward=Moe(
                num_experts=8,
                num_shared=1,
                top_k=2,
                width=96,
                score=Score.SIGMOID,
                renormalize=True,
                selection_bias=True,
            ),
        ),
    ),
    max_length=1024,
    mtp=True,
    init_std=small_init_std(d_model),
)
model = Transformer.create(config, seed=0)
model.tokenizer = tokenizer
tokens = next(data)["tokens"][:, :-1]
print(model(tokens).shape, "logits of", tokens.shape, "tokens")

# %% [markdown]
# **Train.** A step is a pure function: next-token and MTP loss, gradients, AdamW, and
# the routers' biases moved against the load, without a gradient.

# %%
optimizer = AdamW()
objective = Objective(sequence_balance=1e-4, bias_speed=1e-3, mtp=0.3)
schedule = Cosine(peak=5e-3, warmup=min(50, STEPS), final=0.02)
state = init_state(model, optimizer)
step = make_step(model, optimizer=optimizer, objective=objective)
history = []
for number in (bar := tqdm(range(STEPS))):
    done = Progress(step=number, tokens=number * 1024, total_tokens=STEPS * 1024)
    batch = {"tokens": next(data)["tokens"][None]}  # one microbatch of 4 x 256 tokens
    state, metrics = step(state, batch, rates(schedule, objective, done))
    history.append(jax.device_get(metrics))
    bar.set_postfix(loss=f"{metrics.loss:.3f}", mtp=f"{metrics.mtp_loss:.3f}")
write_back(model, state)

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
left.plot([m.loss for m in history], label="next token")
left.plot([m.mtp_loss for m in history], label="MTP")
left.set(xlabel="step", ylabel="loss (nats a token)")
left.legend()
load = np.mean([m.load_LE for m in history[-50:]], axis=0)
image = right.imshow(
    load / load.mean(axis=1, keepdims=True), vmin=0, vmax=2, cmap="coolwarm"
)
right.set(xlabel="expert", yticks=range(3), yticklabels=["MoE 1", "MoE 2", "MTP"])
_ = right.set_title("expert load / mean")
# %% [markdown]
# **Save, export, convert back.** Orbax on disk, then the tensors and names that
# transformers and vLLM read, then Orbax again: the logits stay the same to the bit.

# %%
for path in ("saved", "huggingface", "returned"):
    shutil.rmtree(path, ignore_errors=True)
dsjax.save(model, "saved")
export("saved", "huggingface")
convert("huggingface", "returned")
print(sorted(path.name for path in Path("huggingface").iterdir()))

# %%
returned = dsjax.load("returned")
difference = np.abs(np.asarray(model(tokens)) - np.asarray(returned(tokens))).max()
print("largest difference of logits:", difference)
assert difference == 0

# %% [markdown]
# **Evaluate** on files that training never saw, beside `lzma` on the same bytes.

# %%
held_out = list(read_texts(split.held_out[:4]))
content = "".join(held_out).encode()
compressed = len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
perplexity = evaluate(returned, held_out, length=256)
print(
    f"{perplexity.bits_per_byte:.3f} bits a byte; lzma {8 * compressed / len(content):.3f}"
)

# %% [markdown]
# **Generate.** The cache keeps 80 values a token and layer, whatever the number of heads.

# %%
(text,) = dsjax.generate(
    returned, ["def "], max_new_tokens=64, temperature=0.7, top_p=0.95, seed=0
)
print("def " + text)
