"""Samples that are left out of a shard folder by name: `quarantine.json` beside the index.

Nothing is ever left out without this file. It belongs to one index (by fingerprint), lists every
sample with the reason, and records the damaged tars as they were found, so that further damage is
noticed. `mera-ds shards lint DIR --quarantine` writes it (`mera_ds.shards.damage`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json, write_json
from mera_ds.settings import parse

QUARANTINE_NAME = "quarantine.json"
QUARANTINE = "`mera-ds shards lint DIR --quarantine`"
RENEW = f"delete {QUARANTINE_NAME}, or renew it with {QUARANTINE}"


@dataclass(frozen=True, kw_only=True)
class FoundTar:
    """A damaged tar as it was found; -1 bytes if it was missing."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Quarantine:
    """The content of `quarantine.json`."""

    schema: int = 1
    index: str
    """Fingerprint of the index that it belongs to."""
    samples: Mapping[str, str] = field(default_factory=dict)
    """Key of each sample left out → the reason."""
    tars: Mapping[str, FoundTar] = field(default_factory=dict)
    """Name of each damaged tar → how it was found."""

    def __post_init__(self) -> None:
        """Check the version of the format."""
        if self.schema != 1:
            raise InputError(f"schema {self.schema}, expected 1; {RENEW}")


def read_quarantine(folder: Path) -> Quarantine | None:
    """Return a shard folder's quarantine, or None if nothing is left out.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / QUARANTINE_NAME
    if not path.exists():
        return None
    try:
        return parse(Quarantine, read_json(path), str(path))
    except InputError as error:
        raise DataError(f"{error}; {RENEW}") from None


def write_quarantine(folder: Path, quarantine: Quarantine) -> None:
    """Write `quarantine.json`, or remove it if there is no damage."""
    path = folder / QUARANTINE_NAME
    if quarantine.samples or quarantine.tars:
        write_json(path, asdict(quarantine))
    else:
        path.unlink(missing_ok=True)
