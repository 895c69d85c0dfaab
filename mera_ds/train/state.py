"""Training checkpoints: what a phase resumes from. No frozen weight and no pickle is in them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mera_ds.checkpoint import load_tensors, save_tensors
from mera_ds.errors import InputError
from mera_ds.files import committed_folder, read_json, require_space, write_json
from mera_ds.log import logger
from mera_ds.train.engine import EngineState

PATTERN = "step-??????"


@dataclass(frozen=True)
class Progress:
    """Where a phase stands."""

    step: int
    """Optimizer steps done; the next one has this number."""
    nonfinite_steps: int


def save_checkpoint(
    folder: Path, key: str, progress: Progress, state: EngineState, keep: int
) -> None:
    """Write `step-000400/` atomically, then remove all but the newest `keep`.

    Raises:
        ResourceError: if the disk is full; earlier checkpoints stay.
    """
    tensors = [*state.parameters.values(), *state.moments.values()]
    require_space(folder, sum(tensor.numel() * 4 for tensor in tensors) + 1_000_000)
    with committed_folder(folder / f"step-{progress.step:06d}") as target:
        files = {
            name: save_tensors(target / f"{name}.safetensors", entry)
            for name, entry in (("trainables", state.parameters), ("moments", state.moments))
        }
        facts = {
            "schema": 1,
            "key": key,
            "step": progress.step,
            "nonfinite_steps": progress.nonfinite_steps,
            "scalars": state.scalars,
            "files": files,
        }
        write_json(target / "state.json", facts)
    for outdated in _checkpoints(folder)[:-keep]:
        shutil.rmtree(outdated)


def load_checkpoint(folder: Path, key: str) -> tuple[Progress, EngineState] | None:
    """Return the newest checkpoint of a phase, or None if there is none.

    Raises:
        InputError: if it was made with other data or settings.
        DataError: if its files are damaged.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    facts = read_json(newest / "state.json")
    if facts["key"] != key:
        raise InputError(
            f"{newest} was made with other data, settings or weights than the run has now; "
            f"restore them, or delete {folder} to start this phase anew"
        )
    tensors = {
        name: load_tensors(newest / f"{name}.safetensors", sha256)
        for name, sha256 in facts["files"].items()
    }
    logger.info("continuing from %s", newest)
    progress = Progress(facts["step"], facts["nonfinite_steps"])
    return progress, EngineState(tensors["trainables"], tensors["moments"], facts["scalars"])


def newest_checkpoint(folder: Path) -> Path | None:
    """Return a phase's newest checkpoint by its number, never by a time."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def inputs_file(folder: Path) -> Path:
    """Return where it is kept what a phase was begun with, see `mera_ds.train.inputs`."""
    return folder.with_name(f"{folder.name}.inputs.json")


def remove_checkpoints(folder: Path) -> None:
    """Remove a finished phase's checkpoints, also those whose removal was cut short."""
    for path in folder.glob(PATTERN):
        shutil.rmtree(path)
    inputs_file(folder).unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(PATTERN) if (path / "state.json").exists())
