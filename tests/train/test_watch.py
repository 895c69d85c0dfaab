"""A rank that dies or hangs brings all down in time, by name; the same command continues."""

import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mera_ds.cli.launch import train_stage
from mera_ds.errors import RankError

from .problem import losses
from .processes import Ended, Ranks, train_command

pytestmark = pytest.mark.slow

TIMEOUT = 8
SLACK = 7.0
"""Seconds on top of the timeout, on a busy machine."""
CHECKPOINTS = Path("stages/01-audio/align")


@pytest.fixture(scope="module")
def template(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run with steps enough to be disturbed in the middle."""
    return make_tiny_run(
        "order=[audio]",
        *("align.max_steps=400", "align.epochs=400", "align.batch_size=4"),
        *("execution.save_every=5", f"execution.timeout_seconds={TIMEOUT}"),
    )


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """Return an untouched copy of it."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def _wait_for_checkpoint(run: Path, ranks: Ranks) -> None:
    while not list((run / CHECKPOINTS).glob("step-??????")):
        assert ranks.alive, ranks.log()
        time.sleep(0.01)


def _disturb(run: Path, number: int) -> tuple[list[Ended], float]:
    """Send a signal to the second of two ranks; return how both ended, and after how long."""
    ranks = train_command(run, "audio", ranks=2)
    _wait_for_checkpoint(run, ranks)
    ranks.signal(number, rank=1)
    sent = time.monotonic()
    while ranks.alive:
        assert time.monotonic() - sent < 60, ranks.log()
        time.sleep(0.05)
    return ranks.wait(), time.monotonic() - sent


def test_a_stopped_rank_is_named_and_ends_all(run: Path) -> None:
    """That a killed one does is tested in test_loop.py."""
    (survivor, lost), seconds = _disturb(run, signal.SIGSTOP)
    assert survivor.exit_code == RankError.exit_code, survivor.log
    assert lost.exit_code == -signal.SIGKILL
    assert seconds < TIMEOUT + SLACK
    (line,) = (entry for entry in survivor.log.splitlines() if entry.startswith("error: rank 1 "))
    assert re.search(r"process \d+ on \S+, .* at step \d+ with audio/audio-", line)
    assert "error: rank 1 did not answer for 8 s and was killed: " in lost.log
    again = train_command(run, "audio", "execution.timeout_seconds=100", ranks=2)
    while len(losses(run)) < 8:
        assert again.alive, again.log()
        time.sleep(0.01)
    assert "continuing from" in again.log()
    again.signal(signal.SIGTERM)
    assert {end.exit_code for end in again.wait()} == {143}
    assert not list((run / CHECKPOINTS / "ranks").glob("*"))


def _hanging(run: Path) -> None:
    """Run the command with a second rank that never returns from reading its third step."""
    import mera_ds.train.stage
    from mera_ds.data.loader import StepLoader

    class Hanging(StepLoader):
        def __getitem__(self, step: int) -> Any:
            while step == 2 and self._settings.rank == 1:
                time.sleep(1)
            return super().__getitem__(step)

    mera_ds.train.stage.StepLoader = Hanging
    sys.argv = ["stage.py", "--run-folder", str(run), "--modality", "audio"]
    sys.exit(train_stage(("align",)))


def test_a_rank_that_does_not_get_on_is_named(run: Path) -> None:
    ended = Ranks(_hanging, 2, run).wait()
    assert RankError.exit_code in [end.exit_code for end in ended], ended
    lines = "".join(end.log for end in ended)
    assert "error: rank 1 has not got on for 8 s: process " in lines
    assert "reading at step 2 with audio/audio-" in lines
    assert "error: rank 0 " not in lines
