"""Experts of a checkpoint read slot by slot, for a model that holds some of them twice.

Letters: L layers of a segment, R slots.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from dsjax.checkpoint.streaming import Region, Source, size
from dsjax.config import ModelConfig, Moe
from dsjax.nn.replicas import Placement
from dsjax.nn.transformer import Transformer

WEIGHTS = ("gate_EFD", "up_EFD", "down_EDF")


@dataclass(frozen=True)
class SlotSource:
    """A source whose expert arrays have slots where the checkpoint's have experts.

    `expert_LR` is by path. A region is read as it is asked for: no more than the slots
    that its devices hold.
    """

    source: Source
    expert_LR: dict[str, Int[np.ndarray, "L R"]]

    @property
    def directory(self):
        """The checkpoint's."""
        return self.source.directory

    @property
    def config(self) -> ModelConfig:
        """The architecture; it knows no slots."""
        return self.source.config

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Stored dtypes by dotted path."""
        return self.source.dtypes

    def read(self, path: str, region: Region, dtype: np.dtype) -> np.ndarray:
        """A region of an array."""
        if path not in self.expert_LR:
            return self.source.read(path, region, dtype)
        layers, slots, *rest = region
        out = np.empty(size(region), dtype)
        experts = self.expert_LR[path][layers, slots]
        for (row, slot), expert in np.ndenumerate(experts):
            layer = layers.start + row
            one = slice(layer, layer + 1), slice(int(expert), int(expert) + 1), *rest
            out[row, slot] = self.source.read(path, one, dtype)[0, 0]
        return out


def segment_rows(config: ModelConfig) -> dict[str, slice]:
    """Which of a model's MoE layers each segment has, by its experts' path."""
    rows, start = {}, 0
    for number, segment in enumerate(config.segments):
        if isinstance(segment.feed_forward, Moe):
            path = f"segments.{number}.feed_forward.experts"
            rows[path] = slice(start, start + segment.count)
            start += segment.count
    return rows


def by_slots(source: Source, placement: Placement) -> SlotSource:
    """The source with every MoE segment's experts as `placement` has them."""
    return SlotSource(
        source,
        {
            f"{path}.{name}": placement.expert_LR[rows]
            for path, rows in segment_rows(source.config).items()
            for name in WEIGHTS
        },
    )


def fill_tables(model: Transformer, placement: Placement) -> None:
    """Tells every MoE layer where its experts are."""
    table_LEX = placement.table()
    everywhere = NamedSharding(model.mesh, P())
    for path, rows in segment_rows(model.config).items():
        segment = model.segments[int(path.split(".")[1])]
        values = jnp.asarray(table_LEX[rows])
        experts = segment.feed_forward.experts
        experts.slots_EX.set_value(jax.device_put(values, everywhere))
