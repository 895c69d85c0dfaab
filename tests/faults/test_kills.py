"""Rows 1 to 6 of docs/faults.md: killed and stopped commands."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.commands import environment, listing
from train.problem import losses
from train.processes import Ended, Ranks, train_command

from mera_ds.config import REPOSITORY
from mera_ds.files import FAILPOINT_VARIABLE, TEMPORARY

PRODUCT = "stages/01-image/aligned"
CHECKPOINTS = "stages/01-image/align"


def start(run: Path, failpoint: str = "") -> Ranks:
    return train_command(run, "image", environment={FAILPOINT_VARIABLE: failpoint})


def end(run: Path, failpoint: str = "") -> Ended:
    return start(run, failpoint).wait()[0]


@pytest.mark.slow
def test_commands_killed_at_random_moments(tmp_path: Path) -> None:
    """The last four: merge, realign, evaluate, merge of folders; the others run undisturbed."""
    script = REPOSITORY / "benchmarks/kills.py"
    command = [sys.executable, str(script), "--kills", "4", "--seed", str(time.time_ns())]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    ended = subprocess.run(
        [*command, *places],
        env=environment(PYTHONPATH=str(REPOSITORY)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "\n0 problems: " in (tmp_path / "kills.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("point", ["tensors.written:3", "tensors.written:4"])
def test_killed_behind_each_file_of_a_checkpoint(point: str, run: Path, straight: Path) -> None:
    """The first checkpoint has two files of tensors, so these are those of the second."""
    assert end(run, point).exit_code == -signal.SIGKILL
    (unfinished,) = (run / CHECKPOINTS).glob(f"*{TEMPORARY}*")
    ended = end(run)
    assert ended.exit_code == 0, ended.log
    assert f"{unfinished} was left unfinished by a process that was killed; removed" in ended.log
    assert f"continuing from {run / CHECKPOINTS}/step-000002" in ended.log
    assert not list(run.rglob(f"*{TEMPORARY}*"))
    assert listing(run / PRODUCT) == listing(straight / PRODUCT)
    assert losses(run) == losses(straight)


@pytest.fixture(scope="module")
def straight(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run that nothing has disturbed."""
    from .conftest import SHORT

    run = make_tiny_run(*SHORT)
    assert end(run).exit_code == 0
    return run


def test_a_second_sigterm_ends_at_once(make_tiny_run: Callable[..., Path]) -> None:
    """The step is a long one, so that there is time for two."""
    run = make_tiny_run(
        "order=[image]",
        "align.max_steps=3",
        "align.batch_size=96",
        "execution.micro_batch_size=1",
        "execution.save_every=1",
    )
    ranks = start(run)
    while not list((run / CHECKPOINTS).glob("step-??????")):
        assert ranks.alive, ranks.log()
        time.sleep(0.002)
    ranks.signal(signal.SIGTERM)
    while "stopping at the end of this step" not in ranks.log():
        assert ranks.alive, ranks.log()
        time.sleep(0.002)
    ranks.signal(signal.SIGTERM)
    (ended,) = ranks.wait()
    assert ended.exit_code == -signal.SIGTERM
    done = sorted(path.name for path in (run / CHECKPOINTS).iterdir())
    assert done[-1] in ("step-000001", "step-000002")
    again = end(run)
    assert again.exit_code == 0, again.log
    assert f"continuing from {run / CHECKPOINTS}/{done[-1]}" in again.log


def test_features_of_a_killed_process_are_cleared_away(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    assert end(run, "tensors.written:1").exit_code == -signal.SIGKILL
    (unfinished,) = (tmp_path / "cache/features").rglob(f"*{TEMPORARY}*")
    assert not list((run / "stages").rglob("step-*"))
    assert end(run).exit_code == 0
    assert not unfinished.exists()
    shutil.rmtree(tmp_path / "cache")
