"""Shard folders behind a URL: a local folder stands for each, and its files are fetched on demand.

`mirror(url)` returns that folder, so that all other code knows paths only. The index is fetched
once per process; tars come through the bounded cache of `mera_ds.shards.cache`. http and https
need nothing but Python; other schemes go through fsspec and its own packages (s3fs, gcsfs, …).
"""

import functools
import hashlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mera_ds.config import cache_folder, resolve_path
from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json, write_bytes, write_json
from mera_ds.log import logger
from mera_ds.shards.checks import INDEX_NAME
from mera_ds.shards.quarantine import QUARANTINE_NAME

T = TypeVar("T")
SOURCE_NAME = "source.json"
ATTEMPTS = 5
RETRY_SECONDS = 0.5
"""Wait before the second attempt; doubled each time."""
TIMEOUT_SECONDS = 60
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_WEB = ("http", "https")
FAULTS = (OSError, HTTPException, EOFError, ValueError)
"""What a failing connection or server raises; tried again."""


def is_url(text: str) -> bool:
    """Say whether a configured data folder is a URL (or pretends to be one)."""
    return _URL.match(text) is not None


def data_folder(text: str, run: Path) -> Path:
    """Return the folder with `train` and `test` that an entry of `modalities.X.data` names.

    For a URL it is the local folder that stands for it.

    Raises:
        InputError: if it is a URL that can't be read, or a path with an unknown place.
    """
    return mirror(text) if is_url(text) else resolve_path(text, run)


def mirror(url: str) -> Path:
    """Return the local folder that stands for a remote folder with the splits of a dataset.

    Raises:
        InputError: if it is no URL of a known kind, names a command, or holds a password.
    """
    parts = urlsplit(url)
    if "://" not in url or "::" in url or parts.scheme not in _schemes():
        raise InputError(
            f"'{url}' can't be read as a shard folder: expected http://…, https://…, s3://… or "
            "another URL that fsspec knows; commands (pipe:) and chains (::) are never run"
        )
    if parts.password is not None:
        raise InputError(
            f"the URL of {parts.scheme}://{parts.hostname} holds a password; leave it out and "
            "give it to the protocol's own environment variables"
        )
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    folder = cache_folder() / "shards" / name
    if not (folder / SOURCE_NAME).exists():
        write_json(folder / SOURCE_NAME, {"url": url.rstrip("/")})
    return folder


def _schemes() -> set[str]:
    import fsspec

    return {*_WEB, *fsspec.available_protocols()}


def source_url(folder: Path) -> str | None:
    """Return the URL that a split's local folder stands for; None for an ordinary folder."""
    path = folder.parent / SOURCE_NAME
    return f"{read_json(path)['url']}/{folder.name}" if path.exists() else None


def refresh(folder: Path) -> None:
    """Bring the index (and quarantine) of a mirrored folder; do nothing for an ordinary one.

    Raises:
        InputError: there is no index behind the URL.
        DataError: it can't be reached, and no earlier copy is here.
    """
    url = source_url(folder)
    if url is not None:
        _fetch_once(folder, url)


@functools.cache
def _fetch_once(folder: Path, url: str) -> None:
    try:
        index = retried(f"{url}/{INDEX_NAME}", lambda: _fetch(f"{url}/{INDEX_NAME}"))
        write_bytes(folder / INDEX_NAME, index)
        quarantine = folder / QUARANTINE_NAME
        try:
            write_bytes(quarantine, retried(url, lambda: _fetch(f"{url}/{QUARANTINE_NAME}")))
        except FileNotFoundError:
            quarantine.unlink(missing_ok=True)
    except FileNotFoundError:
        raise InputError(
            f"{url} has no {INDEX_NAME}, so it is not a complete shard folder; correct the URL"
        ) from None
    except DataError as error:
        if not (folder / INDEX_NAME).exists():
            raise
        logger.warning("%s; the copy of its index from before is used", error)


def _fetch(url: str) -> bytes:
    """Return the whole of a small JSON file."""
    with open_url(url, 0) as (stream, _):
        content = bytes(stream.read())
    if not content.rstrip().endswith(b"}"):
        raise EOFError(f"it ends after {len(content)} bytes, in the middle")
    return content


def retried(what: str, attempt: Callable[[], T]) -> T:
    """Return the result of the first attempt that doesn't fail.

    Raises:
        FileNotFoundError: at once, if the server says so.
        DataError: if all attempts failed.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except FAULTS as error:
            reason = f"{type(error).__name__}: {error}"
        if number < ATTEMPTS - 1:
            time.sleep(RETRY_SECONDS * 2**number)
    raise DataError(
        f"{what} could not be fetched in {ATTEMPTS} attempts ({reason}); the same command goes on "
        "from what has arrived"
    )


@contextmanager
def open_url(url: str, start: int) -> Iterator[tuple[Any, int]]:
    """Yield a stream of a remote file's bytes and where it starts: at `start`, or at 0."""
    if urlsplit(url).scheme not in _WEB:
        with _open_fsspec(url) as file:
            file.seek(start)
            yield file, start
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url}: {error.code}") from None
        raise OSError(f"{url}: the server answers {error.code}") from None
    with closing(response):
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError(f"{url}: the server sends another part than asked for")
        yield response, start if resumed else 0


def _open_fsspec(url: str) -> Any:
    import fsspec

    try:
        return fsspec.open(url, "rb")
    except ImportError as error:
        raise InputError(f"{url}: {error}; install that package") from None
