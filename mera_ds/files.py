"""One way of writing files: temporary name, fsync, rename. Standard library only.

A killed process leaves the old artefact or the new one, never a mixture; what it leaves besides
(names with `TEMPORARY`) is removed by `remove_temporaries` at the next start.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mera_ds.errors import InputError, LockedError, ResourceError

TEMPORARY = ".partial"
"""Suffix part of every unfinished file or folder."""

OUTGOING = f"{TEMPORARY}-old"
"""Suffix part of a folder that is being replaced."""

FAILPOINT_VARIABLE = "MERA_FAILPOINT"


def failpoint(name: str) -> None:
    """Kill this process with SIGKILL if the environment asks for it at this point.

    `MERA_FAILPOINT=<name>` or `<name>:<n>` (the n-th time the point is passed) lets a test stop a
    process at an exact place; it does nothing otherwise.
    """
    wanted, _, nth = os.environ.get(FAILPOINT_VARIABLE, "").partition(":")
    if wanted != name:
        return
    _passes[name] = _passes.get(name, 0) + 1
    if _passes[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)


_passes: dict[str, int] = {}


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or broken one is an `InputError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); restore it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore or rebuild it") from None


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one atomic step."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def add_to_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to a JSON object that several processes add to; none of theirs is lost."""
    with full_disk_is_an_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.with_name(f"{path.name}.lock").open("a")
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in path.parent.glob(f"{path.name}{TEMPORARY}-*"):
            left.unlink()
        write_json(path, {**(read_json(path) if path.exists() else {}), **entries})


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one atomic step: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}-{os.getpid()}")
    with full_disk_is_an_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def committed_folder(final: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `final` when the block ends without an error.

    Every file is fsynced before the rename. An existing `final` is replaced. On an error the
    temporary folder is removed and `final` is untouched.
    """
    temporary = final.with_name(f"{final.name}{TEMPORARY}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with full_disk_is_an_error(final):
            temporary.mkdir(parents=True)
            yield temporary
        publish_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(unfinished: Path, final: Path) -> None:
    """Fsync every file of a complete folder and give it its final name, replacing what has it."""
    with full_disk_is_an_error(final):
        _sync_tree(unfinished)
    failpoint("commit.before_rename")
    if final.exists():
        outgoing = final.with_name(f"{final.name}{OUTGOING}-{os.getpid()}")
        final.rename(outgoing)
        failpoint("commit.between_renames")
        unfinished.rename(final)
        shutil.rmtree(outgoing)
    else:
        unfinished.rename(final)
    sync_folder(final.parent)
    failpoint("commit.after_rename")


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> list[Path]:
    """Remove what killed processes left below `folder`; return the removed paths.

    A folder that was about to be replaced, and was not, gets its name back. Only call it while
    holding the lock that covers `folder`.
    """
    leftovers = sorted(folder.rglob(f"*{TEMPORARY}-*"))
    for path in leftovers:
        name, outgoing, _ = path.name.partition(OUTGOING)
        if outgoing and not path.with_name(name).exists():
            path.rename(path.with_name(name))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return leftovers


@contextmanager
def full_disk_is_an_error(target: Path) -> Iterator[None]:
    """Turn "no space left" while writing `target` into a `ResourceError` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk is full: {target} was not written; free some space and run the same "
            "command again, it continues from the last finished file"
        ) from error


def require_space(folder: Path, size: int) -> None:
    """Raise `ResourceError` unless `size` bytes are free where `folder` lies."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise ResourceError(
            f"{folder} needs {size / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free; "
            "free some space or choose another folder"
        )


def require_writable(folder: Path) -> None:
    """Raise `InputError` unless a folder, or the first of those above it, can be written to."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{existing} is no folder; choose another one to write to")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(
            f"{existing} can't be written to (its rights, or a read-only disk); allow it or choose "
            "another folder"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a finished (never again written) file, or copy it across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(f"{target.name}{TEMPORARY}-{os.getpid()}")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; the system releases it when the process dies.

    A program that is started with `close_fds=False` holds it, too: while it works on the folder,
    nobody else may, even if this process was killed. A forked helper (a loader process) doesn't.

    Raises:
        LockedError: at once, if another process holds it.
    """
    path = folder / ".lock"
    with full_disk_is_an_error(path):
        folder.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    with opened as file:
        _take_lock(file, folder)
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        os.set_inheritable(file.fileno(), True)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


_held: set[IO[str]] = set()


def _let_go() -> None:
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def require_unlocked(folder: Path) -> None:
    """Refuse a run folder that another process is working on, before seconds of imports.

    Raises:
        LockedError: if another process holds its lock.
    """
    path = folder / ".lock"
    if path.exists():
        with path.open() as file:
            _take_lock(file, folder)


def _take_lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise LockedError(
            f"{folder} is in use by process {holder}; wait for it or stop it"
        ) from None
