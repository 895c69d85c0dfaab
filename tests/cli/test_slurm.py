"""The SLURM script, with `srun` and `scontrol` that start processes on this machine."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .commands import REPOSITORY, finish, run, start, wait_for

SCRIPT = REPOSITORY / "launch/slurm/stage.sbatch"
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys

assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | {{"SLURM_PROCID": n, "SLURM_LOCALID": n}})
    for n in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'localhost\\nelsewhere\\n'; else echo "$@" >> requeued; fi
"""
VARIABLES = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a job of two tasks, whose commands begin on the PATH."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    python = Path(sys.executable).parent
    path = os.pathsep.join([str(tmp_path / "bin"), str(python), os.environ["PATH"]])
    return {**VARIABLES, "SLURM_NTASKS": "2", "PATH": path}


def _requeued(folder: Path) -> bool:
    path = folder / "requeued"
    return path.exists() and path.read_text().split() == ["requeue", VARIABLES["SLURM_JOB_ID"]]


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (75, 19, True), (75, 20, False), (143, 0, False)],
)
def test_only_lost_ranks_go_back_by_themselves(
    status: int, restarts: int, again: bool, job: dict[str, str], tmp_path: Path
) -> None:
    """143 without the signal is somebody's wish to stop."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR')\n"
        "words = [*(os.environ[name] for name in names), *sys.argv[1:]]\n"
        "os.write(1, f'{words}\\n'.encode())\n"
        f"sys.exit({status} * int(os.environ['RANK']))\n"
    )
    command = f"bash {SCRIPT} {script} --run 'a b'"
    ended = run(command, tmp_path, **job, SLURM_RESTART_COUNT=str(restarts))
    assert ended.status == status, ended
    said = [line for line in ended.output.splitlines() if "localhost" in line]
    assert sorted(said) == [f"{[rank, rank, '2', 'localhost', '--run', 'a b']}" for rank in "01"]
    assert _requeued(tmp_path) == again


def test_it_says_how_it_is_used(job: dict[str, str], tmp_path: Path) -> None:
    ended = run(f"bash {SCRIPT}", tmp_path, **job)
    assert ended.status == 2
    assert "usage: sbatch launch/slurm/stage.sbatch launch/stage.py" in ended.errors


@pytest.mark.slow
def test_out_of_time_it_saves_and_goes_back_to_the_queue(
    job: dict[str, str], make_tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_run("order=[image]", "align.max_steps=5000", "align.epochs=5000")
    words = f"{REPOSITORY}/launch/stage.py --run {folder} --modality image"
    process = start(f"bash {SCRIPT} {words}", tmp_path, {**job, "SLURM_NTASKS": "1"})
    checkpoints = folder / "stages/01-image/align"
    wait_for(lambda: any(checkpoints.glob("step-??????")), process)
    process.send_signal(signal.SIGUSR1)
    ended = finish(process)
    assert ended.status == 143, ended
    assert "saved; back to the queue" in ended.output
    assert "stopped at step" in ended.errors
    assert _requeued(tmp_path)
