"""From units to the micro-batches of each optimizer step, on each rank.

`StepLoader` is indexed by the number of the optimizer step, so its whole state is one integer:
resuming at step s, on any number of ranks and workers, asks for step s. Worker processes build
whole steps in parallel.
"""

import ctypes
import dataclasses
import hashlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.utils.data
from numpy.typing import NDArray
from torch import Tensor

from mera_ds.batch import Batch
from mera_ds.data.dataset import UnitReader
from mera_ds.data.order import (
    EpochOrder,
    MicroBatch,
    epoch_order,
    rank_share,
    step_batches,
    steps_per_epoch,
)
from mera_ds.data.units import UnitList
from mera_ds.errors import InputError, MeraError, RankError

PR_SET_PDEATHSIG = 1
"""From Linux' prctl.h."""
STEPS_AHEAD = 2
"""Steps that each loader process may be ahead of the training."""


@dataclass(frozen=True)
class MixturePart:
    """One modality's share of a phase's data."""

    reader: UnitReader
    units: UnitList
    lengths: Sequence[int] | NDArray[np.int64]
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
        empty = [modality for modality, part in mixture.items() if not len(part.units)]
        if empty or not mixture:
            names = ", ".join(empty) or "any modality"
            raise InputError(f"there is no training text for {names}; check its shards' tasks")
        self._mixture = mixture
        self._settings = settings
        self._epoch = -1
        self._order: EpochOrder | None = None
        self._units = sum(len(part.units) for part in mixture.values())
        self._steps_per_epoch = steps_per_epoch(self._units, settings.batch_size)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the phase."""
        steps = self._steps_per_epoch * self._settings.epochs
        return min(steps, self._settings.max_steps or steps)

    def order_hash(self) -> str:
        """Return a hash of the first epoch's global order; equal on all ranks of equal shards."""
        order = self._order_of(0)
        digest = hashlib.sha256(repr(order.modalities).encode())
        digest.update(order.codes.tobytes())
        digest.update(order.units.tobytes())
        for part in self._mixture.values():
            digest.update(part.units.readers.tobytes())
            digest.update(part.units.texts.tobytes())
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
        """Yield (step, micro-batches) from a step on to the end of the phase.

        Raises:
            MeraError: what the reading of a sample raised, in whichever process.
            RankError: a loader process died.
        """
        steps = range(start, self.total_steps)
        if not steps:
            return
        self._order_of(start // self._steps_per_epoch)  # before the fork, so that it is shared
        workers = self._settings.workers
        loader = torch.utils.data.DataLoader(
            _PackedSteps(self),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_end_with_the_trainer,
            prefetch_factor=STEPS_AHEAD if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        packed = iter(loader)
        for step in steps:
            yield step, self._next(packed, step)

    def _next(self, packed: Iterator["_PackedStep | MeraError"], step: int) -> list[Batch]:
        try:
            found = next(packed)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or "Caught" in str(error):
                raise
            last = min(self.total_steps, step + STEPS_AHEAD * self._settings.workers) - 1
            raise RankError(
                f"a loader process died while steps {step} to {last} were read ({error}); run the "
                "same command to continue. If it dies again: execution.workers=0 shows the sample, "
                "fewer workers need less memory; 'Bus error' means that /dev/shm is too small"
            ) from None
        if isinstance(found, MeraError):
            raise found
        return found.batches()

    def _order_of(self, epoch: int) -> EpochOrder:
        if epoch != self._epoch or self._order is None:
            lengths = {name: part.lengths for name, part in self._mixture.items()}
            settings = self._settings
            self._order = epoch_order(lengths, settings.batch_size, settings.seed, epoch)
            self._epoch = epoch
        return self._order

    def _read(self, micro: MicroBatch) -> Batch:
        part = self._mixture[micro.modality]
        samples = tuple(part.reader.read(part.units[unit]) for unit in micro.units)
        return Batch(samples, micro.counted)


class _PackedSteps(torch.utils.data.Dataset["_PackedStep | MeraError"]):
    """Steps as they travel between processes; an error is a value, so that it arrives unchanged."""

    def __init__(self, loader: StepLoader) -> None:
        self._loader = loader

    def __getitem__(self, step: int) -> "_PackedStep | MeraError":
        try:
            return _pack(self._loader[step])
        except MeraError as error:
            return error


@dataclass(frozen=True)
class _PackedStep:
    """A step whose media lie in one buffer per dtype, each medium once.

    A tensor that goes to another process takes its whole storage along (a row of cached features
    those of a whole tar) and a file descriptor. So there are few, and they hold no more than this.
    """

    bare: list[Batch]
    """The micro-batches with empty media."""
    places: list[tuple[torch.dtype, int, torch.Size]]
    """Per sample: buffer, start and shape of its medium."""
    buffers: dict[torch.dtype, Tensor]

    def pin_memory(self) -> "_PackedStep":
        """Return it in memory that a GPU can copy from (torch calls this)."""
        pinned = {dtype: buffer.pin_memory() for dtype, buffer in self.buffers.items()}
        return dataclasses.replace(self, buffers=pinned)

    def batches(self) -> list[Batch]:
        """Return the micro-batches; their media are views of the buffers."""
        places = iter(self.places)
        return [
            _with_media(batch, [self._medium(*next(places)) for _ in batch.samples])
            for batch in self.bare
        ]

    def _medium(self, dtype: torch.dtype, start: int, shape: torch.Size) -> Tensor:
        return self.buffers[dtype][start : start + shape.numel()].view(shape)


def _pack(batches: list[Batch]) -> _PackedStep:
    parts: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}
    known: dict[object, tuple[torch.dtype, int, torch.Size]] = {}
    places = []
    for media in (sample.media for batch in batches for sample in batch.samples):
        same = (media.data_ptr(), media.shape, media.stride(), media.dtype)
        if same not in known:
            start = sizes.get(media.dtype, 0)
            known[same] = (media.dtype, start, media.shape)
            parts.setdefault(media.dtype, []).append(media.reshape(-1))
            sizes[media.dtype] = start + media.numel()
        places.append(known[same])
    bare = [_with_media(batch, [torch.empty(0)] * len(batch.samples)) for batch in batches]
    return _PackedStep(bare, places, {dtype: torch.cat(items) for dtype, items in parts.items()})


def _with_media(batch: Batch, media: Sequence[Tensor]) -> Batch:
    pairs = zip(batch.samples, media, strict=True)
    samples = tuple(dataclasses.replace(sample, media=medium) for sample, medium in pairs)
    return dataclasses.replace(batch, samples=samples)


def _end_with_the_trainer(worker: int) -> None:
    """Let this loader process be killed when the process that trains is.

    It would live on for seconds and hold the run's lock, so that the command could not be repeated.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
