"""Opening a modality's data with its encoder: features computed once, or media encoded on line.

Features are computed once per medium and kept on disk.

One safetensors file per tar: `values` (n, N, D) fp32 and `lengths` (n,), and its SHA-256 beside it.
The folder's name holds the fingerprints of the shard set and of the encoder, so features never
outlive what made them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mera_ds.batch import pad_features
from mera_ds.checkpoint import save_tensors
from mera_ds.config import RunConfig, cache_folder
from mera_ds.data.dataset import MediaCache, ModalityData, UnitReader, UnitRef
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World, gather, share
from mera_ds.errors import DataError
from mera_ds.files import committed_folder, shared_folder
from mera_ds.identity import data_folders
from mera_ds.log import logger
from mera_ds.model.encoders import Encoder
from mera_ds.registry import plugin_errors
from mera_ds.shards.reader import Reading
from mera_ds.shards.verify import has_sha256

ENCODE_BATCH = 16
FILE = "features.safetensors"
HASH = "sha256"


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
    reading = Reading(execution.verify_shards, execution.shard_cache_gb * 10**9)
    data = ModalityData(modality, data_folders(config, run, modality), split, reading)
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


def transform(encoder: Encoder, data: ModalityData, unit: UnitRef) -> Tensor:
    """Return a unit's medium as the encoder's network takes it.

    Raises:
        InputError: if the encoder's code fails on it, naming it.
        DataError: if it can't be decoded, naming it.
    """
    medium = data.medium(unit, encoder.media)
    with plugin_errors(f"{data.unit_id(unit)} can't be encoded"):
        return encoder.transform(medium)


def _require_sound(path: Path) -> None:
    """Raise `OSError` unless a file of features is the one that was written."""
    sha256 = path.with_name(HASH).read_text()
    with path.open("rb") as file:
        if not has_sha256(path, file.fileno(), sha256):
            raise OSError("it was changed or damaged, its SHA-256 differs")


class FeatureStore:
    """Reads the features of one modality's shard sets, computing those that are missing."""

    def __init__(self, data: ModalityData, encoder: Encoder) -> None:
        self._data = data
        self._encoder = encoder
        self._files: dict[Path, tuple[Tensor, Tensor]] = {}

    def compute_missing(self, world: World) -> None:
        """Encode every medium that has no features yet; the ranks share the tars.

        What is still missing then, on a node whose cache is its own, the node's first rank encodes.
        """
        todo = share(self._missing())
        if todo:
            media = sum(len(self._data.readers[n].usable(s)) for n, s in todo)
            logger.info("%s: encoding %d media once", self._data.modality, media)
        self._encode_all(todo[world.rank :: world.size], world.device)
        gather(None)
        if world.local_rank == 0:
            self._encode_all(self._missing(), world.device)
        gather(None)

    def _encode_all(self, tars: Sequence[tuple[int, int]], device: str) -> None:
        if not tars:
            return
        with shared_folder(cache_folder() / "features"):
            for number, shard in tars:
                self._encode(number, shard, device)

    def _missing(self) -> list[tuple[int, int]]:
        """Return reader and number of every tar whose features this machine does not have."""
        return [
            (number, shard)
            for number, reader in enumerate(self._data.readers)
            for shard in range(len(reader.index.shards))
            if len(reader.usable(shard)) and not (self._folder(number, shard) / HASH).exists()
        ]

    def load(self, unit: UnitRef) -> Tensor:
        """Return the features (N, D) of a unit's medium."""
        shard, row = self._data.readers[unit.reader].place(unit.medium)
        values, lengths = self._open(self._folder(unit.reader, shard) / FILE)
        return values[row, : int(lengths[row])]

    def _folder(self, reader: int, shard: int) -> Path:
        made_of = self._data.readers[reader].index.fingerprint[:16]
        made_by = self._encoder.fingerprint[:16]
        return cache_folder() / "features" / f"{made_of}-{made_by}" / f"{shard:05d}"

    def _open(self, path: Path) -> tuple[Tensor, Tensor]:
        if path not in self._files:
            try:
                _require_sound(path)
                with safe_open(str(path), framework="pt") as file:
                    self._files[path] = (file.get_tensor("values"), file.get_tensor("lengths"))
            except (SafetensorError, OSError) as error:
                raise DataError(
                    f"the features {path} can't be read ({error}); delete {path.parent} and they "
                    "are computed again"
                ) from None
        return self._files[path]

    @torch.no_grad()
    def _encode(self, reader: int, shard: int, device: str) -> None:
        self._encoder.to(device)
        media = self._data.readers[reader].usable(shard).tolist()
        rows: list[Tensor] = []
        for start in range(0, len(media), ENCODE_BATCH):
            units = [UnitRef(reader, medium, 0) for medium in media[start : start + ENCODE_BATCH]]
            rows += self._features(units, device)
        padded = pad_features(rows)
        tensors = {"values": padded.values, "lengths": padded.mask.sum(dim=1)}
        with committed_folder(self._folder(reader, shard)) as folder:
            (folder / HASH).write_text(save_tensors(folder / FILE, tensors))

    def _features(self, units: list[UnitRef], device: str) -> list[Tensor]:
        """Return the real feature tokens (N_b, D) of some media, fp32, on the CPU."""
        inputs = [transform(self._encoder, self._data, unit).to(device) for unit in units]
        first, last = self._data.unit_id(units[0]), self._data.unit_id(units[-1])
        with plugin_errors(f"the media {first} to {last} can't be encoded"):
            features = self._encoder(inputs).to("cpu", torch.float32)
        return [row[real] for row, real in zip(features.values, features.mask, strict=True)]
