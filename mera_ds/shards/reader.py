"""Random access to the samples of a shard folder by offset, without extracting anything."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import psutil
from numpy.typing import NDArray

from mera_ds.errors import DataError
from mera_ds.shards.ahead import read_ahead
from mera_ds.shards.cache import TarCache
from mera_ds.shards.format import (
    BLOCK,
    REBUILD,
    SampleInfo,
    ShardInfo,
    Text,
    parse_record,
    parse_texts,
    read_index,
)
from mera_ds.shards.quarantine import QUARANTINE, RENEW
from mera_ds.shards.remote import source_url
from mera_ds.shards.table import place_of
from mera_ds.shards.verify import has_sha256

T = TypeVar("T")
_NOTHING = SampleInfo("", "", "", 0, 0, 0, 0, ())


@dataclass(frozen=True)
class Reading:
    """How tars are opened."""

    verify: bool = False
    """Compare a tar's hash with the index when it is first opened."""
    cache_bytes: int = 50_000_000_000
    """Largest size of the folder of downloaded tars."""


class ShardReader:
    """Reads media and records by their position in the dataset (0 .. len - 1).

    Safe in threads and across fork: a positioned read shares no file offset, and a tar is opened
    when its first sample is asked for. The folder may be the mirror of a remote one.
    """

    def __init__(self, folder: Path, reading: Reading | None = None) -> None:
        """Open a complete shard folder.

        Raises:
            InputError: it has no index.
            DataError: the index is not of the format.
        """
        self.folder = folder
        self.index = read_index(folder)
        self.samples = self.index.samples
        self._reading = reading or Reading()
        self._url = source_url(folder)
        self._paths = [folder / shard.name for shard in self.index.shards]
        self._ahead = sum(shard.bytes for shard in self.index.shards) < _spare_memory()
        self._last: tuple[int | None, SampleInfo] = (None, _NOTHING)
        self._starts = [0, *accumulate(len(shard.samples) for shard in self.index.shards)][:-1]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def read_media(self, position: int) -> bytes:
        """Return a medium's bytes as they stood in the source.

        Raises:
            DataError: the sample is in quarantine, or its tar is missing, damaged, or shorter or
                longer than the index says.
        """
        return self._from_tar(position, read_media)

    def read_record(self, position: int) -> dict[str, Any]:
        """Return a sample's record: a dict with id, concept, source and texts.

        Raises:
            DataError: as `read_media`, or the record is damaged or another sample's.
        """
        return self._from_tar(position, read_record)

    def read_texts(self, position: int) -> tuple[Text, ...]:
        """Return a sample's texts in the order of the index.

        Raises:
            DataError: as `read_record`, or the texts aren't those that the index lists.
        """
        return self._from_tar(position, read_texts)

    def place(self, position: int) -> tuple[int, int]:
        """Return the number of a sample's tar, and its row among the usable samples of it."""
        number, _ = place_of(self._starts, position)
        return number, int(np.searchsorted(self.usable(number), position))

    def usable(self, number: int) -> NDArray[np.intp]:
        """Return the positions of a tar's samples that are not in quarantine."""
        start = self._starts[number]
        stop = start + len(self.index.shards[number].samples)
        first, last = np.searchsorted(self.index.usable, (start, stop))
        return self.index.usable[first:last]

    def require_whole(self) -> None:
        """Compare the sizes of local tars with the index, before anything is trained on them.

        Raises:
            DataError: one is truncated, missing or was changed.
        """
        if self._url is not None:
            return
        for shard in self.index.shards:
            path = self.folder / shard.name
            found = path.stat().st_size if path.exists() else 0
            expected = max(0, self._expected(shard)[0])
            if found != expected:
                record, remedy = self._record(shard)
                raise DataError(
                    f"{path} has {found} bytes, its {record} says {expected}: it is truncated or "
                    f"was changed; {remedy}"
                )

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
        last, sample = self._last  # a medium is read after its record
        if position == last:
            return sample
        if not 0 <= position < len(self):
            raise IndexError(f"{self.folder} has {len(self)} samples, none at {position}")
        sample = self.samples[position]
        quarantine = self.index.quarantine
        if quarantine is not None and sample.key in quarantine.samples:
            raise DataError(
                f"{self.folder}: {sample.key} is in quarantine ({quarantine.samples[sample.key]})"
            )
        self._last = (position, sample)
        return sample

    def _expected(self, shard: ShardInfo) -> tuple[int, str]:
        """Return a tar's size and hash: the index's, or as it was found when put in quarantine."""
        quarantine = self.index.quarantine
        if quarantine is not None and shard.name in quarantine.tars:
            found = quarantine.tars[shard.name]
            return found.bytes, found.sha256
        return shard.bytes, shard.sha256

    def _record(self, shard: ShardInfo) -> tuple[str, str]:
        """Return what says how a tar must be, and the remedy if it is not so."""
        quarantine = self.index.quarantine
        if quarantine is not None and shard.name in quarantine.tars:
            return "quarantine", RENEW
        return "index", f"{REBUILD}, or leave its samples out: {QUARANTINE}"

    def _from_tar(self, position: int, read: Callable[[int, Path, SampleInfo], T]) -> T:
        """Return what `read` finds of a sample in its tar.

        A local tar stays open. A downloaded one is held for this read only, so that it can be
        removed from the cache later.
        """
        sample = self._sample(position)
        number, _ = place_of(self._starts, position)
        path = self._paths[number]
        descriptor = self._files.get(number)
        if descriptor is not None:
            return read(descriptor, path, sample)
        shard = self.index.shards[number]
        if self._url is None:
            descriptor = self._open_local(path, shard)
            kept = self._files.setdefault(number, descriptor)
            if kept != descriptor:
                os.close(descriptor)
            return read(kept, path, sample)
        descriptor = self._open_cached(shard)
        try:
            return read(descriptor, path, sample)
        finally:
            os.close(descriptor)

    def _open_local(self, path: Path, shard: ShardInfo) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(f"{path} is listed in the index but missing; {REBUILD}") from None
        try:
            self._require_sound(path, shard, descriptor)
        except DataError:
            os.close(descriptor)
            raise
        if self._ahead:
            read_ahead(descriptor, shard.bytes)
        return descriptor

    def _require_sound(self, path: Path, shard: ShardInfo, descriptor: int) -> None:
        expected, sha256 = self._expected(shard)
        record, remedy = self._record(shard)
        size = os.fstat(descriptor).st_size
        if size != expected:
            raise DataError(
                f"{path} has {size} bytes, expected {expected} by its {record}; {remedy}"
            )
        if self._reading.verify and not has_sha256(path, descriptor, sha256):
            broken = [s.key for s in shard.samples if not _looks_sound(descriptor, path, s)]
            named = f"; damaged: {', '.join(broken[:8])}" if broken else ""
            raise DataError(
                f"{path}: its bytes 0 to {size} don't have the sha256 {sha256} of the "
                f"{record}{named}; {remedy}"
            )

    def _open_cached(self, shard: ShardInfo) -> int:
        assert self._url is not None
        cache = TarCache(self._reading.cache_bytes)
        size, sha256 = self._expected(shard)
        while True:
            descriptor = cache.open(f"{self._url}/{shard.name}", size, sha256)
            path = cache.folder / f"{sha256}-{size}.tar"
            whole = os.fstat(descriptor).st_size == size
            if whole and (not self._reading.verify or has_sha256(path, descriptor, sha256)):
                return descriptor
            os.close(descriptor)
            cache.discard(size, sha256)


def _spare_memory() -> int:
    """Return how many bytes of tars may be read ahead.

    A set that fits in memory is read tar by tar, from one end to the other, however its samples
    are shuffled; of a larger one only what is asked for.
    """
    return psutil.virtual_memory().available // 2


def read_media(descriptor: int, path: Path, sample: SampleInfo) -> bytes:
    """Return the medium of a sample from an open tar; DataError as `ShardReader.read_media`."""
    name = f"{sample.key}.{sample.extension}"
    return _read(descriptor, path, name, sample.media_offset, sample.media_size)


def read_record(descriptor: int, path: Path, sample: SampleInfo) -> dict[str, Any]:
    """Return the record of a sample from an open tar; DataError as `ShardReader.read_record`."""
    name = f"{sample.key}.json"
    content = _read(descriptor, path, name, sample.json_offset, sample.json_size)
    record = parse_record(content, sample.key, f"{path}: {name}")
    if record["concept"] != sample.concept:
        raise DataError(
            f"{path}: {name} has the concept {record['concept']!r}, in the index "
            f"{sample.concept!r}; {REBUILD}"
        )
    return record


def read_texts(descriptor: int, path: Path, sample: SampleInfo) -> tuple[Text, ...]:
    """Return the texts of a sample from an open tar; DataError as `ShardReader.read_texts`."""
    where = f"{path}: {sample.key}.json"
    texts = parse_texts(read_record(descriptor, path, sample), where)
    if tuple(text.info for text in texts) != sample.texts:
        raise DataError(f"{where}: its texts are not those in the index; {REBUILD}")
    return texts


def _looks_sound(descriptor: int, path: Path, sample: SampleInfo) -> bool:
    """Say whether a sample's headers and record are those of the index; media are not judged."""
    try:
        read_media(descriptor, path, sample)
        read_texts(descriptor, path, sample)
    except DataError:
        return False
    return True


def _read(descriptor: int, path: Path, name: str, offset: int, size: int) -> bytes:
    """Read a member; its header must stand in front of it, so that no offset can mislead."""
    small = size <= BLOCK  # one read for both, where cutting them apart costs less than a second
    start = max(0, offset - BLOCK)
    header = os.pread(descriptor, BLOCK + size if small else BLOCK, start)
    content = header[BLOCK:] if small else os.pread(descriptor, size, offset)
    header = header[:BLOCK]
    is_header = header[:100].rstrip(b"\0") == name.encode() and header[124:135] == b"%011o" % size
    if offset < BLOCK or (len(header) == BLOCK and not is_header):
        raise DataError(f"{path}: {name} ({size} bytes) does not lie at {offset}; {REBUILD}")
    if len(content) != size:
        raise DataError(
            f"{path}: {len(content)} of {size} bytes could be read at {offset}; {REBUILD}"
        )
    return content
