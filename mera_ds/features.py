"""Opening a modality's data with its encoder: features computed once, or media encoded on line.

Features are computed once per medium and kept on disk in feature shards of `PART` media of one
tar: a safetensors file with `values` (T, D), the tokens of all its media one after another, and
`starts` (n + 1,), where those of each medium begin; its SHA-256 lies beside it. The folder's name
holds the fingerprints of the shard set and of the encoder, and the dtype, so features never
outlive what made them.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mera_ds.batch import Features
from mera_ds.checkpoint import save_tensors
from mera_ds.config import RunConfig, cache_folder
from mera_ds.data.dataset import MediaCache, ModalityData, UnitReader, UnitRef
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World, share, together
from mera_ds.errors import DataError, LockedError
from mera_ds.files import committed_folder, failpoint, folder_lock, remove_temporaries
from mera_ds.identity import data_folders
from mera_ds.log import logger
from mera_ds.model.encoders import Encoder
from mera_ds.registry import plugin_errors
from mera_ds.shards.reader import Reading
from mera_ds.shards.verify import has_sha256

ENCODE_BATCH = 16
PART = 256
"""Media of a feature shard; bounds what is in memory while they are encoded."""
FILE = "features.safetensors"
HASH = "sha256"
LOCK_POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 10.0


def open_data(
    config: RunConfig,
    run: Path,
    modality: str,
    split: str,
    encoder: Encoder,
    prompts: PromptBuilder,
    world: World,
) -> tuple[ModalityData, UnitReader]:
    """Open one split of a modality, with its features computed if the run caches them.

    Every rank must call it.

    Raises:
        InputError: if the shards are missing or hold another modality, or a plugin's code fails
            on a medium, naming it.
        DataError: if a medium can't be decoded, naming it.
    """
    execution = config.execution
    data = open_shards(config, run, modality, split)
    settings = config.modalities[modality]
    if execution.features == "online":

        def load(unit: UnitRef) -> Tensor:
            return transform(encoder, data, unit)

        kept = MediaCache(load, execution.media_cache_mb * 1_000_000)
        media = kept if data.media_return else load
        return data, UnitReader(data, settings, prompts, media, encoded=False)
    store = FeatureStore(data, encoder)
    store.compute_missing(world)
    return data, UnitReader(data, settings, prompts, store.load, encoded=True)


def open_shards(config: RunConfig, run: Path, modality: str, split: str) -> ModalityData:
    """Open the shard sets of one split of a modality."""
    execution = config.execution
    reading = Reading(execution.verify_shards, execution.shard_cache_gb * 10**9)
    return ModalityData(modality, data_folders(config, run, modality), split, reading)


def transform(encoder: Encoder, data: ModalityData, unit: UnitRef) -> Tensor:
    """Return a unit's medium as the encoder's network takes it.

    Raises:
        InputError: if the encoder's code fails on it, naming it.
        DataError: if it can't be decoded, naming it.
    """
    medium = data.medium(unit, encoder.media)
    with plugin_errors(f"{data.unit_id(unit)} can't be encoded"):
        return encoder.transform(medium)


@dataclass(frozen=True)
class Part:
    """The media of one feature shard: rows `number · PART` and on of a tar's usable samples."""

    reader: int
    shard: int
    number: int
    media: tuple[int, ...]
    """Their positions in the shard set."""


def _require_sound(path: Path) -> None:
    """Raise `OSError` unless a file of features is the one that was written."""
    sha256 = path.with_name(HASH).read_text()
    with path.open("rb") as file:
        if not has_sha256(path, file.fileno(), sha256):
            raise OSError("it was changed or damaged, its SHA-256 differs")


class FeatureStore:
    """Reads the features of one modality's shard sets, computing those that are missing.

    Files are memory-mapped: what is read of them is the system's to keep or to drop.
    """

    def __init__(self, data: ModalityData, encoder: Encoder) -> None:
        self._data = data
        self._encoder = encoder
        self._files: dict[Path, tuple[Tensor, list[int]]] = {}

    @property
    def media(self) -> int:
        """Number of media, with features or without."""
        return sum(len(part.media) for part in self._parts())

    def missing_media(self) -> int:
        """Return how many media have no features on this machine yet."""
        return sum(len(part.media) for part in self._missing())

    def most_bytes(self) -> int:
        """Return the size of the missing features, should each medium have the most tokens."""
        per_token = self._encoder.feature_dim * self._encoder.feature_dtype.itemsize
        return self.missing_media() * self._encoder.max_tokens * per_token

    def stored_bytes(self) -> int:
        """Return the size of the features that lie on this machine."""
        files = [self._folder(part) / FILE for part in self._parts()]
        return sum(path.stat().st_size for path in files if path.exists())

    def compute_missing(self, world: World) -> None:
        """Encode every medium that has no features yet; the ranks share the parts.

        What is still missing then, on a node whose cache is its own, the node's first rank encodes.
        Ranks are spoken to only if there are several in `world`.
        """
        if world.size == 1:
            with self._claimed():
                self._encode_all(self._missing(), world.device)
            return
        with self._claimed() if world.is_main else nullcontext():
            todo = share(self._missing())
            with together():
                self._encode_all(todo[world.rank :: world.size], world.device)
            with together():
                if world.local_rank == 0:
                    self._encode_all(self._missing(), world.device)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Hold the locks of the folders that will be written.

        Another process that computes the same features is waited for; what a killed one left is
        removed.
        """
        with ExitStack() as locks:
            for root in sorted({self._folder(part).parent for part in self._missing()}):
                locks.enter_context(_waited_for(root))
                remove_temporaries(root)
            yield

    def _parts(self) -> list[Part]:
        """Return every part of the shard sets; equal on every rank."""
        return [
            Part(reader, shard, start // PART, tuple(media[start : start + PART]))
            for reader, entry in enumerate(self._data.readers)
            for shard in range(len(entry.index.shards))
            for media in [entry.usable(shard).tolist()]
            for start in range(0, len(media), PART)
        ]

    def _missing(self) -> list[Part]:
        """Return the parts whose features this machine does not have."""
        return [part for part in self._parts() if not self._folder(part).exists()]

    def load(self, unit: UnitRef) -> Tensor:
        """Return the features (N, D) of a unit's medium, a view of the mapped file."""
        shard, row = self._data.readers[unit.reader].place(unit.medium)
        values, starts = self._open(self._folder(Part(unit.reader, shard, row // PART, ())) / FILE)
        return values[starts[row % PART] : starts[row % PART + 1]]

    def _folder(self, part: Part) -> Path:
        made_of = self._data.readers[part.reader].index.fingerprint[:16]
        made_by = self._encoder.fingerprint[:16]
        dtype = {torch.float32: "fp32", torch.float16: "fp16"}[self._encoder.feature_dtype]
        root = cache_folder() / "features" / f"{made_of}-{made_by}-{dtype}"
        return root / f"{part.shard:05d}-{part.number:03d}"

    def _open(self, path: Path) -> tuple[Tensor, list[int]]:
        if path not in self._files:
            try:
                _require_sound(path)
                with safe_open(str(path), framework="pt") as file:
                    starts = file.get_tensor("starts").tolist()
                    self._files[path] = (file.get_tensor("values"), starts)
            except (SafetensorError, OSError) as error:
                raise DataError(
                    f"the features {path} can't be read ({error}); delete {path.parent} and they "
                    "are computed again"
                ) from None
        return self._files[path]

    def _encode_all(self, parts: list[Part], device: str) -> None:
        total, done, printed = sum(len(part.media) for part in parts), 0, time.monotonic()
        if parts:
            logger.info("%s: encoding %d media once", self._data.modality, total)
        for part in parts:
            self._encode(part, device)
            failpoint("features.part")
            done += len(part.media)
            if time.monotonic() - printed > SECONDS_BETWEEN_LINES:
                printed = time.monotonic()
                logger.info("%s: %d of %d media encoded", self._data.modality, done, total)

    @torch.no_grad()
    def _encode(self, part: Part, device: str) -> None:
        self._encoder.to(device)
        rows: list[Tensor] = []
        for start in range(0, len(part.media), ENCODE_BATCH):
            chosen = part.media[start : start + ENCODE_BATCH]
            rows += self._features([UnitRef(part.reader, medium, 0) for medium in chosen], device)
        lengths = torch.tensor([0, *map(len, rows)])
        tensors = {"values": torch.cat(rows), "starts": lengths.cumsum(dim=0)}
        with committed_folder(self._folder(part)) as folder:
            (folder / HASH).write_text(save_tensors(folder / FILE, tensors))

    def _features(self, units: list[UnitRef], device: str) -> list[Tensor]:
        """Return the real feature tokens (N_b, D) of some media, on the CPU."""
        inputs = [transform(self._encoder, self._data, unit).to(device) for unit in units]
        first, last = self._data.unit_id(units[0]), self._data.unit_id(units[-1])
        with plugin_errors(f"the media {first} to {last} can't be encoded"):
            exact = self._encoder(inputs).to("cpu", torch.float32)
        kept = exact.to("cpu", self._encoder.feature_dtype)
        self._refuse_overflow(exact, kept, units)
        return [row[real] for row, real in zip(kept.values, kept.mask, strict=True)]

    def _refuse_overflow(self, exact: Features, kept: Features, units: list[UnitRef]) -> None:
        lost = (exact.values.isfinite() & ~kept.values.isfinite()).flatten(1).any(dim=1)
        if bool(lost.any()):
            modality = self._data.modality
            raise DataError(
                f"{self._data.unit_id(units[int(lost.nonzero()[0])])} has a feature of "
                f"{float(exact.values.abs().max()):.3g}, which fp16 can't hold; set "
                f"modalities.{modality}.feature_dtype=fp32"
            )


@contextmanager
def _waited_for(root: Path) -> Iterator[None]:
    """Hold a folder's lock, waiting for whoever has it."""
    said = False
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(root))
            except LockedError as error:
                if not said:
                    logger.info("waiting: %s", error)
                said = True
                time.sleep(LOCK_POLL_SECONDS)
                continue
            yield
            return
