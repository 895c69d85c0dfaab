"""The exact order of an epoch, from (seed, epoch) alone. Pure functions on integers.

1. `epoch_order`: within each modality the units are shuffled, neighbours of similar length are put
   together, and the modalities are interleaved in proportion.
2. `step_batches`: the interleaved list is cut into the global batches of the optimizer steps, so
   each global batch holds all modalities of a mixture in proportion.
3. `rank_share`: a global batch becomes micro-batches of one modality each; all ranks have the same
   number of micro-batches with the same modality at the same position.

Steps 1 and 2 know neither the number of ranks nor of workers. A rank without a sample of its own
in a micro-step repeats one that does not count.
"""

import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

LENGTH_WINDOW = 4
"""How many batches' worth of shuffled units are sorted by length together.

Few, so that a batch still mixes tasks, which differ in length."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank takes through the model at once: units of one modality."""

    modality: str
    units: tuple[int, ...]
    counted: tuple[bool, ...]


Unit = tuple[str, int]
"""Modality, and position in that modality's list of units."""


class EpochOrder(Sequence[Unit]):
    """The units of an epoch in order: five bytes each."""

    def __init__(
        self, modalities: Sequence[str], codes: NDArray[np.uint8], units: NDArray[np.int32]
    ) -> None:
        self.modalities = tuple(modalities)
        self.codes = codes
        """(U,) position in `modalities`."""
        self.units = units
        """(U,) position in that modality's list of units."""

    def __len__(self) -> int:
        return len(self.units)

    @overload
    def __getitem__(self, position: int) -> Unit: ...
    @overload
    def __getitem__(self, position: slice) -> list[Unit]: ...
    def __getitem__(self, position: int | slice) -> Unit | list[Unit]:
        if isinstance(position, slice):
            pairs = zip(self.codes[position].tolist(), self.units[position].tolist(), strict=True)
            return [(self.modalities[code], unit) for code, unit in pairs]
        return self.modalities[self.codes[position]], int(self.units[position])

    def __iter__(self) -> Iterator[Unit]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment]


def epoch_order(
    lengths: Mapping[str, ArrayLike],
    batch_size: int,
    seed: int,
    epoch: int,
    media: Mapping[str, ArrayLike] | None = None,
    together: int = 1,
) -> EpochOrder:
    """Return every unit of every modality exactly once, in the order of the epoch.

    Args:
        lengths: per modality, the length of each unit (any unit of measure).
        batch_size: global batch; only sets how many units of similar length stand together.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        media: per modality, a number of each unit's medium; needed if units are kept together.
        together: how many units of a medium are drawn as one; a medium's last ones may be fewer.
    """
    columns = {name: np.asarray(entry, dtype=np.int64) for name, entry in lengths.items()}
    total = sum(map(len, columns.values()))
    units, codes, places = [], [], []
    for code, (modality, column) in enumerate(columns.items()):
        generator = random.Random(f"{seed}/{epoch}/{modality}")
        group = max(1, round(batch_size * len(column) / max(1, total)))
        if together == 1 or media is None:
            units.append(_grouped_by_length(column, group, generator))
        else:
            numbers = np.asarray(media[modality], dtype=np.int64)
            units.append(_kept_together(column, numbers, together, group, generator))
        codes.append(np.full(len(column), code, dtype=np.uint8))
        places.append((np.arange(len(column)) + 0.5) / max(1, len(column)))
    code_column = np.concatenate(codes)
    interleaved = np.lexsort((code_column, np.concatenate(places)))
    return EpochOrder(list(columns), code_column[interleaved], np.concatenate(units)[interleaved])


def _grouped_by_length(
    lengths: NDArray[np.int64], group: int, generator: random.Random
) -> NDArray[np.int32]:
    shuffled = array("i", range(len(lengths)))
    generator.shuffle(shuffled)
    units = np.array(shuffled, dtype=np.int32)
    window = np.arange(len(units)) // (group * LENGTH_WINDOW)
    units = units[np.lexsort((lengths[units], window))]
    full = len(units) // group
    runs = array("i", range(full))
    generator.shuffle(runs)
    in_runs = units[: full * group].reshape(full, group)[np.array(runs, dtype=np.int32)]
    return np.concatenate((in_runs.reshape(-1), units[full * group :]))


def _kept_together(
    lengths: NDArray[np.int64],
    media: NDArray[np.int64],
    together: int,
    group: int,
    generator: random.Random,
) -> NDArray[np.int32]:
    """Order chunks of up to `together` random units of one medium as otherwise single units."""
    shuffled = array("i", range(len(lengths)))
    generator.shuffle(shuffled)
    units = np.array(shuffled, dtype=np.int32)
    units = units[np.argsort(media[units], kind="stable")]
    _, first, counts = np.unique(media[units], return_index=True, return_counts=True)
    within = np.arange(len(units)) - np.repeat(first, counts)
    starts = np.flatnonzero(within % together == 0)
    longest = np.maximum.reduceat(lengths[units], starts)
    chunks = _grouped_by_length(longest, max(1, group // together), generator)
    parts = np.split(units, starts[1:])
    return np.concatenate([parts[chunk] for chunk in chunks.tolist()])


def steps_per_epoch(units: int, batch_size: int) -> int:
    """Return the number of optimizer steps of an epoch; the last batch may be smaller."""
    return math.ceil(units / batch_size)


def step_batches(order: Sequence[Unit], batch_size: int, step: int) -> Sequence[Unit]:
    """Return the global batch of one optimizer step of the epoch."""
    return order[step * batch_size : (step + 1) * batch_size]


def rank_share(
    batch: Sequence[Unit],
    modalities: Sequence[str],
    rank: int,
    world: int,
    micro_batch: int,
    neighbours: bool = False,
) -> list[MicroBatch]:
    """Return the micro-batches of one rank for one global batch.

    Args:
        batch: the global batch.
        modalities: all modalities of the mixture, in one fixed order.
        rank: this rank.
        world: number of ranks.
        micro_batch: largest number of samples in a micro-batch.
        neighbours: give a rank units that stand together, rather than every `world`-th.
    """
    shares = []
    for modality in modalities:
        units = [unit for name, unit in batch if name == modality]
        for start in range(0, len(units), micro_batch * world):
            chunk = units[start : start + micro_batch * world]
            first, last = (len(chunk) * number // world for number in (rank, rank + 1))
            mine = tuple(chunk[first:last] if neighbours else chunk[rank::world])
            if mine:
                shares.append(MicroBatch(modality, mine, (True,) * len(mine)))
            else:
                shares.append(MicroBatch(modality, (chunk[0],), (False,)))
    return shares
