"""Training against HF `Trainer` + PEFT, and what packing, shared prefixes and caches are worth.

`python benchmarks/training.py` takes under nine minutes on two quiet cores and writes
`benchmarks/results/training-<machine>.{json,md}`; `--small` takes seconds and tells nothing. Every
measurement is a forked process with one thread (two where wall time counts); contenders are
interleaved and the best of each is kept. Those that compute the same must have equal losses, or
nothing is written.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for a script that is called by its path

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.training_features import make_data, read  # noqa: E402
from benchmarks.training_peer import train_peer  # noqa: E402
from benchmarks.training_problem import (  # noqa: E402
    Ours,
    Problem,
    first_step,
    smaller,
    train_ours,
    write_backbone,
)
from mera_ds.config import ExecutionConfig, Recomputation  # noqa: E402
from mera_ds.machine import commit  # noqa: E402
from mera_ds.model.mllm import Layout  # noqa: E402
from mera_ds.model.recompute import SELECTIVE  # noqa: E402
from mera_ds.train.setup import prepare_environment  # noqa: E402

LAYOUTS = {
    "padded": Layout(),
    "packed": Layout(packed=True),
    "ours, packed": Layout(packed=True),
    "ours, packed, selective": Layout(packed=True),
    "shared": Layout(packed=True, shared=True),
}
PROBLEMS = {
    "V 4096": Problem(4096),
    "V 128256": Problem(128_256),
    "AudioCaps-like": Problem(
        4096, hidden=256, layers=4, media_tokens=32, shortest=8, longest=60, batch=16, steps=4
    ),
    "MSVD-like": Problem(
        4096,
        hidden=256,
        layers=4,
        texts=40,
        together=8,
        shortest=4,
        longest=20,
        batch=8,
        steps=2,
    ),
    "ranks": Problem(4096, hidden=256, layers=4, media_tokens=144, batch=8, steps=5),
    "epoch": Problem(4096, hidden=256, layers=4, media_tokens=32, batch=8, units=100_000),
}
"""What is trained; `media_tokens` of the paper's encoders, text lengths assumed."""
CONTENDERS = {
    "V 4096": ("HF, checkpointing", "HF", "ours, checkpointing", "ours", "ours, packed"),
    "V 128256": ("HF, checkpointing", "ours, packed", "ours, packed, selective"),
    "AudioCaps-like": ("padded", "packed"),
    "MSVD-like": ("padded", "packed", "shared"),
    "loader": ("decoded", "cached"),
    "ranks": ("1", "2"),
    "epoch": ("start", "90 %"),
}
PEER = "HF, checkpointing"
REPEATS = {"V 128256": 1}
"""Fewer repeats of what takes long; the others have `--repeats`."""
THREADS = {"V 128256": 2}
"""Of what is measured in seconds rather than CPU seconds; the others have one."""
LOSS_TOLERANCE = 1e-4
RANK_MICRO_BATCH = 4

Row = dict[str, Any]
Figures = dict[str, dict[str, Row]]


def measure(task: str, name: str, folder: Path, small: bool) -> Row:
    """Take one measurement in this process."""
    torch.set_num_threads(THREADS.get(task, 1))
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        row = read(folder, name) if task == "loader" else _train(task, name, folder, work, small)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the process that started us
    return {**row, "peak_mb": int(status.partition("VmHWM:")[2].split()[0]) / 1e3}


def _train(task: str, name: str, folder: Path, work: Path, small: bool) -> Row:
    problem = smaller(PROBLEMS[task]) if small else PROBLEMS[task]
    backbone = folder / task.replace(" ", "-")
    write_backbone(backbone, problem)
    if task == "epoch":
        assert problem.units is not None
        late = problem.units * 9 // 10 // problem.batch
        return first_step(backbone, work, problem, late if name == "90 %" else 0)
    checkpointing = name.endswith("checkpointing")
    if name.startswith("HF"):
        return train_peer(backbone, work, problem, checkpointing)
    recomputation: Recomputation = SELECTIVE if name.endswith(SELECTIVE) else checkpointing
    how = Ours(recomputation, LAYOUTS.get(name, Layout()))
    if task == "ranks":
        how = replace(how, micro_batch=RANK_MICRO_BATCH)
    return train_ours(backbone, work, problem, how)


def in_process(task: str, name: str, folder: Path, small: bool) -> Row:
    """Measure in forked processes, one per rank; return the first rank's figures.

    They share what this process has imported, and nothing that it has computed.
    """
    context = multiprocessing.get_context("fork")
    ranks = int(name) if task == "ranks" else 1
    port = str(_free_port())
    started = []
    for rank in range(ranks):
        variables = {"MERA_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        if ranks > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_measure_there, args=(theirs, variables, task, name, folder, small)
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    rows = []
    for process, pipe in started:
        with contextlib.suppress(EOFError):
            rows.append(pipe.recv())
        process.join()
    if len(rows) < ranks:
        raise SystemExit(f"{task}, {name} failed")
    return dict(rows[0])


def _measure_there(pipe: Connection, variables: dict[str, str], *arguments: Any) -> None:
    os.environ.update(variables)
    os.dup2(2, 1)  # what libraries print is no result
    pipe.send(measure(*arguments))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def compare(folder: Path, small: bool, repeats: int) -> Figures:
    """Measure everything, contenders interleaved; keep the best of each figure."""
    found: Figures = {}
    for task, names in CONTENDERS.items():
        rows: dict[str, list[Row]] = {name: [] for name in names}
        for _ in range(min(repeats, REPEATS.get(task, repeats))):
            for name, row in rows.items():
                row.append(in_process(task, name, folder, small))
                print(f"{task}, {name}: {row[-1]['cpu']:.1f} CPU s", file=sys.stderr)
        found[task] = {name: _best(row) for name, row in rows.items()}
        _require_equal_losses(task, found[task])
    return found


def _best(rows: list[Row]) -> Row:
    least = ("cpu", "wall", "peak_mb", "saving", "waited")
    return {**rows[0], **{key: min(row[key] for row in rows) for key in least if key in rows[0]}}


def _require_equal_losses(task: str, rows: dict[str, Row]) -> None:
    losses = {name: row["losses"] for name, row in rows.items() if "losses" in row}
    for name, curve in losses.items():
        expected = next(iter(losses.values()))
        np.testing.assert_allclose(curve, expected, rtol=LOSS_TOLERANCE, err_msg=f"{task}, {name}")


def goals(found: Figures) -> list[tuple[str, str, float]]:
    """Return what was to be reached, as (figure, goal, measured)."""
    mini, large = found["V 4096"], found["V 128256"]
    ours, loader, ranks = mini["ours, packed"], found["loader"], found["ranks"]
    step = ranks["1"]["wall"] / (PROBLEMS["ranks"].steps - 1)
    saving, every = ranks["1"]["saving"], ExecutionConfig().save_every
    late = found["epoch"]["90 %"]["wall"] / found["epoch"]["start"]["wall"]
    return [
        ("V 4 096: tokens per CPU s / HF", "≥ 1.5", mini[PEER]["cpu"] / ours["cpu"]),
        *_vocabulary_goals(large),
        *_layout_goals(found),
        (
            "cached features: samples per CPU s / decoded",
            "≥ 20",
            loader["decoded"]["cpu"] / loader["cached"]["cpu"],
        ),
        ("cached features: media decoded in epoch 2", "0", loader["cached"]["decoded"]),
        ("2 ranks: speed / 2 x 1 rank", "", ranks["1"]["wall"] / ranks["2"]["wall"] / 2),
        ("waiting for data", "< 0.02", ranks["1"]["waited"] / ranks["1"]["wall"]),
        (f"saving every {every} steps", "< 0.02", saving / (saving + every * step)),
        ("first step at 90 % / at the start", "≤ 1.2", late),
    ]


def _vocabulary_goals(rows: dict[str, Row]) -> list[tuple[str, str, float]]:
    peer, found = rows[PEER], []
    for name in CONTENDERS["V 128256"][1:]:
        row, title = rows[name], f"V 128 256, {name}"
        found += [
            (f"{title}: tokens per s / HF", "≥ 5", peer["wall"] / row["wall"]),
            (f"{title}: peak memory / HF", "≤ 0.37", row["peak_mb"] / peer["peak_mb"]),
        ]
    return found


def _layout_goals(found: Figures) -> list[tuple[str, str, float]]:
    rows = []
    for task, name in (
        ("AudioCaps-like", "packed"),
        ("MSVD-like", "packed"),
        ("MSVD-like", "shared"),
    ):
        padded, other = found[task]["padded"], found[task][name]
        rows += [
            (f"{task}, {name}: positions saved", "", other["saved"]),
            (f"{task}, {name}: CPU s / padded", "", other["cpu"] / padded["cpu"]),
        ]
    return rows


def table(result: Row) -> str:
    """Return the results as Markdown."""
    lines = [f"{result['machine']}, commit {result['commit']}, {result['load']}", ""]
    lines += ["| figure | goal | measured |", "|---|---|---|"]
    lines += [f"| {what} | {goal} | {value:.3g} |" for what, goal, value in result["goals"]]
    lines += ["", "| task | contender | wall s | CPU s | tokens per CPU s | peak MB |"]
    lines += ["|---|---|---|---|---|---|"]
    for task, rows in result["figures"].items():
        for name, row in rows.items():
            speed = f"{row['tokens'] / row['cpu']:.0f}" if "tokens" in row else ""
            times = f"{row['wall']:.2f} | {row['cpu']:.2f} | {speed} | {row['peak_mb']:.0f}"
            lines.append(f"| {task} | {name} | {times} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "mera-training")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="only see that it works")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepare_environment()
    importlib.import_module("deepspeed")
    load = f"load {os.getloadavg()[0]:.1f} at start"
    arguments.data.mkdir(parents=True, exist_ok=True)
    make_data(arguments.data, arguments.small)
    found = compare(arguments.data, arguments.small, arguments.repeats)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 1e9:.0f} GB, no GPU used, torch {torch.__version__}",
        "commit": commit(),
        "load": load,
        "small": arguments.small,
        "goals": goals(found),
        "figures": found,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"training-{platform.machine()}-{os.cpu_count()}cpu"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
