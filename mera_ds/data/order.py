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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


def epoch_order(
    lengths: Mapping[str, Sequence[int]], batch_size: int, seed: int, epoch: int
) -> list[Unit]:
    """Return every unit of every modality exactly once, in the order of the epoch.

    Args:
        lengths: per modality, the length of each unit (any unit of measure).
        batch_size: global batch; only sets how many units of similar length stand together.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
    """
    total = sum(len(entry) for entry in lengths.values())
    placed: list[tuple[float, int, Unit]] = []
    for rank, (modality, entry) in enumerate(lengths.items()):
        generator = random.Random(f"{seed}/{epoch}/{modality}")
        group = max(1, round(batch_size * len(entry) / max(1, total)))
        order = _grouped_by_length(entry, group, generator)
        for position, unit in enumerate(order):
            placed.append(((position + 0.5) / len(order), rank, (modality, unit)))
    placed.sort(key=lambda entry: entry[:2])
    return [unit for _, _, unit in placed]


def _grouped_by_length(lengths: Sequence[int], group: int, generator: random.Random) -> list[int]:
    units = list(range(len(lengths)))
    generator.shuffle(units)
    window = group * LENGTH_WINDOW
    runs = []
    for start in range(0, len(units), window):
        similar = sorted(units[start : start + window], key=lambda unit: lengths[unit])
        runs += [similar[i : i + group] for i in range(0, len(similar), group)]
    full = [run for run in runs if len(run) == group]
    short = [run for run in runs if len(run) != group]
    generator.shuffle(full)
    return [unit for run in full + short for unit in run]


def steps_per_epoch(units: int, batch_size: int) -> int:
    """Return the number of optimizer steps of an epoch; the last batch may be smaller."""
    return math.ceil(units / batch_size)


def step_batches(order: Sequence[Unit], batch_size: int, step: int) -> Sequence[Unit]:
    """Return the global batch of one optimizer step of the epoch."""
    return order[step * batch_size : (step + 1) * batch_size]


def rank_share(
    batch: Sequence[Unit], modalities: Sequence[str], rank: int, world: int, micro_batch: int
) -> list[MicroBatch]:
    """Return the micro-batches of one rank for one global batch.

    Args:
        batch: the global batch.
        modalities: all modalities of the mixture, in one fixed order.
        rank: this rank.
        world: number of ranks.
        micro_batch: largest number of samples in a micro-batch.
    """
    shares = []
    for modality in modalities:
        units = [unit for name, unit in batch if name == modality]
        for start in range(0, len(units), micro_batch * world):
            chunk = units[start : start + micro_batch * world]
            mine = tuple(chunk[rank::world])
            if mine:
                shares.append(MicroBatch(modality, mine, (True,) * len(mine)))
            else:
                shares.append(MicroBatch(modality, (chunk[0],), (False,)))
    return shares
