"""What a run took: training time and memory from its steps, generation from its evaluations."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mera_ds.manifest import MANIFEST, read_manifest
from mera_ds.plan import TrainStep, load_plan
from mera_ds.report.results import Run


@dataclass(frozen=True)
class Cost:
    """What one run took; None: not recorded."""

    train_hours: float | None
    """All training steps together, by the clock, times the ranks; repeated steps count once."""
    train_memory_gb: float | None
    """Largest of the training steps, on one rank: GPU memory, or resident memory on a CPU."""
    generate_seconds: float | None
    """Per generated text, times the ranks."""
    generate_memory_gb: float | None
    hardware: tuple[str, ...]
    """Machines that the run computed on."""


def run_costs(runs: Sequence[Run]) -> dict[Path, Cost]:
    """Return what each run took, by folder.

    A product that was taken over from another of the runs took what it took there.
    """
    logs = [_read(run.folder) for run in runs]
    return {run.folder: _cost(run, log, logs) for run, log in zip(runs, logs, strict=True)}


@dataclass(frozen=True)
class _Log:
    """The figures of a run, by phase, and where it was computed."""

    folder: Path
    rows: Mapping[str, list[dict[str, Any]]]
    hardware: tuple[str, ...]
    ranks: int

    def key(self, output: str) -> str | None:
        """Return the key of a product of the run."""
        product = self.folder / output
        return read_manifest(product).key if (product / MANIFEST).exists() else None


def _read(folder: Path) -> _Log:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in _lines(folder / "metrics.jsonl"):
        rows.setdefault(row["name"], []).append(row)
    processes = _lines(folder / "processes.jsonl")
    hardware = tuple(dict.fromkeys(row["hardware"] for row in processes))
    ranks = max((row["ranks"] for row in processes), default=1)
    return _Log(folder, rows, hardware, ranks)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON-lines file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a killed process
            continue
    return found


def _cost(run: Run, own: _Log, logs: Sequence[_Log]) -> Cost:
    path = run.folder / "plan.json"
    steps = load_plan(path).steps if path.exists() else ()
    seconds: list[float | None] = []
    memory: list[float] = []
    machines = dict.fromkeys(own.hardware)
    for step in steps:
        if not isinstance(step, TrainStep):
            continue
        log = _where(step, own, logs)
        rows = log.rows.get(step.name, []) if log else []
        seconds.append(_seconds(rows) * log.ranks if log and len(rows) > 1 else None)
        memory += [row["memory_gb"] for row in rows]
        machines |= dict.fromkeys(log.hardware if log else ())
    known = [entry for entry in seconds if entry is not None]
    said = [row for name, rows in own.rows.items() if name.startswith("generate/") for row in rows]
    items = sum(row["items"] for row in said)
    return Cost(
        train_hours=sum(known) / 3600 if known and len(known) == len(seconds) else None,
        train_memory_gb=max(memory, default=None),
        generate_seconds=own.ranks * sum(r["seconds"] for r in said) / items if items else None,
        generate_memory_gb=max((row["memory_gb"] for row in said), default=None),
        hardware=tuple(machines),
    )


def _where(step: TrainStep, own: _Log, logs: Sequence[_Log]) -> _Log | None:
    """Return the log of the run that made a step's product."""
    if step.name in own.rows:
        return own
    key = own.key(step.output)
    others = [log for log in logs if step.name in log.rows and log.key(step.output) == key]
    return others[0] if key is not None and others else None


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the time of all steps; one whose start is not known counts as the median of them."""
    found: dict[int, float | None] = {rows[0]["step"]: None}
    for before, row in pairwise(rows):
        follows = row["step"] == before["step"] + 1
        found[row["step"]] = row["time"] - before["time"] if follows else None
    known = [value for value in found.values() if value is not None]
    usual = statistics.median(known) if known else 0.0
    return sum(usual if value is None else value for value in found.values())
