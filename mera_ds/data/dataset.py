"""Training and test units of one modality, read from shard folders by position.

A unit is a (medium, text) pair. The list of units, their ids and lengths come from the shard
indexes alone; media and texts are read when a unit is asked for.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mera_ds.batch import Sample
from mera_ds.config import ModalityConfig
from mera_ds.data.prompts import PromptBuilder, TokenPieces
from mera_ds.data.units import LazySequence, UnitList
from mera_ds.data.units import UnitRef as UnitRef
from mera_ds.errors import InputError
from mera_ds.media import decode
from mera_ds.shards.format import TASKS, Text, TextInfo
from mera_ds.shards.reader import Reading, ShardReader

TRAIN, TEST = "train", "test"


class ModalityData:
    """The shard sets of one modality and split."""

    def __init__(
        self,
        modality: str,
        folders: Sequence[Path],
        split: str,
        reading: Reading | None = None,
    ) -> None:
        self.modality = modality
        how = reading or Reading(verify=True)
        self.readers = [ShardReader(folder / split, how) for folder in folders]
        for reader in self.readers:
            found = reader.index.modality
            if found != modality:
                raise InputError(
                    f"{reader.folder} holds shards of modality '{found}', not '{modality}'; "
                    f"correct modalities.{modality}.data"
                )
            if reader.index.split != split:
                raise InputError(
                    f"{reader.folder} holds the split '{reader.index.split}', not '{split}'; "
                    f"correct modalities.{modality}.data"
                )
            reader.require_whole()
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

    @property
    def media_return(self) -> bool:
        """Whether a medium has several texts, so that an epoch asks for it more than once."""
        counts = [reader.index.counts for reader in self.readers]
        return any(entry["texts"] > entry["samples"] for entry in counts)

    def units(self, tasks: Collection[str]) -> UnitList:
        """Return all units of some tasks that are not in quarantine, in the order of the shards."""
        codes = [number for number, task in enumerate(TASKS) if task in tasks]
        starts = [reader.samples.text_starts for reader in self.readers]
        texts = []
        for reader, start in zip(self.readers, starts, strict=True):
            usable = np.zeros(len(reader), dtype=bool)
            usable[reader.index.usable] = True
            chosen = np.isin(reader.samples.tasks, codes) & np.repeat(usable, np.diff(start))
            texts.append(np.flatnonzero(chosen).astype(np.uint32))
        numbers = np.repeat(np.arange(len(texts), dtype=np.uint16), list(map(len, texts)))
        return UnitList(starts, numbers, np.concatenate(texts))

    def ids(self, units: Sequence[UnitRef]) -> LazySequence:
        """Return `unit_id` of units, each made when it is asked for."""
        return LazySequence(units, self.unit_id)

    def tasks(self, units: UnitList) -> list[str]:
        """Return `task` of units."""
        return [TASKS[code] for code in self.task_codes(units).tolist()]

    def task_codes(self, units: UnitList) -> NDArray[np.int64]:
        """Return the tasks of units as numbers (U,)."""
        return _gather([reader.samples.tasks for reader in self.readers], units)

    def lengths(self, units: UnitList) -> NDArray[np.int64]:
        """Return `length` of units."""
        return _gather([reader.samples.chars for reader in self.readers], units)

    def unit_id(self, unit: UnitRef) -> str:
        """Return `dataset/key#text`, which names the unit in lists and messages."""
        reader = self.readers[unit.reader]
        return f"{reader.index.dataset}/{reader.samples.key(unit.medium)}#{unit.text}"

    def dataset(self, unit: UnitRef) -> str:
        """Return the name of the unit's dataset."""
        return self.readers[unit.reader].index.dataset

    def task(self, unit: UnitRef) -> str:
        """Return the unit's task."""
        return self._info(unit).task

    def length(self, unit: UnitRef) -> int:
        """Return the unit's text length in characters, known without reading it."""
        return self._info(unit).chars

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

    def _info(self, unit: UnitRef) -> TextInfo:
        return self.readers[unit.reader].samples[unit.medium].texts[unit.text]


def _gather(columns: Sequence[NDArray[Any]], units: UnitList) -> NDArray[Any]:
    """Return each unit's value from the column of its shard set."""
    values = np.zeros(len(units), dtype=np.int64)
    for number, column in enumerate(columns):
        chosen = units.readers == number
        values[chosen] = column[units.texts[chosen]]
    return values


class MediaCache:
    """The last media that were decoded and transformed, up to a number of bytes.

    Texts of one medium often meet in a step (a clip has 40 captions); it is decoded once.
    """

    def __init__(self, load: Callable[[UnitRef], Tensor], limit: int) -> None:
        self._load = load
        self._limit = limit
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._size = 0

    def __call__(self, unit: UnitRef) -> Tensor:
        """Return a unit's medium; don't change it."""
        place = (unit.reader, unit.medium)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        media = self._load(unit)
        if media.nbytes <= self._limit:
            self._kept[place] = media
            self._size += media.nbytes
        while self._size > self._limit:
            self._size -= self._kept.popitem(last=False)[1].nbytes
        return media


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

    def task_codes(self, units: UnitList) -> NDArray[np.int64]:
        """Return the tasks of units as numbers (U,)."""
        return self._data.task_codes(units)

    def pieces(self, unit: UnitRef, supervised: bool = True) -> TokenPieces:
        """Return the token ids of a unit's text, without touching its medium."""
        text, where = self._data.text(unit), self._data.unit_id(unit)
        return self._prompts.build_text(text, self._caption_prompt, where, supervised)

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
