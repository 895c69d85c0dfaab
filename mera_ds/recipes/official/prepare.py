"""Checks every medium of a dataset, and converts those that are stored in another form.

It runs ahead of the writing, in as many processes as wanted, so that it is known what is missing
or broken before a tar is written. What was found is kept in a journal: after a kill only the rest
is done. A process that dies of a medium (a crash in a decoder) costs that medium only.
"""

import hashlib
import json
import multiprocessing
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from mera_ds.errors import DataError
from mera_ds.files import TEMPORARY, failpoint, full_disk_is_an_error, sha256_file, sha256_json
from mera_ds.media.errors import Unusable
from mera_ds.recipes import Log
from mera_ds.recipes.official.convert import Conversion
from mera_ds.recipes.official.sources import MediaFile
from mera_ds.shards.format import MAX_MEMBER_BYTES

JOURNAL = "checked.jsonl"
_CHUNK = 8
_TIMES = 10
_CRASHED = "the process that decoded it died"
_UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Task:
    """A medium to check."""

    key: str
    file: MediaFile


@dataclass(frozen=True, slots=True)
class Checked:
    """A medium that can be stored, or why it can't."""

    key: str
    extension: str
    sha256: str
    """Of the stored bytes."""
    converted: bool
    """The stored bytes lie in the scratch folder, not in the source."""
    problem: str | None = None


@dataclass(frozen=True)
class Workshop:
    """The scratch folder of a build, for one way of converting media."""

    folder: Path
    conversion: Conversion

    @classmethod
    def for_conversion(cls, scratch: Path, conversion: Conversion) -> "Workshop":
        """Return the workshop below a folder that other conversions don't share."""
        return cls(scratch / sha256_json(asdict(conversion))[:12], conversion)

    def scratch(self, key: str, extension: str) -> Path:
        """Return where a converted medium lies."""
        return self.folder / f"{key}.{extension}"

    def read(self, task: Task, checked: Checked) -> bytes:
        """Return the bytes to store, which must be those that were checked.

        Raises:
            DataError: they have changed.
        """
        path = self.scratch(task.key, checked.extension)
        try:
            content = path.read_bytes() if checked.converted else task.file.read()
        except _UNREADABLE as error:
            raise DataError(f"{task.file.label} can't be read any more: {error}") from None
        if hashlib.sha256(content).hexdigest() != checked.sha256:
            raise DataError(
                f"{path if checked.converted else task.file.label} has changed since it was "
                f"checked; remove {self.folder.parent} and run the same command again"
            )
        return content


def check_media(
    tasks: Sequence[Task], workshop: Workshop, workers: int, log: Log
) -> Mapping[str, Checked]:
    """Check and convert media; return what was found, by key.

    Args:
        tasks: the media.
        workshop: conversion and scratch folder; the caller holds its lock.
        workers: how many processes; 0: this one.
        log: is told ten times how far it is.

    Raises:
        ResourceError: the disk is full.
    """
    workshop.folder.mkdir(parents=True, exist_ok=True)
    journal = workshop.folder / JOURNAL
    known = _read_journal(journal)
    found: dict[str, Checked] = {}
    open_tasks = []
    for task in tasks:
        checked = known.get(_identity(task))
        if checked is not None and _is_there(workshop, checked):
            found[task.key] = checked
        else:
            open_tasks.append(task)
    identities = {task.key: _identity(task) for task in open_tasks}
    with full_disk_is_an_error(journal), journal.open("a", encoding="utf-8") as file:
        file.write("\n")  # the last line of a killed build may be cut
        for checked in _check_all(open_tasks, workshop, workers):
            found[checked.key] = checked
            if checked.problem is None:
                entry = [identities[checked.key], *_facts(checked)]
                file.write(json.dumps(entry) + "\n")
                file.flush()
            if len(found) * _TIMES // len(tasks) > (len(found) - 1) * _TIMES // len(tasks):
                log(f"  {len(found)} of {len(tasks)} media checked")
            failpoint("recipes.medium_checked")
    return found


def _identity(task: Task) -> str:
    return f"{task.key}|{task.file.name}|{task.file.size}"


def _facts(checked: Checked) -> tuple[str, str, str, bool]:
    return checked.key, checked.extension, checked.sha256, checked.converted


def _read_journal(path: Path) -> dict[str, Checked]:
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            identity, *facts = json.loads(line)
            known[identity] = Checked(*facts)
        except (ValueError, TypeError):
            continue
    return known


def _is_there(workshop: Workshop, checked: Checked) -> bool:
    path = workshop.scratch(checked.key, checked.extension)
    return not checked.converted or (path.is_file() and sha256_file(path) == checked.sha256)


def _check_all(tasks: Sequence[Task], workshop: Workshop, workers: int) -> Iterator[Checked]:
    if workers == 0:
        yield from (_check(task, workshop) for task in tasks)
        return
    chunks = [tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK)]
    while chunks:
        done: set[int] = set()
        try:
            for number, results in _in_pool(chunks, workshop, workers):
                done.add(number)
                yield from results
        except BrokenProcessPool:
            chunks = [chunk for number, chunk in enumerate(chunks) if number not in done]
            # Chunks are taken in order: one of the first that are left was the last one's.
            suspects, chunks = chunks[: 2 * workers + 1], chunks[2 * workers + 1 :]
            for task in (task for chunk in suspects for task in chunk):
                yield _check_alone(task, workshop)
        else:
            return


def _in_pool(
    chunks: Sequence[Sequence[Task]], workshop: Workshop, workers: int
) -> Iterator[tuple[int, list[Checked]]]:
    with _pool(min(workers, len(chunks))) as pool:
        futures: dict[Future[list[Checked]], int] = {
            pool.submit(_check_chunk, chunk, workshop): number
            for number, chunk in enumerate(chunks)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _check_alone(task: Task, workshop: Workshop) -> Checked:
    with _pool(1) as pool:
        try:
            return pool.submit(_check, task, workshop).result()
        except BrokenProcessPool:
            return Checked(task.key, task.file.extension, "", False, _CRASHED)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Let a worker end when the build is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _check_chunk(tasks: Sequence[Task], workshop: Workshop) -> list[Checked]:
    return [_check(task, workshop) for task in tasks]


def _check(task: Task, workshop: Workshop) -> Checked:
    failpoint("recipes.medium")
    try:
        extension, content, converted = _convert(task, workshop.conversion)
    except (Unusable, DataError) as error:
        return Checked(task.key, task.file.extension, "", False, str(error))
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
        return Checked(task.key, task.file.extension, "", False, reason)
    if converted:
        path = workshop.scratch(task.key, extension)
        temporary = path.with_name(f"{path.name}{TEMPORARY}-{os.getpid()}")
        with full_disk_is_an_error(path):
            temporary.write_bytes(content)
            temporary.replace(path)
    return Checked(task.key, extension, hashlib.sha256(content).hexdigest(), converted)


def _convert(task: Task, conversion: Conversion) -> tuple[str, bytes, bool]:
    """Return extension and bytes to store, and whether they differ from the source's."""
    if task.file.size > MAX_MEMBER_BYTES:
        raise Unusable(f"it has {task.file.size} bytes, more than {MAX_MEMBER_BYTES}")
    content = task.file.read()
    if not content:
        raise Unusable("the file is empty")
    extension, stored = conversion.apply(content, task.file.extension, task.key)
    return extension, stored, stored is not content
