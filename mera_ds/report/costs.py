"""What a run took: training time and memory from its steps, generation from its evaluations."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from mera_ds.log import PROCESSES
from mera_ds.manifest import MANIFEST, read_manifest
from mera_ds.plan import FisherStep, TrainStep, load_plan
from mera_ds.report.results import Run


@dataclass(frozen=True)
class Cost:
    """What one run took; None: not recorded."""

    train_hours: float | None
    """All training steps together, by the clock, times the ranks; repeated steps count once. With
    the measuring of Fisher information, unless the run is from before that was recorded."""
    train_memory_gb: float | None
    """Largest of these, on one rank: GPU memory, or resident memory on a CPU."""
    generate_seconds: float | None
    """Per generated text, times the ranks."""
    token_milliseconds: float | None
    """Per generated token, end tokens included, times the ranks."""
    batch_sizes: tuple[int, ...]
    """Of generation."""
    generate_memory_gb: float | None
    hardware: tuple[str, ...]
    """Machines that the run computed on."""
    commits: Mapping[int, tuple[str, ...]]
    """Of the code that trained each stage, as far as it was recorded."""


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
    processes: tuple[dict[str, Any], ...]
    """In the order in which they started."""

    def process(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is known of the process that wrote a row; of old runs nothing."""
        before = [entry for entry in self.processes if entry["time"] <= row["time"]]
        return before[-1] if before else {}

    @cached_property
    def keys(self) -> Mapping[Path, str]:
        """Return the key of every product of the run, by folder."""
        manifests = sorted(self.folder.glob(f"stages/*/*/{MANIFEST}"))
        return {path.parent: read_manifest(path.parent).key for path in manifests}


def _read(folder: Path) -> _Log:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in _lines(folder / "metrics.jsonl"):
        rows.setdefault(row["name"], []).append(row)
    return _Log(folder, rows, tuple(_lines(folder / PROCESSES)))


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
    machines: list[str] = []
    commits: dict[int, dict[str, None]] = {}
    for step in steps:
        if not isinstance(step, TrainStep | FisherStep):
            continue
        log = _where(step, own, logs)
        rows = log.rows.get(step.name, []) if log else []
        process = log.process(rows[-1]) if log and rows else {}
        if isinstance(step, FisherStep):
            seconds += [rows[-1]["seconds"] * process.get("ranks", 1)] if rows else []
        else:
            seconds.append(_seconds(rows, log) if log and len(rows) > 1 else None)
        memory += [row["memory_gb"] for row in rows]
        if process:
            machines.append(process["hardware"])
            commits.setdefault(step.stage, {})[process["commit"]] = None
    known = [entry for entry in seconds if entry is not None]
    said = [row for name, rows in own.rows.items() if name.startswith("generate/") for row in rows]
    counted = [row for row in said if "tokens" in row]  # older rows have none
    machines += [own.process(row)["hardware"] for row in said if own.process(row)]
    return Cost(
        train_hours=sum(known) / 3600 if known and len(known) == len(seconds) else None,
        train_memory_gb=max(memory, default=None),
        generate_seconds=_per(said, own, "items"),
        token_milliseconds=_per(counted, own, "tokens", 1000),
        batch_sizes=tuple(sorted({row["batch_size"] for row in counted})),
        generate_memory_gb=max((row["memory_gb"] for row in said), default=None),
        hardware=tuple(dict.fromkeys(machines)),
        commits={stage: tuple(found) for stage, found in commits.items()},
    )


def _per(
    rows: Sequence[Mapping[str, Any]], log: _Log, what: str, unit: float = 1.0
) -> float | None:
    """Return the time that all ranks spent on one of something."""
    number = sum(row[what] for row in rows)
    spent = sum(row["seconds"] * log.process(row).get("ranks", 1) for row in rows)
    return unit * spent / number if number else None


def _where(step: TrainStep | FisherStep, own: _Log, logs: Sequence[_Log]) -> _Log | None:
    """Return the log of the run that made a step's product."""
    if step.name in own.rows:
        return own
    key = own.keys.get(own.folder / step.output)
    others = [log for log in logs if step.name in log.rows and key in log.keys.values()]
    return others[0] if key is not None and others else None


def _seconds(rows: Sequence[Mapping[str, Any]], log: _Log) -> float:
    """Return the time of all steps, each times its ranks.

    One whose start is not known counts as the median of them. That is the first of a process:
    between it and the step before, nothing may have run.
    """
    found: dict[int, float | None] = {rows[0]["step"]: None}
    for before, row in pairwise(rows):
        process = log.process(row)
        follows = row["step"] == before["step"] + 1 and process == log.process(before)
        spent = (row["time"] - before["time"]) * process.get("ranks", 1)
        found[row["step"]] = spent if follows else None
    known = [value for value in found.values() if value is not None]
    usual = statistics.median(known) if known else 0.0
    return sum(usual if value is None else value for value in found.values())
