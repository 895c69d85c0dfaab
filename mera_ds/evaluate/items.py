"""Which tests a modality has, and their items, found in the columns of the shard indexes."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mera_ds.data.dataset import ModalityData, UnitRef
from mera_ds.data.units import UnitList
from mera_ds.shards.format import TASKS


@dataclass(frozen=True)
class Item:
    """One test item: for captions a medium with all its captions, for QA one question."""

    unit: UnitRef
    question: str
    references: tuple[str, ...]


def test_tasks(data: ModalityData) -> list[tuple[str, str]]:
    """Return dataset and task of every test that a modality has, sorted."""
    return sorted(
        (data.readers[number].index.dataset, task)
        for task in TASKS
        for number in np.unique(data.units([task]).readers).tolist()
    )


def test_items(data: ModalityData, dataset: str, task: str, limit: int | None) -> list[Item]:
    """Return the items of a task: each medium once for captions, each question once for QA.

    Only the texts of these items are read, medium by medium.
    """
    units = data.units([task])
    names = [reader.index.dataset for reader in data.readers]
    of_dataset = np.isin(units.readers, [n for n, name in enumerate(names) if name == dataset])
    units = units.take(np.flatnonzero(of_dataset))
    if task == "caption":
        return [_caption_item(data, group) for group in _by_medium(units, limit)]
    return [item for group in _by_medium(units[:limit], None) for item in _questions(data, group)]


def _by_medium(units: UnitList, limit: int | None) -> list[UnitList]:
    """Return the units of one dataset in groups of one medium each, the first `limit` of these."""
    bounds = [*np.flatnonzero(np.diff(units.media, prepend=-1)).tolist(), len(units)]
    return [units[first:last] for first, last in list(pairwise(bounds))[:limit]]


def _caption_item(data: ModalityData, units: UnitList) -> Item:
    first = units[0]
    texts = data.readers[first.reader].read_texts(first.medium)
    answers = [answer for unit in units for answer in texts[unit.text].answers]
    return Item(first, texts[first.text].question, tuple(answers))


def _questions(data: ModalityData, units: UnitList) -> list[Item]:
    texts = data.readers[units[0].reader].read_texts(units[0].medium)
    return [Item(unit, texts[unit.text].question, texts[unit.text].answers) for unit in units]
