"""What `import dsjax` offers: load a model with its tokenizer, use it, save it."""

from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dsjax import checkpoint
from dsjax.data.tokenizer import Tokenizer
from dsjax.decode.eplb import Redundant
from dsjax.nn.transformer import Transformer
from dsjax.sharding import Sharding


def load(
    path: epath.PathLike,
    *,
    dtype: DTypeLike | None = "float32",
    mesh: Mesh | None = None,
    sharding: Sharding | None = None,
    redundant: Redundant | None = None,
    progress: bool = False,
) -> Transformer:
    """A model from a Hugging Face or a dsjax (Orbax) directory, local or gs://.

    dtype: of weights and computation; None keeps the stored one. mesh: where to place
    it (`dsjax.make_mesh`), by default one device. `model(tokens)` gives logits; the
    directory's tokenizer, if any, is `model.tokenizer`. redundant: loads by which hot
    experts get replicas on other devices of the expert axis, for inference (V3, section
    3.4); the results are the same.

    Raises UserError, one line, for anything wrong with the checkpoint.
    """
    model = checkpoint.load(
        path,
        dtype=dtype,
        mesh=mesh,
        sharding=sharding,
        place=redundant and redundant.place,
        progress=progress,
    )
    model.tokenizer = Tokenizer.load(path)
    return model


def save(model: Transformer, path: epath.PathLike) -> None:
    """Writes the model and its tokenizer as a dsjax (Orbax) directory.

    Raises UserError when `path` exists.
    """
    checkpoint.save(model, path)
