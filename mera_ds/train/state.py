"""Training checkpoints: what a phase resumes from. No frozen weight and no pickle is in them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.checkpoint import load_tensors, save_tensors
from mera_ds.distributed import World
from mera_ds.errors import InputError
from mera_ds.files import committed_folder, read_json, require_space, write_json
from mera_ds.log import logger
from mera_ds.train.engine import EngineState
from mera_ds.train.shares import SharedFiles

PATTERN = "step-??????"
STATE = "state.json"
"""Written last; what a checkpoint says about itself."""

ALONE = World(rank=0, size=1, local_rank=0)


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
    with committed_folder(step_folder(folder, progress)) as target:
        files = {
            name: save_tensors(target / f"{name}.safetensors", entry)
            for name, entry in (("trainables", state.parameters), ("moments", state.moments))
        }
        write_json(target / STATE, {**state_facts(key, progress, state.scalars), "files": files})
    remove_outdated(folder, keep, keep_every)
    return size


def step_folder(folder: Path, progress: Progress) -> Path:
    """Return the folder of a checkpoint."""
    return folder / f"step-{progress.step:06d}"


def state_facts(key: str, progress: Progress, scalars: Mapping[str, float]) -> dict[str, Any]:
    """Return what every checkpoint says, in whichever files its tensors are."""
    return {
        "schema": 1,
        "key": key,
        "step": progress.step,
        "nonfinite_steps": progress.nonfinite_steps,
        "scalars": dict(scalars),
    }


def remove_outdated(folder: Path, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest ones and each `keep_every`-th step's (0: none)."""
    for older in _checkpoints(folder)[:-keep]:
        if keep_every == 0 or _step(older) % keep_every:
            shutil.rmtree(older)


def load_checkpoint(
    folder: Path, key: str, world: World = ALONE
) -> tuple[Progress, EngineState] | None:
    """Return the newest checkpoint of a phase, or None if there is none; every rank must call it.

    Tensors that each rank had its share of are read when they are asked for.

    Raises:
        InputError: if it was made with other data or settings.
        DataError: if its files are damaged.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    facts = read_json(newest / STATE)
    if facts["key"] != key:
        raise InputError(
            f"{newest} was made with other data, settings or weights than the run has now; "
            f"restore them, or delete {folder} to start this phase anew"
        )
    progress = Progress(facts["step"], facts["nonfinite_steps"])
    logger.info("continuing from %s", newest)
    if "shares" in facts:
        shared = SharedFiles(newest, facts["shares"], world)
        return progress, EngineState(shared, shared, facts["scalars"])
    tensors = {
        name: load_tensors(newest / f"{name}.safetensors", sha256)
        for name, sha256 in facts["files"].items()
    }
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
    return sorted(path for path in folder.glob(PATTERN) if (path / STATE).exists())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
