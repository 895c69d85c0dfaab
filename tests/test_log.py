"""Figures on disk: both files hold them, and a disk that fails stops nothing."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mera_ds.log import PROCESSES, Metrics, format_duration
from mera_ds.machine import commit, hardware


def rows(run: Path) -> list[dict[str, float]]:
    """Return what `metrics.jsonl` holds, without the time."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "time"} for line in lines
    ]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    for start in (1, 3):  # two calls, as after a stop
        with Metrics(tmp_path, enabled=True) as metrics:
            for step in (start, start + 1):
                metrics.write("01-image/align", step, {"loss": 1 / step, "lr": 0.5})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["01-image/align/loss", "01-image/align/lr"]
    losses = [(event.step, event.value) for event in board.Scalars("01-image/align/loss")]
    assert losses == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)]
    assert rows(tmp_path)[2] == {"name": "01-image/align", "step": 3, "loss": 1 / 3, "lr": 0.5}


def test_a_process_that_writes_figures_says_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with Metrics(tmp_path, enabled=True) as metrics:
        assert not (tmp_path / PROCESSES).exists()
        metrics.write("a", 1, {"loss": 1.0})
        metrics.write("a", 2, {"loss": 1.0})
    (line,) = (tmp_path / PROCESSES).read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert (found["commit"], found["hardware"], found["ranks"]) == (commit(), hardware(), 4)
    assert "cores" in found["hardware"]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with Metrics(tmp_path, enabled=False) as metrics:
        metrics.write("a", 1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl"])
def test_what_can_not_be_written_is_said_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / name
    if name == "tensorboard":
        blocked.touch()
    else:
        blocked.mkdir()
    with caplog.at_level("WARNING", logger="mera_ds"), Metrics(tmp_path, enabled=True) as metrics:
        for step in (1, 2):
            metrics.write("a", step, {"loss": 1.0})
    assert len([entry for entry in caplog.messages if f"{blocked} can't be written" in entry]) == 1
    other = "metrics.jsonl" if name == "tensorboard" else "tensorboard"
    assert (tmp_path / other).exists()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
