"""Where things lie on a machine, and how a configuration names these places. Imports no torch."""

import os
from pathlib import Path

from mera_ds.errors import InputError

REPOSITORY = Path(__file__).parents[1]


def cache_folder() -> Path:
    """Return where converted weights and features are kept: $MERA_CACHE or ~/.cache/mera-ds."""
    return Path(os.environ.get("MERA_CACHE") or Path.home() / ".cache" / "mera-ds")


def weights_folder() -> Path:
    """Return where official weights are looked for: $MERA_WEIGHTS or ~/mera/weights."""
    return Path(os.environ.get("MERA_WEIGHTS") or Path.home() / "mera" / "weights")


def shards_folder() -> Path:
    """Return where the datasets' shard sets are looked for: $MERA_SHARDS or ~/mera/shards."""
    return Path(os.environ.get("MERA_SHARDS") or Path.home() / "mera" / "shards")


def resolve_path(text: str, run: Path) -> Path:
    """Return a configured path with its places filled in.

    They are `{run}`, `{cache}`, `{repository}`, `{weights}` and `{shards}`.
    """
    places = {
        "run": run,
        "cache": cache_folder(),
        "repository": REPOSITORY,
        "weights": weights_folder(),
        "shards": shards_folder(),
    }
    try:
        return Path(text.format(**places)).expanduser()
    except (KeyError, IndexError, ValueError, AttributeError):
        raise InputError(
            f"path '{text}' holds an unknown place; valid: "
            f"{', '.join(f'{{{name}}}' for name in places)}"
        ) from None
