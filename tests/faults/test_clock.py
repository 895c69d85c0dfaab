"""Rows 21 and 23 of docs/faults.md: locks, clocks, time zones and file times."""

import ast
import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.commands import BIN, environment, listing
from train.problem import losses
from train.processes import Ranks, train_command

from mera_ds.checkpoint import remembered_sha256
from mera_ds.config import REPOSITORY
from mera_ds.files import FAILPOINT_VARIABLE, folder_lock, sha256_file

PRODUCT = "stages/01-image/aligned"
CLOCKS = {"time.time", "time.time_ns", "time.ctime", "time.localtime", "time.strftime"}
MAY_READ_THE_CLOCK = {
    "mera_ds/evaluate/pace.py": "how long until the time at which a server wants to be asked",
    "mera_ds/log.py": "figures say when they were written",
    "mera_ds/shards/cache.py": "which download is the least recently used",
    "mera_ds/shards/verify.py": "whether a hash may be remembered",
}


def test_no_path_order_or_choice_depends_on_the_time() -> None:
    readers = set()
    for path in (REPOSITORY / "mera_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name in CLOCKS or name.startswith(("datetime.", "date.")):
                readers.add(str(path.relative_to(REPOSITORY)))
    assert readers == set(MAY_READ_THE_CLOCK)


def _train_with_a_clock_that_runs_backwards(run: Path) -> None:
    from mera_ds.cli.launch import train_stage

    seconds = itertools.count(10**9, -3600)
    time.time = lambda: float(next(seconds))
    time.time_ns = lambda: next(seconds) * 10**9
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    sys.argv = ["stage.py", "--run-folder", str(run), "--modality", "image"]
    sys.exit(train_stage(("align",)))


def test_clock_zone_and_file_times_change_nothing(
    run: Path, make_tiny_run: Callable[..., Path]
) -> None:
    """Killed, its checkpoints dated in reverse and in the future, continued in the past."""
    from .conftest import SHORT

    straight = make_tiny_run(*SHORT)
    assert train_command(straight, "image").wait()[0].exit_code == 0
    killed = {FAILPOINT_VARIABLE: "train.step:6"}
    train_command(run, "image", environment=killed).wait()
    checkpoints = sorted((run / "stages/01-image/align").glob("step-*"), reverse=True)
    assert [path.name for path in checkpoints] == ["step-000004", "step-000002"]
    for number, folder in enumerate(checkpoints):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (4e9 + number,) * 2)
    (ended,) = Ranks(_train_with_a_clock_that_runs_backwards, 1, run).wait()
    assert ended.exit_code == 0, ended.log
    assert f"continuing from {checkpoints[0]}" in ended.log
    assert listing(run / PRODUCT) == listing(straight / PRODUCT)
    assert losses(run) == losses(straight)


def test_weights_of_the_same_size_and_date_are_told_apart(tmp_path: Path) -> None:
    """As archives unpack them: every file of 1980."""
    weights, memory = tmp_path / "model.safetensors", tmp_path / "hashes.json"
    for content in (b"first", b"other"):
        weights.write_bytes(content)
        os.utime(weights, (315532800,) * 2)
        assert remembered_sha256(weights, memory) == sha256_file(weights)


@pytest.mark.parametrize(
    "words",
    [
        (str(BIN / "mera-ds"), "run"),
        (sys.executable, str(REPOSITORY / "launch/stage.py"), "--modality", "image", "--run"),
    ],
)
def test_a_second_process_is_refused_before_it_imports_torch(
    words: tuple[str, ...], run: Path
) -> None:
    (run / ".lock").unlink(missing_ok=True)
    before = listing(run)
    with folder_lock(run):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(
            [*words, str(run)],
            env=environment(PYTHONPATH=str(REPOSITORY)),
            capture_output=True,
            text=True,
            check=False,
        )
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 6, ended.stderr
    assert ended.stderr == (
        f"error: {run} is in use by process {os.getpid()}; wait for it or stop it\n"
    )
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < 1.0
    assert listing(run) == before


def test_what_was_changed_is_named(run: Path) -> None:
    """Row 22: continuing with another learning rate."""
    train_command(run, "image", environment={FAILPOINT_VARIABLE: "train.step:4"}).wait()
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("lr_connector: 0.003", "lr_connector: 0.004"), encoding="utf-8")
    (refused,) = train_command(run, "image").wait()
    assert refused.exit_code == 2
    assert "step-000002 was made with other data, settings or weights than the run has now: " in (
        refused.log
    )
    assert "settings.lr_connector: 0.003 before, 0.004 now; restore them" in refused.log
    config.write_text(text, encoding="utf-8")
    (ended,) = train_command(run, "image").wait()
    assert ended.exit_code == 0, ended.log
    assert [path.name for path in run.glob("stages/01-image/*.json")] == []
