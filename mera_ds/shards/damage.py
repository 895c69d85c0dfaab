"""Finds what must be left out of a damaged shard folder, and puts it in quarantine.

The index holds one hash per tar, so what can be kept of a damaged tar is what can be proven: in
a tar that was cut, the samples before the cut whose headers, records and media are sound; in a
tar of the right size with other bytes, nothing, since any medium may hold them.
"""

import os
from collections.abc import Callable
from pathlib import Path

from mera_ds.errors import DataError
from mera_ds.files import sha256_file
from mera_ds.shards.format import SampleInfo, ShardIndex, ShardInfo, hash_index, read_index
from mera_ds.shards.quarantine import QUARANTINE_NAME, FoundTar, Quarantine, write_quarantine
from mera_ds.shards.reader import read_media, read_texts

Decode = Callable[[str, bytes, str], object]
"""(extension, content, name for messages) -> the decoded medium; raises DataError if broken."""


def quarantine_folder(folder: Path, decode: Decode | None = None) -> Quarantine:
    """Examine every sample of a shard folder and write its quarantine (none if all is sound).

    Raises:
        InputError: the folder has no index.
        DataError: the index itself is damaged: nothing can be said then.
    """
    (folder / QUARANTINE_NAME).unlink(missing_ok=True)
    index = read_index(folder)
    quarantine = find_damage(folder, index, decode)
    write_quarantine(folder, quarantine)
    return quarantine


def find_damage(folder: Path, index: ShardIndex, decode: Decode | None = None) -> Quarantine:
    """Return which samples can't be used, with reasons, and the damaged tars as they are."""
    samples: dict[str, str] = {}
    tars: dict[str, FoundTar] = {}
    for shard in index.shards:
        path = folder / shard.name
        if not path.is_file():
            samples |= {sample.key: f"{shard.name} is missing" for sample in shard.samples}
            tars[shard.name] = FoundTar(bytes=-1, sha256="")
            continue
        found = FoundTar(bytes=path.stat().st_size, sha256=sha256_file(path))
        if (found.bytes, found.sha256) != (shard.bytes, shard.sha256):
            tars[shard.name] = found
        samples |= _lost(path, shard, found, decode)
    return Quarantine(index=hash_index(index), samples=samples, tars=tars)


def _lost(path: Path, shard: ShardInfo, found: FoundTar, decode: Decode | None) -> dict[str, str]:
    if found.bytes >= shard.bytes and found.sha256 != shard.sha256:
        reason = (
            f"{shard.name} has {found.bytes} bytes with the sha256 {found.sha256}, expected "
            f"{shard.bytes} with {shard.sha256}; which of them are damaged can't be told"
        )
        return {sample.key: reason for sample in shard.samples}
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        reasons = {s.key: _problem(descriptor, path, s, decode) for s in shard.samples}
    finally:
        os.close(descriptor)
    return {key: reason for key, reason in reasons.items() if reason is not None}


def _problem(descriptor: int, path: Path, sample: SampleInfo, decode: Decode | None) -> str | None:
    try:
        content = read_media(descriptor, path, sample)
        read_texts(descriptor, path, sample)
        if decode is not None:
            decode(sample.extension, content, f"{path}: {sample.key}.{sample.extension}")
    except DataError as error:
        return str(error)
    return None
