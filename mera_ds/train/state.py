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
    folder: Path, key: str, progress: Progress, state: EngineState, keep: int
) -> None:
    """Write `step-000400/` atomically, then remove all but the newest `keep`.

    Raises:
        ResourceError: if the disk is full; earlier checkpoints stay.
    """
    tensors = [*state.parameters.values(), *state.moments.values()]
    require_space(folder, sum(tensor.numel() * 4 for tensor in tensors) + 1_000_000)
    with committed_folder(step_folder(folder, progress)) as target:
        files = {
            name: save_tensors(target / f"{name}.safetensors", entry)
            for name, entry in (("trainables", state.parameters), ("moments", state.moments))
        }
        write_json(target / STATE, {**state_facts(key, progress, state.scalars), "files": files})
    remove_outdated(folder, keep)


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


def remove_outdated(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest ones."""
    for outdated in _checkpoints(folder)[:-keep]:
        shutil.rmtree(outdated)


def load_checkpoint(
    folder: Path, key: str, world: World = ALONE
) -> tuple[Progress, EngineState] | None:
    """Return the newest checkpoint of a phase, or None if there is none; every rank must call it.

    Tensors that each rank had its share of are read when they are asked for.

    Raises:
        InputError: if it was made with other data or settings.
        DataError: if its files are damaged.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
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


def remove_checkpoints(folder: Path) -> None:
    """Remove a finished phase's checkpoints, also those whose removal was cut short."""
    for path in folder.glob(PATTERN):
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(PATTERN) if (path / STATE).exists())
