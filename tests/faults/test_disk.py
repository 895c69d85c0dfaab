"""Row 17 of docs/faults.md: a full disk. Checkpoints, merges: tests/cli/test_bad_input.py."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.commands import listing
from cli.test_bad_input import disk as disk
from cli.test_bad_input import fill_names, fill_space
from train.processes import train_command

from mera_ds.cli import main
from mera_ds.files import TEMPORARY


@pytest.mark.parametrize("fill", [fill_space, fill_names])
def test_shards_go_on_when_there_is_room(
    fill: Callable[[Path], None], disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a byte, the check before the writing says so; without a name, the write itself."""
    command = ["shards", "build", "tiny", "--out"]
    out = disk / "shards"
    assert main([*command, str(tmp_path / "expected")]) == 0
    assert main([*command, str(out)]) == 0
    shutil.rmtree(out / "video")
    fill(disk)
    before = listing(out)
    assert main([*command, str(out)]) == 5
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "free some space" in message
    assert listing(out) == before
    assert not list(out.rglob(f"*{TEMPORARY}*"))
    shutil.rmtree(disk / "filler")
    assert main([*command, str(out)]) == 0
    assert listing(out) == listing(tmp_path / "expected")


def test_features_leave_nothing_behind(
    run: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the names of the locks and hashes, but not for the features."""
    cache = disk / "cache"
    monkeypatch.setenv("MERA_CACHE", str(cache))
    fill_names(disk)
    for number in range(8):
        (disk / f"filler/{number}").unlink()
    (ended,) = train_command(run, "image").wait()
    assert ended.exit_code == 5, ended.log
    assert "the disk is full: " in ended.log
    assert "free some space and run the same command again" in ended.log
    assert not list(cache.rglob(f"*{TEMPORARY}*"))
    shutil.rmtree(disk / "filler")
    (ended,) = train_command(run, "image").wait()
    assert ended.exit_code == 0, ended.log


def test_figures_that_can_not_be_written_never_stop_training(run: Path) -> None:
    """/dev/full is a file whose disk is always full."""
    (run / "metrics.jsonl").symlink_to("/dev/full")
    (run / "tensorboard").write_text("no folder", encoding="utf-8")
    (ended,) = train_command(run, "image").wait()
    assert ended.exit_code == 0, ended.log
    assert ended.log.count("can't be written") == 1
    assert (run / "stages/01-image/aligned/manifest.json").exists()
