"""The one model of the family: embedding, segments of equal layers, norm, head.

Letters: B batch, T length, D model, V vocabulary.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import ModelConfig, Segment
from dsjax.nn import cache as kv
from dsjax.nn.block import Block
from dsjax.nn.dropping import Dropping
from dsjax.nn.embedding import look_up
from dsjax.nn.experts import of_experts
from dsjax.nn.mtp import MultiTokenPrediction
from dsjax.nn.norm import RmsNorm
from dsjax.nn.options import FLOAT32, Build, Precision, Remat, layer_input
from dsjax.nn.replicas import Slots
from dsjax.nn.router import Routing
from dsjax.nn.weights import batch_axes, facing, flat, shardings, use
from dsjax.sharding import Sharding, axes_of, fit, make_mesh

Given = Array | np.ndarray  # what callers may hand in


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Output:
    """What the layers leave behind.

    `hidden_BTD` is the residual stream before the final norm; `routing` has one entry
    a segment, stacked over its layers, None where the segment is dense.
    """

    hidden_BTD: Float[Array, "B T D"]
    routing: tuple[Routing | None, ...]
    cache: kv.Cache | None


class Transformer(nnx.Module):
    """A decoder of any published architecture.

    `precision` says which dtypes weights rest and compute in, `remat` what the backward
    pass computes again, `unroll` how many layers are one body of the loop over layers
    (more are quicker, take longer to compile and keep more), `slots` that routed experts
    may lie on the devices more than once (`dsjax.load` places them). Everything but
    `__call__` runs under `jax.set_mesh(model.mesh)`, best inside a jit.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        mesh: Mesh | None = None,
        sharding: Sharding | None = None,
        precision: Precision = FLOAT32,
        remat: Remat = Remat.NONE,
        unroll: int = 1,
        slots: Slots | None = None,
    ):
        self.config, self.precision = config, precision
        self.remat, self.unroll = remat, unroll
        self.slots = slots
        self.mesh = make_mesh() if mesh is None else mesh
        self.sharding = sharding = Sharding() if sharding is None else sharding
        self.tokenizer = None
        V, D = config.vocab_size, config.d_model
        build = Build(
            std=config.init_std,
            sharding=sharding,
            precision=precision,
            rngs=rngs,
            slots=slots,
        )
        self.embedding_VD = build.weight((V, D), sharding.embedding_VD)
        self.segments = nnx.List(
            _stack(config, segment, replace(build, looped=segment.count > unroll))
            for segment in config.segments
        )
        self.final_norm = RmsNorm(D, eps=config.norm_eps, build=build)
        if not config.tied_embeddings:
            self.head_VD = build.weight((V, D), sharding.head_VD)
        if config.mtp:
            # What it computes again must not be found at hand: as of a layer in a loop.
            once = replace(build, slots=None, looped=True)
            self.mtp = MultiTokenPrediction(config, build=once, remat=remat)

    @property
    def dtype(self) -> np.dtype:
        """What activations are computed in."""
        return self.precision.compute

    @classmethod
    def create(cls, config: ModelConfig, *, seed: int = 0, **options) -> "Transformer":
        """A freshly initialised model, each weight made where it rests on the mesh."""
        abstract = cls.abstract(config, **options)
        graph, state = nnx.split(abstract)
        places = jax.tree.map(lambda leaf: leaf.sharding, state)

        def initialise() -> nnx.State:
            return nnx.state(cls(config, rngs=nnx.Rngs(seed), **options))

        return nnx.merge(graph, jax.jit(initialise, out_shardings=places)())

    @classmethod
    def abstract(cls, config: ModelConfig, **options) -> "Transformer":
        """The model without memory: ShapeDtypeStructs that carry their sharding."""
        model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **options))
        places = shardings(model, model.mesh)
        for path, variable in flat(model).items():
            shape = jax.ShapeDtypeStruct(
                variable.shape, variable.dtype, sharding=places[path]
            )
            variable.set_value(shape)
        return model

    def __call__(self, tokens_BT: Int[Given, "B T"]) -> Float[Array, "B T V"]:
        """Float32 logits of the next token at every position; compiled once a shape."""
        graph, state = nnx.split(self)
        with jax.set_mesh(self.mesh):
            return _compiled_logits(graph, state, jnp.asarray(tokens_BT))

    def forward(
        self,
        tokens_BT: Int[Given, "B T"],
        *,
        positions_BT: Int[Given, "B T"] | None = None,
        segments_BT: Int[Given, "B T"] | None = None,
        dropping: Dropping | None = None,
        rng: Array | None = None,
    ) -> Output:
        """All layers over whole sequences; documents in `segments` do not mix.

        With `dropping` (training alone), experts leave out what is over their capacity;
        the key `rng` draws the sequences that are spared, the same ones in every layer.
        """
        tokens_BT = self.place(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])
        context = kv.Context(
            positions_BT=self._like(tokens_BT, positions_BT),
            segments_BT=None if segments_BT is None else self.place(segments_BT),
            protected_B=self._protected(tokens_BT, dropping, rng),
            dropping=dropping,
        )
        return self._layers(tokens_BT, context, None)

    def _protected(
        self, tokens_BT: Array, dropping: Dropping | None, rng: Array | None
    ) -> Bool[Array, " B"] | None:
        """The sequences that are never dropped from."""
        if dropping is None:
            return None
        if rng is None:
            raise ValueError(f"{dropping=} needs an rng key")
        rows = jax.random.bernoulli(rng, dropping.protected, tokens_BT.shape[:1])
        return reshard(rows, P(batch_axes(tokens_BT)))

    def prefill(
        self,
        tokens_BT: Int[Given, "B T"],
        lengths_B: Int[Given, " B"],
        cache: kv.Cache,
    ) -> Output:
        """Reads prompts, padded on the right to T, into an empty cache."""
        tokens_BT = self.place(tokens_BT)
        positions_BT = self._like(tokens_BT, jnp.arange(tokens_BT.shape[1]))
        context = kv.Context(positions_BT=positions_BT, phase=kv.Phase.PREFILL)
        output = self._layers(tokens_BT, context, cache)
        lengths_B = reshard(lengths_B, P(batch_axes(tokens_BT)))
        return replace(output, cache=replace(output.cache, lengths_B=lengths_B))

    def decode(self, tokens_BT: Int[Given, "B T"], cache: kv.Cache) -> Output:
        """Appends T tokens to every row of the cache; sees all that is kept before."""
        tokens_BT = self.place(tokens_BT)
        length = tokens_BT.shape[1]
        positions_BT = cache.lengths_B[:, None] + jnp.arange(length)
        context = kv.Context(positions_BT=positions_BT, phase=kv.Phase.DECODE)
        output = self._layers(tokens_BT, context, cache)
        lengths_B = cache.lengths_B + length
        return replace(output, cache=replace(output.cache, lengths_B=lengths_B))

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and head, float32."""
        return self.head(self.final_norm(hidden_BTD))

    def predict_further(
        self,
        hidden_BTD: Float[Array, "B T D"],
        next_BT: Int[Given, "B T"],
        *,
        segments_BT: Int[Given, "B T"] | None = None,
        dropping: Dropping | None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """MTP's state after its own norm, and its routing; `next` follows each token.

        The same `rng` as in `forward` spares the same sequences.
        """
        next_BT = self.place(next_BT)
        context = kv.Context(
            positions_BT=self._like(next_BT, jnp.arange(next_BT.shape[1])),
            segments_BT=None if segments_BT is None else self.place(segments_BT),
            protected_B=self._protected(next_BT, dropping, rng),
            dropping=dropping,
        )
        return self.mtp(self.final_norm(hidden_BTD), self.embed(next_BT), context)

    def mtp_logits(
        self, hidden_BTD: Float[Array, "B T D"], next_BT: Int[Given, "B T"]
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the token after `next`, by the MTP module."""
        return self.head(self.predict_further(hidden_BTD, next_BT)[0])

    def embed(self, tokens_BT: Int[Given, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings in the compute dtype."""
        return look_up(self.embedding_VD[...], tokens_BT, self.dtype)

    def place(self, rows_BT: Int[Given, "B T"]) -> Int[Array, "B T"]:
        """Rows cut over the mesh's batch axes, as far as their number allows."""
        return reshard(
            jnp.asarray(rows_BT), fit(self.sharding.tokens_BT, rows_BT.shape, self.mesh)
        )

    def _like(self, tokens_BT: Array, positions: Array) -> Array:
        return self.place(jnp.broadcast_to(positions, tokens_BT.shape))

    def head(self, normed_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of a state that has its norm behind it."""
        head_VD = self.head_weight()
        logits_BTV = jnp.einsum(
            "BTD,VD->BTV",
            facing(normed_BTD, head_VD),
            head_VD,
            preferred_element_type=jnp.float32,
        )
        vocabulary = tuple(
            axis
            for axis in axes_of(jax.typeof(head_VD).sharding.spec[0])
            if axis not in axes_of(batch_axes(normed_BTD))
        )
        return reshard(logits_BTV, P(batch_axes(normed_BTD), None, vocabulary or None))

    def head_weight(self) -> Float[Array, "V D"]:
        """The head's matrix in the compute dtype, gathered but for `tensor`, which cuts
        the vocabulary."""
        tied = self.config.tied_embeddings
        return use(self.embedding_VD if tied else self.head_VD, self.dtype)

    def _layers(
        self, tokens_BT: Array, context: kv.Context, cache: kv.Cache | None
    ) -> Output:
        x_BTD = self.embed(tokens_BT)
        caches = [None] * len(self.segments) if cache is None else list(cache.segments)
        routings = []
        for number, segment in enumerate(self.segments):
            x_BTD, caches[number], routing = _scan(
                segment, x_BTD, context, caches[number], self.remat, self.unroll
            )
            routings.append(routing)
        if cache is not None:
            cache = replace(cache, segments=tuple(caches))
        return Output(hidden_BTD=x_BTD, routing=tuple(routings), cache=cache)


def _stack(config: ModelConfig, segment: Segment, build: Build) -> Block:
    """`segment.count` layers as one Block whose weights have a leading layer axis."""

    @nnx.split_rngs(splits=segment.count)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Block:
        each = replace(build, rngs=rngs)
        return Block(config, segment.feed_forward, build=each)

    return make(build.rngs)


def _scan(
    stack: Block,
    x_BTD: Array,
    context: kv.Context,
    cache: kv.LayerCache | None,
    remat: Remat,
    unroll: int,
) -> tuple[Array, kv.LayerCache | None, Routing | None]:
    """Runs a stack's layers one after the other, `unroll` of them a compiled loop body.

    The cache is carried, not scanned over, so that layers write into one buffer. With
    one, no gradient is to come: experts' weights are not scanned over either, which would
    cut each layer's out of the stack, but read where they lie.
    """
    whole = of_experts if cache is not None else nnx.Nothing()
    graph, experts, state = nnx.split(stack, whole, ...)
    count = jax.tree.leaves(state)[0].shape[0]

    def layer(carry, inputs):
        x_BTD, cache = carry
        weights, index = inputs
        block = nnx.merge(graph, experts, weights)
        x_BTD, cache, routing = block(layer_input(x_BTD), context, cache, index)
        return (x_BTD, cache), routing

    inputs = state, jnp.arange(count)
    (x_BTD, cache), routing = jax.lax.scan(
        remat.wrap(layer), (x_BTD, cache), inputs, unroll=unroll
    )
    return x_BTD, cache, routing


@jax.jit(static_argnums=0)
def _compiled_logits(graph: nnx.GraphDef, state: nnx.State, tokens_BT: Array) -> Array:
    model = nnx.merge(graph, state)
    return model.logits(model.forward(tokens_BT).hidden_BTD)
