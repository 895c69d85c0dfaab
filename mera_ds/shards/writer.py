"""Writes shard folders: deterministic to the byte, atomic, and resumable after a kill.

While a folder is being written it holds `.building/`: a lock, and one record for each finished
tar. A rerun checks the recorded tars and goes on behind them. The index comes last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from mera_ds.errors import DataError, InputError
from mera_ds.files import (
    failpoint,
    folder_lock,
    read_json,
    remove_temporaries,
    require_space,
    sha256_file,
    sha256_json,
    write_bytes,
)
from mera_ds.shards.format import (
    INDEX_NAME,
    Choices,
    SampleInfo,
    ShardIndex,
    ShardInfo,
    count_samples,
    hash_keys,
    index_bytes,
    index_json,
    parse_shard,
    read_index,
    record_bytes,
)
from mera_ds.shards.quarantine import QUARANTINE_NAME
from mera_ds.shards.rules import SIDE_FILES, sample_problems
from mera_ds.shards.tars import BUILDING, RawSample, TarWriter, members_size, record_path

__all__ = ["DEFAULT_SHARD_BYTES", "RawSample", "SampleSource", "write_shards"]

DEFAULT_SHARD_BYTES = 256 << 20

SampleSource: TypeAlias = RawSample | Callable[[], RawSample]
"""A sample, or a function that reads it when its turn comes."""


@dataclass(frozen=True)
class _Plan:
    """What is to be written, and where."""

    folder: Path
    head: ShardIndex
    """The index without shards and counts."""
    samples: Sequence[SampleSource]
    shard_bytes: int
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Equal for two builds whose finished tars may be mixed."""
        return sha256_json([index_json(self.head), self.shard_bytes, len(self.samples)])


def write_shards(
    folder: Path,
    dataset: str,
    split: str,
    modality: str,
    samples: Sequence[SampleSource],
    licence: str,
    recipe: Mapping[str, Any],
    choices: Choices | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    readers: int = 1,
    files: Mapping[str, str] | None = None,
) -> ShardIndex:
    """Write `samples` in their order as the shard folder `folder`, and return its index.

    A complete folder of the same content is verified and kept; after a kill the finished tars
    are verified and kept. Samples given as functions aren't called for that: `recipe` must hold
    all they depend on (names, sizes or hashes of the source files, version, filters). `readers`
    threads call them ahead of the writing; the result doesn't depend on their number. `files`
    (name -> text, see `rules.SIDE_FILES`) come to lie beside the index, and their hashes in it.

    Raises:
        InputError: there is no sample, or a size is not positive.
        DataError: a bad or duplicate key, an empty medium or text, an answer outside `choices`.
        ResourceError: the disk is full; the finished tars stay for the next run.
        LockedError: another process is writing this folder.
    """
    if not samples:
        raise InputError(f"{folder}: no sample to write; check the recipe's source and filters")
    if shard_bytes < 1 or readers < 1:
        raise InputError(f"shard_bytes ({shard_bytes}) and readers ({readers}) must be at least 1")
    if choices and set(choices) != {"qa"}:
        raise InputError(f"choices are for the task qa only, not for {sorted(choices)}")
    closed = choices["qa"] if choices else None
    files = files or {}
    if files:
        hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
        recipe = {**recipe, "files": hashes}
    head = ShardIndex(
        dataset=dataset,
        split=split,
        modality=modality,
        licence=licence,
        recipe=json.loads(json.dumps(recipe)),
        counts={},
        choices={"qa": None if closed is None else tuple(closed)},
        id_list_sha256="",
        shards=(),
    )
    plan = _Plan(folder, head, samples, shard_bytes, files)
    _refuse_bad_samples(plan)
    with folder_lock(folder / BUILDING):
        remove_temporaries(folder)
        index = _complete_index(plan)
        if index is None:
            (folder / INDEX_NAME).unlink(missing_ok=True)
            index = _index(plan, _write_missing(plan, _finished_shards(plan), readers))
            for name, text in files.items():
                write_bytes(folder / name, text.encode())
            failpoint("shards.before_index")
            (folder / QUARANTINE_NAME).unlink(missing_ok=True)  # it was of the tars before
            write_bytes(folder / INDEX_NAME, index_bytes(index))
            failpoint("shards.index_written")
        _remove_others(folder, {*files, *(shard.name for shard in index.shards)})
    return index


def _refuse_bad_samples(plan: _Plan) -> None:
    """Name all bad samples that are known before anything is written."""
    known = [sample for sample in plan.samples if isinstance(sample, RawSample)]
    bad = [f"{sample.key}: {line}" for sample in known for line in _problems(plan, sample)]
    first: dict[str, RawSample] = {}
    for sample in known:
        twin = first.setdefault(sample.key, sample)
        if twin is not sample:
            bad.append(f"{sample.key}: the key of {twin.source} and of {sample.source}")
    if bad:
        more = f"\n  and {len(bad) - 20} more" if len(bad) > 20 else ""
        lines = "\n  ".join(bad[:20])
        raise DataError(f"{plan.folder}: correct or leave out these samples:\n  {lines}{more}")
    require_space(plan.folder, sum(len(sample.media) for sample in known))


def _problems(plan: _Plan, sample: RawSample) -> list[str]:
    return sample_problems(
        sample.key,
        sample.extension,
        len(sample.media),
        sample.concept,
        sample.texts,
        plan.head.choices,
    )


def _complete_index(plan: _Plan) -> ShardIndex | None:
    """Return the folder's index if it is complete, undamaged and of just this content."""
    if not (plan.folder / INDEX_NAME).exists():
        return None
    try:
        index = read_index(plan.folder)
    except DataError:
        return None
    if index_json(index) != index_json(_index(plan, index.shards)):
        return None
    if len(index.samples) != len(plan.samples) or not _cut_at(index.shards, plan.shard_bytes):
        return None
    for name, text in plan.files.items():
        path = plan.folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            return None
    start = 0
    for shard in index.shards:
        if not _holds(plan, shard, start):
            return None
        start += len(shard.samples)
    if index.quarantine is not None and index.quarantine.tars:  # they are whole again
        (plan.folder / QUARANTINE_NAME).unlink()
        index = read_index(plan.folder)
    return index


def _cut_at(shards: Sequence[ShardInfo], shard_bytes: int) -> bool:
    """Say whether these are the tars that a limit of `shard_bytes` gives."""
    used = [sum(map(_stored_size, shard.samples)) for shard in shards]
    fits = all(
        size <= shard_bytes or len(shard.samples) == 1
        for size, shard in zip(used, shards, strict=True)
    )
    full = all(
        size + _stored_size(following.samples[0]) > shard_bytes
        for size, following in zip(used, shards[1:], strict=False)
    )
    return fits and full


def _finished_shards(plan: _Plan) -> list[ShardInfo]:
    """Return the leading tars that an interrupted build of the same plan finished."""
    finished: list[ShardInfo] = []
    start = 0
    while (path := record_path(plan.folder, len(finished))).exists():
        record = read_json(path)
        if record["plan"] != plan.fingerprint:
            break
        shard = parse_shard(record["shard"], str(path))
        if not _holds(plan, shard, start):
            break
        finished.append(shard)
        start += len(shard.samples)
    return finished


def _holds(plan: _Plan, shard: ShardInfo, start: int) -> bool:
    """Say whether a tar is undamaged and holds the samples from number `start` on."""
    path = plan.folder / shard.name
    if not path.exists() or path.stat().st_size != shard.bytes:
        return False
    if sha256_file(path) != shard.sha256:
        return False
    wanted = plan.samples[start : start + len(shard.samples)]
    with path.open("rb") as file:
        return len(wanted) == len(shard.samples) and all(
            _is_stored(sample, info, file)
            for sample, info in zip(wanted, shard.samples, strict=True)
            if isinstance(sample, RawSample)
        )


def _is_stored(sample: RawSample, info: SampleInfo, file: BinaryIO) -> bool:
    record = record_bytes(sample.key, sample.concept, sample.source, sample.texts)
    stored = (
        os.pread(file.fileno(), info.media_size, info.media_offset),
        os.pread(file.fileno(), info.json_size, info.json_offset),
    )
    return info.extension == sample.extension and stored == (sample.media, record)


def _write_missing(plan: _Plan, shards: list[ShardInfo], readers: int) -> list[ShardInfo]:
    """Write the tars that follow `shards`; return all of them."""
    place = {sample.key: shard.name for shard in shards for sample in shard.samples}
    tar: TarWriter | None = None
    try:
        for sample in _loaded(plan.samples[len(place) :], readers):
            if problems := _problems(plan, sample):
                raise DataError(f"{plan.folder}: {sample.key}: {'; '.join(problems)}")
            if sample.key in place:
                raise DataError(
                    f"{plan.folder}: the key {sample.key!r} comes twice, first in "
                    f"{place[sample.key]}; the second comes from {sample.source}"
                )
            record = record_bytes(sample.key, sample.concept, sample.source, sample.texts)
            if tar and tar.used + members_size(len(sample.media), len(record)) > plan.shard_bytes:
                shards.append(tar.finish(plan.fingerprint))
                tar = None
            tar = tar or TarWriter(plan.folder, len(shards))
            place[sample.key] = tar.path.name
            tar.add(sample, record)
        if tar:
            shards.append(tar.finish(plan.fingerprint))
    finally:
        if tar:
            tar.discard()
    return shards


def _loaded(samples: Sequence[SampleSource], readers: int) -> Iterator[RawSample]:
    """Yield the samples in order, read by `readers` threads a few ahead."""
    if readers == 1:
        yield from map(_load, samples)
        return
    ahead = 16 * readers
    with ThreadPoolExecutor(readers) as pool:
        for start in range(0, len(samples), ahead):
            yield from pool.map(_load, samples[start : start + ahead])


def _load(sample: SampleSource) -> RawSample:
    return sample if isinstance(sample, RawSample) else sample()


def _stored_size(sample: SampleInfo) -> int:
    return members_size(sample.media_size, sample.json_size)


def _index(plan: _Plan, shards: Sequence[ShardInfo]) -> ShardIndex:
    samples = [sample for shard in shards for sample in shard.samples]
    head = plan.head
    return ShardIndex(
        dataset=head.dataset,
        split=head.split,
        modality=head.modality,
        licence=head.licence,
        recipe=head.recipe,
        counts=count_samples(samples),
        choices=head.choices,
        id_list_sha256=hash_keys(samples),
        shards=tuple(shards),
    )


def _remove_others(folder: Path, names: set[str]) -> None:
    """Remove what an earlier build of other samples left, and the records of this one."""
    for path in [*folder.glob("*.tar"), *(folder / name for name in SIDE_FILES)]:
        if path.name not in names:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder / BUILDING)
