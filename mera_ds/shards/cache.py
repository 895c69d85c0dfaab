"""A bounded folder of downloaded tars, shared by all processes of this machine.

A tar is named by its hash and size, so that equal tars lie there once whatever URL they came from.
Who reads a tar holds a shared lock on it; who downloads or removes one, an exclusive lock. The
least recently used tars that nobody holds are removed before the limit would be passed. A partial
download keeps its place (and counts in full) and is continued.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mera_ds.config import cache_folder
from mera_ds.errors import DataError, ResourceError
from mera_ds.files import TEMPORARY, full_disk_is_an_error, sync_folder
from mera_ds.shards.remote import open_url, retried

CHUNK = 1 << 20
PATIENCE_SECONDS = 30.0
"""How long to wait for tars that others are reading."""


@dataclass(frozen=True)
class TarCache:
    """The cache with its limit in bytes."""

    limit: int

    @property
    def folder(self) -> Path:
        """Where the tars lie."""
        return cache_folder() / "shards" / "tars"

    def open(self, url: str, size: int, sha256: str) -> int:
        """Return a descriptor of a tar, downloaded if need be, that holds a shared lock.

        Raises:
            DataError: it can't be fetched, or isn't the tar that the index lists.
            ResourceError: the limit doesn't leave room for it, or the disk is full.
        """
        if size > self.limit:
            raise ResourceError(
                f"{url} has {size / 1e9:.2f} GB, and execution.shard_cache_gb allows "
                f"{self.limit / 1e9:.2f}; raise it"
            )
        final = self.folder / f"{sha256}-{size}.tar"
        self.folder.mkdir(parents=True, exist_ok=True)
        while (descriptor := _hold(final)) is None:
            self._bring(url, size, sha256, final)
        return descriptor

    def discard(self, size: int, sha256: str) -> None:
        """Remove a tar that was found damaged."""
        (self.folder / f"{sha256}-{size}.tar").unlink(missing_ok=True)

    def _bring(self, url: str, size: int, sha256: str, final: Path) -> None:
        partial = final.with_suffix(TEMPORARY)
        with self._place(partial, size) as descriptor:
            if descriptor is None or final.exists():
                return
            try:
                retried(url, lambda: _download(url, descriptor, size, sha256))
            except FileNotFoundError:
                raise DataError(
                    f"{url} is listed in the index but missing; copy the folder again"
                ) from None
            partial.rename(final)
            sync_folder(self.folder)

    @contextmanager
    def _place(self, partial: Path, size: int) -> Iterator[int | None]:
        """Yield a locked partial file for which there is room; None if another one finished it."""
        with (self.folder / ".lock").open("a") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not partial.exists():
                self._make_room(size)
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            status = os.fstat(descriptor)
            is_current = partial.exists() and partial.stat().st_ino == status.st_ino
            yield descriptor if is_current else None
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> None:
        """Remove tars, the least recently used first, until `size` bytes more fit."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            files = self._files()
            excess = sum(map(_size, files)) + size - self.limit
            for path in files:
                if excess <= 0:
                    return
                excess -= _size(path) if _remove(path) else 0
            if excess <= 0:
                return
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"{self.folder}: all tars are in use, and there is no room for another of "
                    f"{size / 1e9:.2f} GB; raise execution.shard_cache_gb"
                )
            time.sleep(0.05)

    def _files(self) -> list[Path]:
        """Return all tars, the least recently used first; others may be renaming some of them."""
        used = []
        for path in [*self.folder.glob("*.tar"), *self.folder.glob(f"*{TEMPORARY}")]:
            with contextlib.suppress(FileNotFoundError):
                used.append((path.stat().st_atime_ns, path))
        return [path for _, path in sorted(used)]


def _size(path: Path) -> int:
    """Return the full size of a tar or partial tar, which its name tells."""
    return int(path.stem.rpartition("-")[2])


def _hold(path: Path) -> int | None:
    """Open a tar with a shared lock and mark it as used; None if it isn't there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    status = os.fstat(descriptor)
    if status.st_nlink == 0:  # removed between the two calls
        os.close(descriptor)
        return None
    os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))
    return descriptor


def _remove(path: Path) -> bool:
    """Remove a tar unless a process holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        path.unlink()
        return True
    finally:
        os.close(descriptor)


def _download(url: str, descriptor: int, size: int, sha256: str) -> None:
    """Complete a partial tar and compare it with its hash; OSError if that fails."""
    have = os.fstat(descriptor).st_size
    with (
        full_disk_is_an_error(Path(url)),
        open_url(url, have if have < size else 0) as (
            stream,
            start,
        ),
    ):
        os.ftruncate(descriptor, start)
        os.lseek(descriptor, start, os.SEEK_SET)
        while chunk := stream.read(CHUNK):
            os.write(descriptor, chunk)
    have = os.fstat(descriptor).st_size
    if have < size:
        raise EOFError(f"it ended after {have} of {size} bytes")
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if have != size or found != sha256:
        os.ftruncate(descriptor, 0)
        raise EOFError(f"{have} bytes came with the sha256 {found}, expected {size}, {sha256}")
    os.fsync(descriptor)
