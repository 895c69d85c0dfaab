"""The hash of a tar is checked when it is first opened, once per state of the file."""

import fcntl
import hashlib
import os
import time
from pathlib import Path

from mera_ds.config import cache_folder
from mera_ds.files import full_disk_is_an_error

SETTLED_NS = 2_000_000_000
"""A file changed later than this before it is hashed isn't remembered: its next change could fall
into the same tick of the file system's clock."""


def has_sha256(path: Path, descriptor: int, sha256: str) -> bool:
    """Say whether an open tar has this hash; remembered by path, size and times of change.

    Several processes that ask at once wait for one of them.

    Raises:
        ResourceError: if the disk of the cache is full.
    """
    status = os.fstat(descriptor)
    times = f"{status.st_mtime_ns}:{status.st_ctime_ns}"
    stamp = f"{path.resolve()}:{status.st_size}:{times}:{sha256}"
    mark = cache_folder() / "verified" / hashlib.sha256(stamp.encode()).hexdigest()
    if mark.exists():
        return True
    with full_disk_is_an_error(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        opened = mark.with_suffix(".lock").open("a")
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists():
            return True
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            sound = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if sound and abs(time.time_ns() - status.st_mtime_ns) > SETTLED_NS:
            with full_disk_is_an_error(mark):
                mark.touch()
        mark.with_suffix(".lock").unlink(missing_ok=True)
    return sound
