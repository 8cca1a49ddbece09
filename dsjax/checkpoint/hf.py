"""A published checkpoint directory as a source of our arrays, read region by region."""

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from dsjax.checkpoint import fp8, hf_config, table
from dsjax.checkpoint.config_json import read_json
from dsjax.checkpoint.safetensors import NAMES, Stored, open_directory
from dsjax.checkpoint.streaming import FLOATS, Region, cast, size
from dsjax.config import ModelConfig
from dsjax.errors import UserError
from dsjax.nn.transformer import Transformer
from dsjax.nn.weights import flat

log = logging.getLogger("dsjax")
BF16 = np.dtype(ml_dtypes.bfloat16)
IGNORED = ".rotary_emb.inv_freq"  # a buffer that old checkpoints stored
COMPARED_PIECES, PIECE_BYTES = 64, 1 << 16


@dataclass(frozen=True, kw_only=True)
class HfSource:
    """A validated checkpoint directory.

    shapes, dtypes: our arrays by dotted path; quantised weights count as bfloat16.
    """

    directory: epath.Path
    published: dict[str, Any]
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    boxes: dict[str, dict[tuple[int, ...], table.Tensor]]
    stored: dict[str, Stored]
    block: tuple[int, int] | None

    @classmethod
    def open(cls, directory: epath.Path) -> "HfSource":
        """Reads config and headers; checks names, shapes, dtypes, scales and copies.

        Raises UserError for whatever does not fit, before any weight is read.
        """
        published = read_json(directory / "config.json")
        config = hf_config.read(published, name=directory.resolve().name)
        block = _block(published)
        stored = open_directory(directory)
        stored = {n: s for n, s in stored.items() if not n.endswith(IGNORED)}
        config = _without_missing_mtp(config, stored)
        shapes = array_shapes(config)
        tensors = {tensor.name: tensor for tensor in table.tensors(config, shapes)}
        copies = {tensor.name: tensor for tensor in table.copies(config, shapes)}
        if config.tied_embeddings:
            name = table.HEAD.name
            copies[name] = replace(tensors[table.EMBEDDING.name], name=name)
        _check_names(tensors, copies, stored)
        _check_shapes(tensors | copies, stored, block)
        _check_copies(tensors, copies, stored)
        boxes: dict[str, dict[tuple[int, ...], table.Tensor]] = {}
        for tensor in tensors.values():
            boxes.setdefault(tensor.path, {})[tensor.index] = tensor
        return cls(
            directory=directory,
            published=published,
            config=config,
            shapes=shapes,
            dtypes={path: _common_dtype(box, stored) for path, box in boxes.items()},
            boxes=boxes,
            stored=stored,
            block=block,
        )

    def leading(self, path: str) -> int:
        """How many first dimensions of an array count layers or experts."""
        return len(next(iter(self.boxes[path])))

    def rows(self, path: str) -> int:
        """How many dimensions of a box are the published tensor's rows."""
        return next(iter(self.boxes[path].values())).rows

    def position(self, path: str, region: Region) -> tuple[str, int, int]:
        """Where a region begins on disk: reading in this order is sequential."""
        index = tuple(part.start for part in region[: self.leading(path)])
        stored = self.stored[self.boxes[path][index].name]
        return str(stored.file), stored.offset, region[self.leading(path)].start

    def read(self, path: str, region: Region, dtype: np.dtype) -> np.ndarray:
        """A region of one of our arrays, dequantised, in `dtype`."""
        leading = self.leading(path)
        out = np.empty(size(region), dtype)
        ranges = [range(part.start, part.stop) for part in region[:leading]]
        for index in itertools.product(*ranges):
            place = tuple(i - part.start for i, part in zip(index, region))
            out[place] = self._box(self.boxes[path][index], region[leading:], dtype)
        return out

    def _box(self, tensor: table.Tensor, cut: Region, dtype: np.dtype) -> np.ndarray:
        """Part of one published tensor, in our dimensions. Whole rows are read."""
        start, stop, shape, cut = published_rows(tensor.box, cut, tensor.rows)
        stored = self.stored[tensor.name]
        values = stored.rows(start, stop)
        if stored.dtype == fp8.E4M3:
            scale = self.stored[tensor.name + fp8.SCALE_SUFFIX].rows()
            values = fp8.dequantise(
                values, scale, first_row=start, block=self.block, dtype=dtype
            )
        return cast(values.reshape(shape)[cut], dtype)


def array_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a model, by dotted path."""
    model = Transformer.abstract(config)
    return {path: tuple(variable.shape) for path, variable in flat(model).items()}


def published_rows(
    box: tuple[int, ...], cut: Region, rows: int
) -> tuple[int, int, tuple[int, ...], Region]:
    """The run of published rows that holds a cut of a box.

    Returns (first row, end row, the run's shape in our dimensions, the cut within it).
    The run is tight when the cut narrows row dimensions in order, as `split` does.
    """
    lead = 0
    while lead < rows - 1 and cut[lead].stop - cut[lead].start == 1:
        lead += 1
    start = sum(cut[d].start * math.prod(box[d + 1 : rows]) for d in range(lead + 1))
    count = cut[lead].stop - cut[lead].start
    stop = start + count * math.prod(box[lead + 1 : rows])
    shape = (1,) * lead + (count, *box[lead + 1 :])
    return start, stop, shape, (slice(None),) * (lead + 1) + cut[lead + 1 :]


def _block(published: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block of FP8 scales, None for a checkpoint that is not quantised."""
    config = published.get("quantization_config")
    if not config:
        return None
    method, block = config.get("quant_method"), config.get("weight_block_size")
    if method != "fp8":
        raise UserError(
            f"quantization_config: quant_method={method!r}: only 'fp8' is known"
        )
    if not isinstance(block, list | tuple) or len(block) != 2 or min(block) < 1:
        raise UserError(
            f"quantization_config: weight_block_size={block!r}: two sizes are needed"
        )
    return tuple(block)


def _without_missing_mtp(
    config: ModelConfig, stored: Mapping[str, Stored]
) -> ModelConfig:
    """transformers writes no MTP tensors, whatever its config.json says."""
    prefix = f"model.layers.{config.num_layers}."
    if not config.mtp or any(name.startswith(prefix) for name in stored):
        return config
    log.warning("no MTP tensors (%s*): loading the model without MTP", prefix)
    return replace(config, mtp=False)


def _check_names(
    tensors: Mapping[str, table.Tensor],
    copies: Mapping[str, table.Tensor],
    stored: Mapping[str, Stored],
) -> None:
    missing = [name for name in tensors if name not in stored]
    if missing:
        raise UserError(f"missing tensor{_list(missing)}")
    scales = {
        name + fp8.SCALE_SUFFIX for name in tensors if stored[name].dtype == fp8.E4M3
    }
    known = tensors.keys() | copies.keys() | scales
    extra = [name for name in stored if name not in known]
    if extra:
        raise UserError(f"tensor that this architecture does not have{_list(extra)}")
    unscaled = [name for name in sorted(scales) if name not in stored]
    if unscaled:
        raise UserError(f"missing scale tensor{_list(unscaled)}")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'s' if len(names) > 1 else ''}: {', '.join(names[:3])}{more}"


def _check_shapes(
    tensors: Mapping[str, table.Tensor],
    stored: Mapping[str, Stored],
    block: tuple[int, int] | None,
) -> None:
    for name, tensor in tensors.items():
        if name not in stored:
            continue  # a copy that was not repeated
        found = stored[name]
        if found.shape != tensor.shape:
            raise UserError(
                f"{name}: shape {list(found.shape)}, expected {list(tensor.shape)}"
            )
        if found.dtype not in (*FLOATS, fp8.E4M3):
            raise UserError(f"{name}: dtype {NAMES[found.dtype]} is not supported")
        if found.dtype != fp8.E4M3:
            continue
        if block is None:
            raise UserError(
                f"{name} is F8_E4M3, but config.json has no weight_block_size"
            )
        scale, expected = (
            stored[name + fp8.SCALE_SUFFIX],
            fp8.scale_shape(found.shape, block),
        )
        if scale.shape != expected:
            raise UserError(
                f"{scale.name}: shape {list(scale.shape)}, expected {list(expected)}"
                f" for {list(found.shape)} in blocks of {list(block)}"
            )


def _check_copies(
    tensors: Mapping[str, table.Tensor],
    copies: Mapping[str, table.Tensor],
    stored: Mapping[str, Stored],
) -> None:
    """A repeated tensor that differs would be lost without a word: refuse it."""
    by_path = {
        tensor.path: name for name, tensor in tensors.items() if not tensor.index
    }
    for name, copy in copies.items():
        original = by_path[copy.path]
        if name in stored and not _same(stored[name], stored[original]):
            raise UserError(f"{name} differs from {original}, which it should repeat")


def _same(one: Stored, other: Stored) -> bool:
    """Compares 64 evenly spaced pieces of 64 KiB: all of a tensor up to 4 MiB."""
    if one.dtype != other.dtype:
        return False
    step = max(PIECE_BYTES, one.nbytes // COMPARED_PIECES)
    return all(
        one.piece(start, min(start + PIECE_BYTES, one.nbytes))
        == other.piece(start, min(start + PIECE_BYTES, one.nbytes))
        for start in range(0, one.nbytes, step)
    )


def _common_dtype(
    boxes: Mapping[tuple[int, ...], table.Tensor], stored: Mapping[str, Stored]
) -> np.dtype:
    """What holds all of a stacked array's layers exactly."""
    kinds = {stored[tensor.name].dtype for tensor in boxes.values()}
    kinds = {BF16 if kind == fp8.E4M3 else kind for kind in kinds}
    return np.dtype(jnp.result_type(*kinds))
