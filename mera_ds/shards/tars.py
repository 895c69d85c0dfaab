"""Writes one tar of a shard folder: under a temporary name until it is whole, then recorded."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mera_ds.files import (
    TEMPORARY,
    failpoint,
    full_disk_is_an_error,
    sync_folder,
    write_bytes,
)
from mera_ds.shards.format import (
    BLOCK,
    SampleInfo,
    ShardInfo,
    Text,
    member_header,
    padding,
    shard_json,
)

BUILDING = ".building"
"""Folder in an unfinished shard folder: its lock, and a record for each finished tar."""
_RECORD = 20 * BLOCK
"""Tars are padded to this size, as `tar` itself does."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """A medium as it stands in the source, with all its texts."""

    key: str
    extension: str
    media: bytes
    concept: str
    source: str
    texts: tuple[Text, ...]


class TarWriter:
    """One tar being written under a temporary name."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:05d}.tar"
        self.used = 0
        self._number = number
        self._temporary = self.path.with_name(f"{self.path.name}{TEMPORARY}-{os.getpid()}")
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._samples: list[SampleInfo] = []

    def add(self, sample: RawSample, record: bytes) -> None:
        """Append the two members of a sample."""
        with full_disk_is_an_error(self.path):
            media_offset = self._add_member(f"{sample.key}.{sample.extension}", sample.media)
            failpoint("shards.in_tar")
            json_offset = self._add_member(f"{sample.key}.json", record)
        self._samples.append(
            SampleInfo(
                key=sample.key,
                concept=sample.concept,
                extension=sample.extension,
                media_offset=media_offset,
                media_size=len(sample.media),
                json_offset=json_offset,
                json_size=len(record),
                texts=tuple(text.info for text in sample.texts),
            )
        )

    def finish(self, plan: str) -> ShardInfo:
        """Give the tar its final name, and record that it is finished."""
        with full_disk_is_an_error(self.path):
            end = self.used + 2 * BLOCK
            self._write(bytes(2 * BLOCK + padding(end, _RECORD)))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            failpoint("shards.tar_written")
            self._temporary.replace(self.path)
            sync_folder(self.path.parent)
        failpoint("shards.tar_renamed")
        shard = ShardInfo(self.path.name, self.used, self._hash.hexdigest(), tuple(self._samples))
        record = {"plan": plan, "shard": shard_json(shard)}
        content = json.dumps(record, separators=(",", ":")).encode()
        write_bytes(record_path(self.path.parent, self._number), content)
        failpoint("shards.tar_recorded")
        return shard

    def discard(self) -> None:
        """Close and remove what has not become a finished tar."""
        with suppress(OSError):  # a full disk refuses the buffered rest once more
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _add_member(self, name: str, payload: bytes) -> int:
        self._write(member_header(name, len(payload)))
        offset = self.used
        self._write(payload)
        self._write(bytes(padding(len(payload))))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.used += len(content)


def record_path(folder: Path, number: int) -> Path:
    """Return where it is recorded that a tar of an unfinished folder is finished."""
    return folder / BUILDING / f"{number:05d}.json"


def members_size(media_size: int, json_size: int) -> int:
    """Return how many bytes of a tar a medium and its record take."""
    return 2 * BLOCK + sum(size + padding(size) for size in (media_size, json_size))
