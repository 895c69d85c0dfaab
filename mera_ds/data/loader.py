"""From units to the micro-batches of each optimizer step, on each rank.

`StepLoader` is indexed by the number of the optimizer step, so its whole state is one integer:
resuming at step s, on any number of ranks and workers, asks for step s. Worker processes build
whole steps in parallel.
"""

import ctypes
import hashlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.utils.data

from mera_ds.batch import Batch
from mera_ds.data.dataset import UnitReader, UnitRef
from mera_ds.data.order import (
    MicroBatch,
    Unit,
    epoch_order,
    rank_share,
    step_batches,
    steps_per_epoch,
)
from mera_ds.errors import InputError

PR_SET_PDEATHSIG = 1
"""From Linux' prctl.h."""


@dataclass(frozen=True)
class MixturePart:
    """One modality's share of a phase's data."""

    reader: UnitReader
    units: Sequence[UnitRef]
    lengths: Sequence[int]
    ids: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How units are cut into steps and shared among ranks."""

    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int
    rank: int
    world: int
    micro_batch: int
    workers: int


class StepLoader(torch.utils.data.Dataset[list[Batch]]):
    """The micro-batches of this rank, by optimizer step."""

    def __init__(self, mixture: Mapping[str, MixturePart], settings: LoaderSettings) -> None:
        empty = [modality for modality, part in mixture.items() if not part.units]
        if empty or not mixture:
            names = ", ".join(empty) or "any modality"
            raise InputError(f"there is no training text for {names}; check its shards' tasks")
        self._mixture = mixture
        self._settings = settings
        self._epoch = -1
        self._order: list[Unit] = []
        self._units = sum(len(part.units) for part in mixture.values())
        self._steps_per_epoch = steps_per_epoch(self._units, settings.batch_size)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the phase."""
        steps = self._steps_per_epoch * self._settings.epochs
        return min(steps, self._settings.max_steps or steps)

    def order_hash(self) -> str:
        """Return a hash of the first epoch's global order, equal on all ranks."""
        digest = hashlib.sha256()
        for modality, unit in self._order_of(0):
            digest.update(f"{self._mixture[modality].ids[unit]}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, step: int) -> list[Batch]:
        settings = self._settings
        epoch, within = divmod(step, self._steps_per_epoch)
        batch = step_batches(self._order_of(epoch), settings.batch_size, within)
        share = rank_share(
            batch, list(self._mixture), settings.rank, settings.world, settings.micro_batch
        )
        return [self._read(micro) for micro in share]

    def sample_ids(self, step: int) -> list[str]:
        """Return the unit ids of a step's global batch, for messages."""
        epoch, within = divmod(step, self._steps_per_epoch)
        batch = step_batches(self._order_of(epoch), self._settings.batch_size, within)
        return [self._mixture[modality].ids[unit] for modality, unit in batch]

    def batches(self, start: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (step, micro-batches) from a step on to the end of the phase."""
        steps = range(start, self.total_steps)
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=steps,
            num_workers=self._settings.workers,
            multiprocessing_context="fork" if self._settings.workers else None,
            worker_init_fn=_end_with_the_trainer,
        )
        yield from zip(steps, loader, strict=True)

    def _order_of(self, epoch: int) -> list[Unit]:
        if epoch != self._epoch:
            lengths = {name: part.lengths for name, part in self._mixture.items()}
            settings = self._settings
            self._order = epoch_order(lengths, settings.batch_size, settings.seed, epoch)
            self._epoch = epoch
        return self._order

    def _read(self, micro: MicroBatch) -> Batch:
        part = self._mixture[micro.modality]
        samples = tuple(part.reader.read(part.units[unit]) for unit in micro.units)
        return Batch(samples, micro.counted)


def _end_with_the_trainer(worker: int) -> None:
    """Let this loader process be killed when the process that trains is.

    It would live on for seconds and hold the run's lock, so that the command could not be repeated.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
