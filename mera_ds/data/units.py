"""Lists of units in columns: what a unit is, and millions of them in six bytes each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class UnitRef:
    """Where a unit is: shard set, medium in it, text of the medium."""

    reader: int
    medium: int
    text: int


class UnitList(Sequence[UnitRef]):
    """Units by the number of their shard set and of their text in it (0 .. texts - 1)."""

    def __init__(
        self,
        text_starts: Sequence[NDArray[Any]],
        readers: NDArray[np.uint16],
        texts: NDArray[np.uint32],
    ) -> None:
        """Take columns (U,), and for each shard set where the texts of each medium start."""
        self._text_starts = text_starts
        self.readers = readers
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, position: int) -> UnitRef: ...
    @overload
    def __getitem__(self, position: slice) -> "UnitList": ...
    def __getitem__(self, position: int | slice) -> "UnitRef | UnitList":
        if isinstance(position, slice):
            return UnitList(self._text_starts, self.readers[position], self.texts[position])
        reader, text = int(self.readers[position]), int(self.texts[position])
        starts = self._text_starts[reader]
        medium = int(np.searchsorted(starts, text, side="right")) - 1
        return UnitRef(reader, medium, text - int(starts[medium]))

    @property
    def media(self) -> NDArray[np.int64]:
        """Return a number (U,) for each unit's medium, equal for the texts of one."""
        numbers = np.zeros(len(self), dtype=np.int64)
        before = 0
        for reader, starts in enumerate(self._text_starts):
            chosen = self.readers == reader
            found = np.searchsorted(starts, self.texts[chosen], side="right") - 1
            numbers[chosen] = before + found
            before += len(starts)
        return numbers

    def take(self, positions: ArrayLike) -> "UnitList":
        """Return the units at some positions."""
        chosen = np.asarray(positions, dtype=np.intp)
        return UnitList(self._text_starts, self.readers[chosen], self.texts[chosen])


class LazySequence(Sequence[str]):
    """A string for every unit, made when it is asked for."""

    def __init__(self, units: Sequence[UnitRef], name: Callable[[UnitRef], str]) -> None:
        self._units = units
        self._name = name

    def __len__(self) -> int:
        return len(self._units)

    @overload
    def __getitem__(self, position: int) -> str: ...
    @overload
    def __getitem__(self, position: slice) -> "LazySequence": ...
    def __getitem__(self, position: int | slice) -> "str | LazySequence":
        if isinstance(position, slice):
            return LazySequence(self._units[position], self._name)
        return self._name(self._units[position])

    def __iter__(self) -> Iterator[str]:
        return map(self._name, self._units)
