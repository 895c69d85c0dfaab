"""Saving in the background: nothing is lost, nothing is hidden, and the training doesn't wait."""

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mera_ds.config import ExecutionConfig
from mera_ds.distributed import World
from mera_ds.errors import DataError, ResourceError
from mera_ds.files import FAILPOINT_VARIABLE, TEMPORARY, sha256_file
from mera_ds.log import logger
from mera_ds.train.engine import EngineState
from mera_ds.train.saving import Saver
from mera_ds.train.state import Progress, load_checkpoint

from .processes import Ended, train_command

ALONE = World(rank=0, size=1, local_rank=0)
NAME = "lora/weight"
MEGABYTE = 250_000
"""So many fp32 numbers."""


def state(value: float, numbers: int = 4) -> Callable[[], EngineState]:
    tensor = torch.full((numbers,), value)
    return lambda: EngineState({NAME: tensor}, {NAME: tensor[:1]}, {"adam_step": 1.0})


def huge() -> EngineState:
    return EngineState({NAME: torch.zeros(1).expand(10**16)}, {}, {})


def saver(folder: Path, saving: str = "background") -> Saver:
    execution = ExecutionConfig(saving=saving, keep_checkpoints=2)  # type: ignore[arg-type]
    return Saver(folder, "key", execution, ALONE)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    with saver(tmp_path) as saving:
        saving.save(state(1.0, 64 * MEGABYTE), Progress(1, 0))
        assert not (tmp_path / "step-000001").exists()
        saving.save(state(2.0), Progress(2, 0))
        assert (tmp_path / "step-000001").exists(), "the one before is waited for"
        saving.save(state(3.0), Progress(3, 0))
    assert steps(tmp_path) == ["step-000002", "step-000003"], "leaving waits for the last"
    found = load_checkpoint(tmp_path, "key")
    assert found is not None
    assert torch.equal(found[1].parameters[NAME], torch.full((4,), 3.0))


def test_blocking_is_done_at_once(tmp_path: Path) -> None:
    with saver(tmp_path, "blocking") as saving:
        saving.save(state(1.0, 8 * MEGABYTE), Progress(1, 0))
        assert steps(tmp_path) == ["step-000001"]


@pytest.mark.parametrize(("bad", "kind"), [(huge, ResourceError), (state(float("nan")), DataError)])
def test_an_error_is_known_and_raised_later(
    bad: Callable[[], EngineState], kind: type[Exception], tmp_path: Path
) -> None:
    with saver(tmp_path) as saving:
        saving.save(state(1.0), Progress(1, 0))
        saving.save(bad, Progress(2, 0))
        with pytest.raises(kind):
            saving.finish()
        assert not saving.failed, "it is raised once"
    with saver(tmp_path) as saving:
        saving.save(bad, Progress(2, 0))
        with pytest.raises(kind):
            saving.save(state(3.0), Progress(3, 0))
    assert steps(tmp_path) == ["step-000001"]


@pytest.fixture
def log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    """Return what catches our messages."""
    caplog.set_level(logging.INFO, logger=logger.name)
    monkeypatch.setattr(logger, "propagate", True)
    return caplog


def stopped_while_saving(folder: Path) -> None:
    with saver(folder) as saving:
        saving.save(huge, Progress(1, 0))
        raise KeyboardInterrupt


def test_another_error_does_not_hide_it(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped_while_saving(tmp_path)
    assert "the last checkpoint was not written" in log.text
    assert "free some space" in log.text


def test_its_size_is_logged_once(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with saver(tmp_path) as saving:
        saving.save(state(1.0, 3 * MEGABYTE), Progress(1, 0))
        saving.save(state(1.0, 3 * MEGABYTE), Progress(2, 0))
    (line,) = (text for text in log.messages if text.startswith("a checkpoint takes"))
    assert line.startswith("a checkpoint takes 3.0 MB and ")
    assert line.endswith(" s to write; 2 are kept")


@pytest.fixture(scope="module")
def template(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run that saves every other step."""
    return make_tiny_run(
        "order=[audio]", "align.max_steps=6", "align.batch_size=4", "execution.save_every=2"
    )


def train(run: Path, saving: str = "background", failpoint: str = "") -> Ended:
    arguments = (f"execution.saving={saving}", "execution.keep_every=2")
    environment = {FAILPOINT_VARIABLE: failpoint}
    return train_command(run, "audio", *arguments, environment=environment).wait()[0]


def product(run: Path) -> dict[str, str]:
    """Return the hashes of the files of what was trained."""
    folder = run / "stages/01-audio/aligned"
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def figures(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def expected(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the product of a run that saved while it waited."""
    run = Path(shutil.copytree(template, tmp_path_factory.mktemp("expected") / "run"))
    ended = train(run, "blocking")
    assert ended.exit_code == 0, ended.log
    assert "and each of 2 steps" in ended.log
    shares = figures(run)[-1]
    assert 0 < shares["save_wait"] < 1
    assert 0 < shares["data_wait"] < 1
    return product(run)


@pytest.mark.parametrize(
    "failpoint",
    [
        "commit.before_rename:2",
        pytest.param("commit.after_rename:1", marks=pytest.mark.slow),
        pytest.param("train.step:4", marks=pytest.mark.slow),
    ],
)
def test_killed_while_the_thread_writes(
    failpoint: str, template: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(template, tmp_path / "run"))
    assert train(run, failpoint=failpoint).exit_code == -signal.SIGKILL
    ended = train(run)
    assert ended.exit_code == 0, ended.log
    assert product(run) == expected
    assert not list(run.rglob(f"*{TEMPORARY}*"))
    assert not list((run / "stages/01-audio/align").iterdir())
