"""The table that `kills.py` writes."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Counted(Protocol):
    """What became of one command."""

    name: str
    seconds: float
    kills: int
    with_work: int
    ends: int
    problems: list[str]


def markdown(tallies: Sequence[Counted], seconds: float, seed: int, load: float) -> str:
    """Return the result as Markdown; `load` is the machine's load before."""
    kills = sum(tally.kills for tally in tallies)
    ends = sum(tally.ends for tally in tallies)
    problems = [problem for tally in tallies for problem in tally.problems]
    lines = [
        f"# {kills} kills with SIGKILL at random moments",
        "",
        f"{_hardware()}, no GPU; profile `tiny`, one rank; commit {_commit()}; seed {seed}; "
        f"{seconds / 60:.1f} min of wall time, load before {load:.1f}. "
        f"`python benchmarks/kills.py --kills {kills}`",
        "",
        "| command | undisturbed s | kills | of them after a write | ends | problems |",
        "|---|---|---|---|---|---|",
        *(
            f"| {t.name} | {t.seconds:.2f} | {t.kills} | {t.with_work} | {t.ends} "
            f"| {len(t.problems)} |"
            for t in tallies
        ),
        "",
        f"{len(problems)} problems: after every kill all manifests, checkpoints, indices, tars, "
        f"safetensors and JSON files with a final name were read and compared with their hashes; "
        f"after each of the {ends} ends, reached by the same command without any other step, "
        "nothing unfinished was left (run, cache, outputs), all bytes were those of the "
        "undisturbed run, and no more steps had been repeated than lie between two saves. "
        "Times and locks (`metrics.jsonl`, `processes.jsonl`, TensorBoard, remembered hashes) are "
        "left out; of `metrics.jsonl` the losses are compared.",
        "",
        *(f"- {problem}" for problem in problems),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _hardware() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*:\s*(.*)", text)
    name = model[1] if model else platform.processor()
    return f"{os.cpu_count()} cores {name}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return result.stdout.strip() or "unknown"
