"""What a phase was begun with, kept while it has checkpoints: so a change can be named."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mera_ds.errors import InputError
from mera_ds.files import read_json, write_json
from mera_ds.train.state import inputs_file, newest_checkpoint

MOST = 10
"""So many differences are listed."""


def keep_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Write down what a phase is made from, unless it is being continued.

    Args:
        folder: the phase's folder of checkpoints.
        inputs: what determines its product, as JSON.

    Raises:
        InputError: if its checkpoints were made from something else; every difference is named.
    """
    path = inputs_file(folder)
    newest = newest_checkpoint(folder)
    if newest is not None and path.exists():
        changes = list(differences(read_json(path), inputs))
        if changes:
            more = f" and {len(changes) - MOST} more" if len(changes) > MOST else ""
            raise InputError(
                f"{newest} was made with other data, settings or weights than the run has now: "
                f"{'; '.join(changes[:MOST])}{more}; restore them, or delete {folder} to start "
                "this phase anew"
            )
    else:
        write_json(path, inputs)


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield `a.b: 1 before, 2 now` for every value that differs between two JSON values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            place = f"{name}.{key}" if name else key
            yield from differences(before.get(key), now.get(key), place)
    elif _plain(before) != _plain(now):
        yield f"{name}: {before} before, {now} now"


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
