"""Training and test units of one modality, read from shard folders by position.

A unit is a (medium, text) pair. The list of units, their ids and lengths come from the shard
indexes alone; media and texts are read when a unit is asked for.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mera_ds.batch import Sample
from mera_ds.config import ModalityConfig
from mera_ds.data.prompts import PromptBuilder, TokenPieces
from mera_ds.errors import DataError, InputError
from mera_ds.media import decode
from mera_ds.shards.format import Text
from mera_ds.shards.reader import ShardReader

TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class UnitRef:
    """Where a unit is: shard set, medium in it, text of the medium."""

    reader: int
    medium: int
    text: int


class ModalityData:
    """The shard sets of one modality and split."""

    def __init__(self, modality: str, folders: Sequence[Path], split: str) -> None:
        self.modality = modality
        self.readers = [ShardReader(folder / split) for folder in folders]
        for reader in self.readers:
            found = reader.index.modality
            if found != modality:
                raise InputError(
                    f"{reader.folder} holds shards of modality '{found}', not '{modality}'; "
                    f"correct modalities.{modality}.data"
                )
            _require_whole_tars(reader)
        names = [reader.index.dataset for reader in self.readers]
        if len(set(names)) < len(names):
            raise InputError(
                f"modalities.{modality}.data holds two shard sets of one name "
                f"({', '.join(names)}); samples are known by it, so build one under another name"
            )

    @property
    def fingerprint(self) -> list[str]:
        """Hashes of the shard sets' contents."""
        return [reader.index.fingerprint for reader in self.readers]

    def units(self, tasks: Collection[str]) -> list[UnitRef]:
        """Return all units of some tasks, in the order of the shards."""
        return [
            UnitRef(number, position, text)
            for number, reader in enumerate(self.readers)
            for position, sample in enumerate(reader.samples)
            for text, info in enumerate(sample.texts)
            if info.task in tasks
        ]

    def unit_id(self, unit: UnitRef) -> str:
        """Return `dataset/key#text`, which names the unit in lists and messages."""
        reader = self.readers[unit.reader]
        return f"{reader.index.dataset}/{reader.samples[unit.medium].key}#{unit.text}"

    def dataset(self, unit: UnitRef) -> str:
        """Return the name of the unit's dataset."""
        return self.readers[unit.reader].index.dataset

    def task(self, unit: UnitRef) -> str:
        """Return the unit's task."""
        return self.readers[unit.reader].samples[unit.medium].texts[unit.text].task

    def length(self, unit: UnitRef) -> int:
        """Return the unit's text length in characters, known without reading it."""
        return self.readers[unit.reader].samples[unit.medium].texts[unit.text].chars

    def text(self, unit: UnitRef) -> Text:
        """Read the unit's text."""
        return self.readers[unit.reader].read_texts(unit.medium)[unit.text]

    def medium(self, unit: UnitRef, kind: str) -> Any:
        """Read and decode the unit's medium.

        Raises:
            DataError: naming the sample, if it can't be decoded.
        """
        reader = self.readers[unit.reader]
        sample = reader.samples[unit.medium]
        name = f"{reader.folder}: {sample.key}.{sample.extension}"
        return decode(kind, sample.extension, reader.read_media(unit.medium), name)


def _require_whole_tars(reader: ShardReader) -> None:
    """Compare the tars' sizes with the index, before anything is trained on them."""
    for shard in reader.index.shards:
        path = reader.folder / shard.name
        found = path.stat().st_size if path.exists() else 0
        if found != shard.bytes:
            raise DataError(
                f"{path} has {found} bytes, its index says {shard.bytes}: it is truncated or was "
                "changed; copy or build the shard set again"
            )


class UnitReader:
    """Builds the `Sample` of a unit: text to token pieces, medium to encoder input or features."""

    def __init__(
        self,
        data: ModalityData,
        config: ModalityConfig,
        prompts: PromptBuilder,
        load_medium: Callable[[UnitRef], Tensor],
        encoded: bool,
    ) -> None:
        self._data = data
        self._caption_prompt = config.caption_prompt
        self._prompts = prompts
        self._load_medium = load_medium
        self._encoded = encoded

    def task(self, unit: UnitRef) -> str:
        """Return the unit's task."""
        return self._data.task(unit)

    def pieces(self, unit: UnitRef, supervised: bool = True) -> TokenPieces:
        """Return the token ids of a unit's text, without touching its medium."""
        where = self._data.unit_id(unit)
        text = self._data.text(unit)
        if not text.answers:
            raise DataError(f"{where} has no answer; rebuild the shard set")
        caption = text.task == "caption"
        question = self._caption_prompt if caption else self._prompts.ask(text.question)
        return self._prompts.build(question, text.answers[0] if supervised else None, where)

    def read(self, unit: UnitRef, supervised: bool = True) -> Sample:
        """Return a sample, with its answer (training) or without (generation)."""
        pieces = self.pieces(unit, supervised)
        return Sample(
            id=self._data.unit_id(unit),
            modality=self._data.modality,
            prefix_ids=pieces.prefix,
            suffix_ids=pieces.suffix,
            answer_ids=pieces.answer,
            media=self._load_medium(unit),
            encoded=self._encoded,
        )
