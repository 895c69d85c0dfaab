"""Random access to the samples of a shard folder by offset, without extracting anything."""

import os
from bisect import bisect_right
from pathlib import Path
from types import TracebackType
from typing import Any

from mera_ds.errors import DataError
from mera_ds.shards.format import (
    REBUILD,
    SampleInfo,
    Text,
    parse_record,
    parse_texts,
    read_index,
)


class ShardReader:
    """Reads media and records by their position in the dataset (0 .. len - 1).

    Safe in threads and across fork: a positioned read shares no file offset, and a tar is opened
    when its first sample is asked for.
    """

    def __init__(self, folder: Path) -> None:
        """Open a complete shard folder.

        Raises:
            InputError: it has no index.
            DataError: the index is not of the format.
        """
        self.folder = folder
        self.index = read_index(folder)
        self.samples = self.index.samples
        self._starts: list[int] = []
        start = 0
        for shard in self.index.shards:
            self._starts.append(start)
            start += len(shard.samples)
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def read_media(self, position: int) -> bytes:
        """Return a medium's bytes as they stood in the source.

        Raises:
            DataError: the tar is missing, or shorter or longer than the index says.
        """
        sample = self._sample(position)
        return self._read(position, sample.media_offset, sample.media_size)

    def read_record(self, position: int) -> dict[str, Any]:
        """Return a sample's record: a dict with id, concept, source and texts.

        Raises:
            DataError: the tar or the record is damaged, or the record is another sample's.
        """
        sample = self._sample(position)
        content = self._read(position, sample.json_offset, sample.json_size)
        return parse_record(content, sample.key, self._name(position, sample))

    def read_texts(self, position: int) -> tuple[Text, ...]:
        """Return a sample's texts in the order of the index.

        Raises:
            DataError: as `read_record`, or the texts aren't those that the index lists.
        """
        sample = self._sample(position)
        where = self._name(position, sample)
        texts = parse_texts(self.read_record(position), where)
        if tuple(text.info for text in texts) != sample.texts:
            raise DataError(f"{where}: its texts are not those in the index; {REBUILD}")
        return texts

    def close(self) -> None:
        """Close the tars; reading again opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _sample(self, position: int) -> SampleInfo:
        if not 0 <= position < len(self):
            raise IndexError(f"{self.folder} has {len(self)} samples, none at {position}")
        return self.samples[position]

    def _shard_number(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1

    def _name(self, position: int, sample: SampleInfo) -> str:
        shard = self.index.shards[self._shard_number(position)]
        return f"{self.folder / shard.name}: {sample.key}.json"

    def _read(self, position: int, offset: int, size: int) -> bytes:
        number = self._shard_number(position)
        content = os.pread(self._open(number), size, offset)
        if len(content) != size:
            path = self.folder / self.index.shards[number].name
            raise DataError(
                f"{path}: {len(content)} of {size} bytes could be read at {offset}; {REBUILD}"
            )
        return content

    def _open(self, number: int) -> int:
        if number in self._files:
            return self._files[number]
        shard = self.index.shards[number]
        path = self.folder / shard.name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(f"{path} is listed in the index but missing; {REBUILD}") from None
        size = os.fstat(descriptor).st_size
        if size != shard.bytes:
            os.close(descriptor)
            raise DataError(f"{path} has {size} bytes, expected {shard.bytes}; {REBUILD}")
        kept = self._files.setdefault(number, descriptor)
        if kept != descriptor:
            os.close(descriptor)
        return kept
