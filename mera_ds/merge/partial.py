"""An unfinished merge on disk: which files are done, and who works on it.

It lies beside the output as `<out>.partial` and holds `state.json` (the merge's key, and for each
finished file what was found out about its tensors). It has no config.json before all weights are
there, so nothing loads it by accident.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mera_ds.errors import InputError, LockedError, MeraError, ResourceError
from mera_ds.files import (
    TEMPORARY,
    failpoint,
    full_disk_is_an_error,
    publish_folder,
    read_json,
    require_writable,
    write_json,
)
from mera_ds.log import logger
from mera_ds.merge.digest import read_digests
from mera_ds.merge.plan import MergePlan, Shard
from mera_ds.merge.stream import Squares
from mera_ds.settings import parse

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """What a merge found out about one tensor."""

    changed: bool
    squares: Squares
    previous: str
    """Fingerprint in the previous model."""
    tuned: str
    """In the tuned one; that of the previous if an adapter changed it or left it alone."""
    merged: str
    """In the output."""


Records = Mapping[str, TensorRecord]


class PartialFolder:
    """The folder of one unfinished merge, while this process holds its lock."""

    def __init__(self, folder: Path, plan: MergePlan) -> None:
        self.folder = folder
        self._plan = plan
        self._done: dict[str, Records] = {}
        self._opened = False
        """Whether the folder is known to hold nothing but this merge."""

    @property
    def records(self) -> dict[str, TensorRecord]:
        """What is known about the tensors of the finished files."""
        return {name: record for done in self._done.values() for name, record in done.items()}

    def resume(self, workers: int) -> list[Shard]:
        """Return the files that are still to be written; verify the others.

        Raises:
            InputError: if the folder holds finished files of another merge.
        """
        path = self.folder / STATE
        fresh: dict[str, Any] = {"key": self._plan.key, "done": {}}
        state = read_json(path) if path.exists() else fresh
        if not (isinstance(state, dict) and state.keys() >= fresh.keys()):
            raise InputError(f"{path} is not that of a merge; delete {self.folder}")
        self._require_own()
        if state["key"] != self._plan.key and state["done"]:
            raise InputError(
                f"{self.folder} holds finished files of a merge of other models or settings; "
                "give its command again to complete it, or delete the folder, or choose another "
                "--out"
            )
        left = []
        for shard in self._plan.shards:
            found = state["done"].get(shard.file, {})
            records = {name: parse(TensorRecord, entry, str(path)) for name, entry in found.items()}
            if records and self._is_intact(shard, records, workers):
                self._done[shard.file] = records
            else:
                left.append(shard)
        self._opened = True
        self._remove_unfinished()
        self._write_state(self._done)
        if self._done:
            logger.info("%d of %d files are done", len(self._done), len(self._plan.shards))
        return left

    def _is_intact(self, shard: Shard, records: Records, workers: int) -> bool:
        file = self.folder / shard.file
        if not file.exists() or file.stat().st_size != shard.size:
            return False
        with file.open("rb") as opened:
            if opened.read(len(shard.header)) != shard.header:
                return False
        found = read_digests(shard.places(self.folder), workers)
        return found == {name: record.merged for name, record in records.items()}

    def record(self, shard: Shard, records: Records) -> None:
        """Note that a file is complete; it must be on disk."""
        self._write_state({**self._done, shard.file: records})
        self._done[shard.file] = records
        failpoint("merge.after_file")

    def _write_state(self, finished: Mapping[str, Records]) -> None:
        done = {
            file: {name: asdict(record) for name, record in sorted(records.items())}
            for file, records in sorted(finished.items())
        }
        write_json(self.folder / STATE, {"key": self._plan.key, "done": done})

    def _require_own(self) -> None:
        """Refuse a folder that somebody else keeps something in, before a file is removed."""
        for entry in sorted(self.folder.iterdir()):
            if entry.is_dir():
                raise InputError(
                    f"{entry} was not made by a merge; move it away or choose another --out"
                )

    def _remove_unfinished(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name not in {STATE, *self._done}:
                entry.unlink()

    def clean_up(self, *, keep_finished: bool) -> None:
        """Remove what a failed merge has written, but nothing of another merge."""
        if not self._opened:
            return
        if keep_finished and self._done:
            self._remove_unfinished()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, output: Path) -> None:
        """Give the complete folder its final name."""
        (self.folder / STATE).unlink()
        failpoint("merge.before_publish")
        publish_folder(self.folder, output)


@contextmanager
def partial_folder(output: Path, plan: MergePlan) -> Iterator[PartialFolder]:
    """Make or open the folder of an unfinished merge and hold its lock.

    It stays there when the process is killed or stopped. A full disk leaves the finished files in
    it, any other error nothing, unless it belongs to another merge.

    Raises:
        LockedError: at once, if another process works on the same output.
        InputError: if the output exists, or can't be written.
    """
    folder = output.with_name(f"{output.name}{TEMPORARY}")
    require_writable(folder)
    with full_disk_is_an_error(output):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LockedError(
                f"{folder} is in use by another merge into {output}; wait for it or stop it"
            ) from None
        if output.exists():
            folder.rmdir()
            require_new(output)
        partial = PartialFolder(folder, plan)
        try:
            yield partial
        except MeraError as error:
            partial.clean_up(keep_finished=isinstance(error, ResourceError))
            raise
    finally:
        os.close(descriptor)


def require_new(output: Path) -> None:
    """Raise an `InputError` if the output exists, or can't be made where it would be."""
    if os.path.lexists(output):
        raise InputError(f"{output} exists; delete it or choose another --out")
    require_writable(output.parent)
