"""The pre-training pipeline: prepared token shards to batches, on Grain.

A step's sequences depend on the data, the seed and the step, not on how many hosts
share them: host h of H has rows h x b to (h + 1) x b of each microbatch, b = microbatch
/ H.

Letters: B rows of a host's part of a microbatch, S window length, one more than the
model's T: a window holds inputs and their shifted targets.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsjax.data.mixture import Data, Documents
from dsjax.data.prepare import Prepared, prepare
from dsjax.data.shards import open_corpus, read_index
from dsjax.data.tokenizer import Tokenizer
from dsjax.data.windows import Fim, Window, Windows, hashes
from dsjax.errors import UserError

Batch = dict[str, np.ndarray]  # "tokens" int32 [B, S], "segments" int32 [B, S] if asked

AHEAD = 256  # sequences of this host that are made before they are asked for
SLOTS = 10_000  # a mixture's pattern: shares are exact to 1 in so many


class Mixture:
    """Several endless sources as one, each with its share.

    A pattern of `SLOTS` places, each source's spread evenly over it, repeats for ever:
    any stretch of the mixture has the shares of the whole, and place n is computed, not
    counted up to.
    """

    def __init__(self, sources: Sequence[Sequence[Window]], weights: Sequence[float]):
        self._sources = list(sources)
        self._counts = _counts(weights)
        evenly = [(np.arange(count) + 0.5) / count for count in self._counts]
        order = np.argsort(np.concatenate(evenly), kind="stable")
        self._choice = np.repeat(np.arange(len(sources)), self._counts)[order]
        self._rank = np.concatenate([np.arange(count) for count in self._counts])[order]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Window:
        rounds, slot = divmod(int(index), SLOTS)
        source = int(self._choice[slot])
        number = rounds * self._counts[source] + int(self._rank[slot])
        return self._sources[source][number]


def _counts(weights: Sequence[float]) -> list[int]:
    """Slots for each weight, by largest remainder."""
    weights = np.asarray(weights, np.float64)
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise UserError(f"weights {weights.tolist()} must be positive")
    exact = weights / weights.sum() * SLOTS
    counts = np.floor(exact).astype(int)
    missing = SLOTS - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    if not counts.all():
        raise UserError(f"weights {weights.tolist()}: a share is under 1 in {SLOTS:,}")
    return counts.tolist()


class _Microbatches:
    """Microbatch n of one host: its rows, stacked."""

    def __init__(self, source: Sequence[Window], size: int, hosts: tuple[int, int]):
        self._source, self._size = source, size
        index, count = hosts
        self._rows = range(index * size // count, (index + 1) * size // count)

    def __len__(self) -> int:
        return sys.maxsize // self._size

    def __getitem__(self, index: int) -> Batch:
        rows = [self._source[int(index) * self._size + row] for row in self._rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Batches:
    """An endless iterator over a host's part of each microbatch, made ahead in a thread.

    Its state is a small dict for JSON: the sequences that all hosts together have
    taken, which continues with any number of hosts and any microbatch that divides it.
    """

    def __init__(
        self,
        source: Sequence[Window],
        *,
        batch_size: int,
        hosts: tuple[int, int],
        data: str = "",
    ):
        import grain

        self._size, self._data = batch_size, data
        ahead = min(max(AHEAD * hosts[1] // batch_size, 2), 16)
        dataset = grain.MapDataset.source(_Microbatches(source, batch_size, hosts))
        # One thread: packing is Python, under one lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
        self._iterator = iter(dataset.to_iter_dataset(options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, int | str]:
        """What `set_state` needs to go on after the last microbatch that was taken."""
        taken = self._iterator.get_state()["next_index"]
        return {"sequences": taken * self._size, "data": self._data}

    def set_state(self, state: dict[str, int | str]) -> None:
        """Raises UserError for the state of other data and for a microbatch that does
        not divide the sequences taken.
        """
        taken, rest = divmod(state["sequences"], self._size)
        if state["data"] != self._data:
            raise UserError("the data are not those of the saved position")
        if rest:
            raise UserError(
                f"{state['sequences']} sequences were taken, which a microbatch of "
                f"{self._size} does not divide"
            )
        self._iterator.set_state({"next_index": taken})

    def close(self) -> None:
        """Ends the thread."""
        self._iterator.close()


def batches(
    source: Sequence[Window],
    *,
    batch_size: int,
    hosts: tuple[int, int] = (0, 1),
    data: str = "",
) -> Batches:
    """Batches of `source`'s windows in their order, for host `hosts` = (index, count).

    `data` names the source in the iterator's state, which another source refuses.
    """
    if batch_size % hosts[1]:
        raise UserError(f"batch_size={batch_size} must divide by {hosts[1]} hosts")
    return Batches(source, batch_size=batch_size, hosts=hosts, data=data)


def loader(
    data: Data,
    *,
    length: int,
    microbatch: int,
    seed: int,
    workdir: Path,
    hosts: tuple[int, int] = (0, 1),
) -> Batches:
    """An endless iterator over the training mixture: for each microbatch this host's
    part of it, "tokens" int32 [microbatch / hosts, length + 1] and, for
    Documents.SEPARATE, "segments" of the same shape.

    Text that is not tokenised yet is, below `workdir`. Raises UserError for data that
    are not there or do not fit together.
    """
    prepared = prepare(data, workdir)
    fim = _fim(data, prepared)
    windows = [
        Windows(
            open_corpus(source.path),
            length=length,
            seed=int(hashes(1, seed, number)[0]),
            segments=data.documents is Documents.SEPARATE,
            fim=fim,
        )
        for number, source in enumerate(prepared.sources)
    ]
    weights = [source.weight for source in prepared.sources]
    name = _name(data, prepared, length=length, seed=seed)
    return batches(
        Mixture(windows, weights), batch_size=microbatch, hosts=hosts, data=name
    )


def _fim(data: Data, prepared: Prepared) -> Fim | None:
    if not 0 <= data.fim_rate <= 1:
        raise UserError(f"fim_rate={data.fim_rate} must be from 0 to 1")
    if not data.fim_rate:
        return None
    ids = Tokenizer.load(prepared.tokenizer).fim_ids
    if ids is None:
        raise UserError(f"fim_rate={data.fim_rate}: the tokenizer has no FIM tokens")
    return Fim(rate=data.fim_rate, ids=ids)


def _name(data: Data, prepared: Prepared, *, length: int, seed: int) -> str:
    """A digest of everything that the order of the sequences depends on."""
    sources = [(read_index(s.path).digest, s.weight) for s in prepared.sources]
    facts = (sources, data.fim_rate, length, seed)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
