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
    folder: Path,
    key: str,
    progress: Progress,
    state: EngineState,
    *,
    keep: int,
    keep_every: int = 0,
) -> int:
    """Write `step-000400/` atomically, then remove older ones; return its size in bytes.

    Args:
        folder: the phase's folder.
        key: the key of the product that the phase makes.
        progress: where the phase stands.
        state: what the engine gave.
        keep: how many of the newest stay.
        keep_every: those whose step is a multiple of this stay as well; 0: none.

    Raises:
        ResourceError: if the disk is full; earlier checkpoints stay.
        DataError: if a value is not finite; nothing is written.
    """
    tensors = [*state.parameters.values(), *state.moments.values()]
    size = sum(tensor.nbytes for tensor in tensors)
    require_space(folder, size + 1_000_000)
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
    for older in _checkpoints(folder)[:-keep]:
        if keep_every == 0 or _step(older) % keep_every:
            shutil.rmtree(older)
    return size


def load_checkpoint(folder: Path, key: str) -> tuple[Progress, EngineState] | None:
    """Return the newest checkpoint of a phase, or None if there is none.

    Raises:
        InputError: if it was made with other data or settings.
        DataError: if its files are damaged.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
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


def remove_checkpoints(folder: Path) -> None:
    """Remove a finished phase's checkpoints, also those whose removal was cut short."""
    for path in folder.glob(PATTERN):
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(PATTERN) if (path / "state.json").exists())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
