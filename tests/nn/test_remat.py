"""What the backward pass keeps under each choice of remat, and in which precision."""

import functools
from collections import Counter
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend.core import jaxprs_in_params

from dsjax import models
from dsjax.config import Dense, Gqa, Mla, ModelConfig, Moe, Score, Segment
from dsjax.nn.options import FLOAT32, Precision, Remat
from dsjax.nn.router import Routing
from dsjax.nn.transformer import Transformer
from dsjax.sharding import make_mesh
from pallas_kernels.flash_attention import cudnn
from tests.support import fill

MOE = Moe(num_experts=6, num_shared=1, top_k=2, width=48, score=Score.SIGMOID)
CONFIG = ModelConfig(
    name="no two sizes alike",
    vocab_size=64,
    d_model=40,
    attention=Mla(
        num_heads=5, kv_rank=14, q_rank=22, nope_dim=12, rope_dim=4, value_dim=9
    ),
    segments=(Segment(count=3, feed_forward=MOE),),
    max_length=64,
)
B, T = 2, 32
ROWS = B * T * MOE.top_k
ROUTING = len(fields(Routing)) - 1  # figures that every layer gives; none is dropped


def gradient(config, remat, precision, *, length=T):
    """A jitted gradient of the layers alone, and the shapes to call it with."""
    model = Transformer.abstract(config, remat=remat, precision=precision)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def of(params, rest, tokens):
        hidden_BTD = nnx.merge(graph, params, rest).forward(tokens).hidden_BTD
        return jnp.square(hidden_BTD.astype(jnp.float32)).mean()

    tokens = jax.ShapeDtypeStruct((B, length), jnp.int32)
    return model.mesh, of, (params, rest, tokens)


def loops(jaxpr):
    """The outermost scans of a jaxpr, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        else:
            for part in jaxprs_in_params(equation.params):
                yield from loops(part)


@functools.cache
def kept(config, remat, precision):
    """dtype and shape of all that the forward loop stacks for the backward loop, but for
    what it stacks anyway.
    """
    mesh, of, arguments = gradient(config, remat, precision)
    with jax.set_mesh(mesh):
        loop, *_ = loops(of.trace(*arguments).jaxpr.jaxpr)
    layers = config.segments[0].count  # no other first axis is as long
    body = loop.params["jaxpr"]
    pairs = zip(loop.outvars, getattr(body, "jaxpr", body).outvars)
    # By what they are of: JAX before 0.11 stacks twice what is both given out and kept.
    stacked = {of: x.aval for x, of in pairs if x.aval.shape[:1] == (layers,)}
    layer = [(str(x.dtype), x.shape[1:]) for x in stacked.values()]
    return Counter(layer[ROUTING:])


BF16, F32, I32 = "bfloat16", "float32", "int32"
STREAM = (BF16, (B, T, 40))
V3 = Counter(  # the chosen experts are among the routing's figures
    {
        STREAM: 2,  # before attention, before the feed-forward: their norms are redone
        (BF16, (B, T, 22)): 1,  # query latent, before its norm
        (BF16, (B, T, 14 + 4)): 1,  # key-value latent and rotary key, before theirs
        (BF16, (B, T, 5, 1, 9)): 1,  # what attention gives
        (F32, (B, T, 5, 1)): 1,  # its log-sum-exp
        (F32, (B, T, 6)): 1,  # router logits
        (I32, (6,)): 1,  # how many rows each expert has
        (I32, (ROWS,)): 1,  # which choice each row is
        (I32, (ROWS // 2, 2)): 1,  # where each choice's row is
        (BF16, (ROWS, 40)): 1,  # rows into the experts
        (BF16, (ROWS, 48)): 2,  # gate and up, not their product
        (BF16, (B, T, 48)): 2,  # the same of the shared expert
    }
)


def test_v3_keeps_all_but_norms_up_projections_and_swiglu_products():
    assert kept(CONFIG, Remat.V3, Precision()) == V3


def test_v3_keeps_the_same_of_cudnns_attention(monkeypatch):
    """Result and log-sum-exp, in our form. Traced alone, as if on a Hopper GPU."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    asked = "check_compute_capability"
    monkeypatch.setattr(fused_attention_stablehlo, asked, lambda capability: True)
    monkeypatch.setattr(cudnn, "available", lambda: True)
    wide = replace(
        CONFIG, attention=replace(CONFIG.attention, nope_dim=20, value_dim=16)
    )
    ours = {(BF16, (B, T, 5, 1, 9)): 1}
    theirs = {(BF16, (B, T, 5, 1, 16)): 1}
    assert kept(wide, Remat.V3, Precision()) == V3 - Counter(ours) + Counter(theirs)


def test_full_keeps_each_layers_input():
    assert kept(CONFIG, Remat.FULL, Precision()) == {STREAM: 1}


@pytest.mark.parametrize("remat", list(Remat))
def test_no_copy_of_a_weight_is_kept(remat):
    """Cast or gathered, it would stay for every layer: a second model, and not cut."""
    found = kept(CONFIG, remat, Precision())
    of_batch = (B, B * T, ROWS)
    batches = [shape for _, shape in found if shape[0] in of_batch]
    others = [shape for _, shape in found if shape[0] not in of_batch]
    assert batches
    # Norm scales, broadcast to [1, 1, size], are all there is without remat.
    assert all(np.prod(shape) == max(shape) for shape in others), others


def test_nothing_of_scores_size_is_kept():
    """Attention's weights would be quadratic in the length."""
    gqa = Gqa(num_heads=6, num_kv_heads=3, head_dim=8)
    for config in (CONFIG, replace(CONFIG, attention=gqa)):
        found = kept(config, Remat.NONE, Precision())
        assert not [shape for _, shape in found if shape.count(T) > 1]


def test_memory_falls():
    """Compiled temporary bytes of the gradient, with layers enough to lead."""
    segment = Segment(count=24, feed_forward=Dense(width=96))
    config = replace(CONFIG, segments=(segment,))

    def size(remat):
        mesh, of, arguments = gradient(config, remat, FLOAT32, length=256)
        with jax.set_mesh(mesh):
            compiled = of.lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, v3, full = (size(remat) for remat in (Remat.NONE, Remat.V3, Remat.FULL))
    assert none > 1.5 * v3 and v3 > 1.3 * full, (none, v3, full)


SMALL = models.shrink(models.v3(), vocab_size=128, width=16)
SMALL = replace(SMALL, segments=SMALL.segments[1:])
TOKENS = np.random.default_rng(1).integers(0, 128, (8, 16), dtype=np.int32)


def value_and_gradients(remat, mtp, **mesh):
    config = replace(SMALL, mtp=mtp)
    model = Transformer.abstract(config, remat=remat, mesh=make_mesh(**mesh))
    fill(model, std=0.1)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def value(params):
        model = nnx.merge(graph, params, rest)
        hidden_BTD = model.forward(TOKENS).hidden_BTD
        normed = [model.final_norm(hidden_BTD)]
        if mtp:
            normed.append(model.predict_further(hidden_BTD, TOKENS)[0])
        return sum(jnp.square(model.head(x)).mean() for x in normed)

    with jax.set_mesh(model.mesh):
        result = jax.jit(jax.value_and_grad(value))(params)
    return jax.tree.map(np.asarray, (result[0], nnx.to_pure_dict(result[1])))


@pytest.mark.parametrize(
    ("remat", "mtp"),
    [
        (Remat.V3, False),
        pytest.param(Remat.V3, True, marks=pytest.mark.slow),
        pytest.param(Remat.FULL, True, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_the_same_and_on_every_mesh(remat, mtp):
    """On fsdp, expert and tensor axes against no remat on one device."""
    value, expected = value_and_gradients(Remat.NONE, mtp)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert scale > 0.01
    again, found = value_and_gradients(remat, mtp, fsdp=2, expert=2, tensor=2)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale),
        found,
        expected,
    )
