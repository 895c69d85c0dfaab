"""The samples of an index in memory: numpy columns that read like a tuple of `SampleInfo`.

A training set has millions of texts. As Python objects each would cost hundreds of bytes, once
more in every loader process (reading an object writes its reference count, so forked pages don't
stay shared). In columns a text costs 5 bytes and a sample about 50 bytes besides its strings.
"""

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

TASKS = ("caption", "qa")
Integers = NDArray[np.signedinteger[Any]]


class TextInfo(NamedTuple):
    """What the index says of a text: its task, and its length (question + first answer)."""

    task: str
    chars: int


class SampleInfo(NamedTuple):
    """Where a sample lies in its tar. Offsets are those of the payloads, in bytes."""

    key: str
    concept: str
    extension: str
    media_offset: int
    media_size: int
    json_offset: int
    json_size: int
    texts: tuple[TextInfo, ...]


@dataclass(frozen=True, slots=True)
class _Columns:
    """All samples of an index (S samples, T texts)."""

    keys: bytes
    key_starts: Integers
    """(S + 1,) where each key starts in `keys`; `concept_starts` and `text_starts` likewise."""
    concepts: bytes
    concept_starts: Integers
    extensions: tuple[str, ...]
    extension: Integers
    """(S,) position in `extensions`."""
    places: Integers
    """(S, 4): offset and size of the medium, offset and size of the record."""
    text_starts: Integers
    tasks: NDArray[np.uint8]
    """(T,) position in `TASKS`."""
    chars: Integers
    """(T,) length of the text in characters."""


class SampleTable(Sequence[SampleInfo]):
    """A stretch of the samples of an index."""

    __slots__ = ("_columns", "_start", "_stop")

    def __init__(self, columns: _Columns, start: int, stop: int) -> None:
        self._columns = columns
        self._start = start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, position: int) -> SampleInfo: ...
    @overload
    def __getitem__(self, position: slice) -> "SampleTable | tuple[SampleInfo, ...]": ...
    def __getitem__(
        self, position: int | slice
    ) -> "SampleInfo | SampleTable | tuple[SampleInfo, ...]":
        if isinstance(position, slice):
            start, stop, step = position.indices(len(self))
            if step != 1:
                return tuple(self[number] for number in range(start, stop, step))
            return SampleTable(self._columns, self._start + start, self._start + max(start, stop))
        if not -len(self) <= position < len(self):
            raise IndexError(f"no sample {position} among {len(self)}")
        return self._sample(self._start + position % len(self))

    def __iter__(self) -> Iterator[SampleInfo]:
        return map(self._sample, range(self._start, self._stop))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def nbytes(self) -> int:
        """Bytes of the columns that this stretch is cut from."""
        columns = self._columns
        arrays = (
            *(columns.key_starts, columns.concept_starts, columns.text_starts),
            *(columns.extension, columns.places, columns.tasks, columns.chars),
        )
        return len(columns.keys) + len(columns.concepts) + sum(entry.nbytes for entry in arrays)

    def key(self, position: int) -> str:
        """Return a sample's key without making the other fields."""
        return self._key(self._start + position)

    def keys(self) -> Iterator[str]:
        """Yield all keys."""
        keys = self._columns.keys
        bounds = itertools.pairwise(self._columns.key_starts[self._start : self._stop + 1].tolist())
        return (keys[start:stop].decode() for start, stop in bounds)

    @property
    def text_starts(self) -> Integers:
        """(len + 1,) where each sample's texts start in `tasks` and `chars`."""
        starts = self._columns.text_starts[self._start : self._stop + 1]
        return starts - starts[0] if self._start else starts

    @property
    def tasks(self) -> NDArray[np.uint8]:
        """The task of every text, as position in `TASKS`."""
        return self._columns.tasks[self._texts]

    @property
    def chars(self) -> Integers:
        """The length of every text in characters."""
        return self._columns.chars[self._texts]

    @property
    def _texts(self) -> slice:
        starts = self._columns.text_starts
        return slice(int(starts[self._start]), int(starts[self._stop]))

    def _key(self, row: int) -> str:
        columns = self._columns
        start, stop = columns.key_starts[row : row + 2].tolist()
        return columns.keys[start:stop].decode()

    def _sample(self, row: int) -> SampleInfo:
        columns = self._columns
        first, last = columns.concept_starts[row : row + 2].tolist()
        start, stop = columns.text_starts[row : row + 2].tolist()
        tasks, chars = columns.tasks[start:stop].tolist(), columns.chars[start:stop].tolist()
        media_offset, media_size, json_offset, json_size = columns.places[row].tolist()
        return SampleInfo(
            self._key(row),
            columns.concepts[first:last].decode(),
            columns.extensions[columns.extension[row]],
            media_offset,
            media_size,
            json_offset,
            json_size,
            tuple([TextInfo(TASKS[task], n) for task, n in zip(tasks, chars, strict=True)]),
        )


class TableBuilder:
    """Collects samples one by one in growing arrays."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self._concepts = bytearray()
        self._starts = (array("q", [0]), array("q", [0]), array("q", [0]))
        self._extensions: dict[str, int] = {}
        self._extension = array("i")
        self._places = array("q")
        self._tasks = bytearray()
        self._chars = array("q")

    def __len__(self) -> int:
        return len(self._extension)

    def add(
        self,
        key: str,
        concept: str,
        extension: str,
        places: tuple[int, int, int, int],
        texts: Iterable[tuple[str, int]],
    ) -> None:
        """Append a sample, given as the fields of `SampleInfo`; integers must fit in 63 bits."""
        for task, chars in texts:
            self._tasks.append(TASKS.index(task))
            self._chars.append(chars)
        self._keys += key.encode()
        self._concepts += concept.encode()
        keys, concepts, ends = self._starts
        keys.append(len(self._keys))
        concepts.append(len(self._concepts))
        ends.append(len(self._tasks))
        self._extension.append(self._extensions.setdefault(extension, len(self._extensions)))
        self._places.extend(places)

    def build(self, stops: Iterable[int]) -> list[SampleTable]:
        """Return the samples as tables that end at these positions, one behind the other."""
        keys, concepts, texts = map(_compact, self._starts)
        columns = _Columns(
            keys=bytes(self._keys),
            key_starts=keys,
            concepts=bytes(self._concepts),
            concept_starts=concepts,
            extensions=tuple(self._extensions),
            extension=_compact(self._extension),
            places=_compact(self._places).reshape(-1, 4),
            text_starts=texts,
            tasks=np.frombuffer(bytes(self._tasks), np.uint8),
            chars=_compact(self._chars),
        )
        bounds = [0, *stops]
        return [SampleTable(columns, start, stop) for start, stop in itertools.pairwise(bounds)]


def table_of(samples: Iterable[SampleInfo]) -> SampleTable:
    """Return samples as a table."""
    builder = TableBuilder()
    for sample in samples:
        places = (sample.media_offset, sample.media_size, sample.json_offset, sample.json_size)
        texts = [(text.task, text.chars) for text in sample.texts]
        builder.add(sample.key, sample.concept, sample.extension, places, texts)
    return builder.build([len(builder)])[0]


def whole_table(tables: Sequence[Sequence[SampleInfo]]) -> SampleTable:
    """Return several tables as one; without a copy if they are neighbours, as in a read index."""
    first = next(iter(tables), None)
    if isinstance(first, SampleTable):
        stretches = [table for table in tables if isinstance(table, SampleTable)]
        neighbours = all(
            one._columns is other._columns and one._stop == other._start
            for one, other in itertools.pairwise(stretches)
        )
        if len(stretches) == len(tables) and neighbours:
            return SampleTable(first._columns, first._start, stretches[-1]._stop)
    return table_of(sample for table in tables for sample in table)


def place_of(starts: Sequence[int], position: int) -> tuple[int, int]:
    """Return which stretch a position lies in, and where in it, given where each starts."""
    number = bisect_right(starts, position) - 1
    return number, position - starts[number]


def _compact(values: "array[int]") -> Integers:
    """Return values as 32 bits where they fit, otherwise as 64."""
    wide = np.array(values, dtype=np.int64)
    fits = not len(wide) or int(wide.max()) <= np.iinfo(np.int32).max
    return wide.astype(np.int32) if fits else wide
