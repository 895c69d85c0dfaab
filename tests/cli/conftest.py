"""Runs that the tests of the commands start from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .commands import REPOSITORY, listing, run, succeed

SHORT = (
    "order=[image,video]",
    "align.max_steps=9",
    "tune.max_steps=4",
    "execution.save_every=3",
)
"""Settings of a run that takes seconds."""


@pytest.fixture(scope="session")
def merged_template(
    make_tiny_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a short run that is finished up to the merge of its second and last stage."""
    folder = make_tiny_run(*SHORT)
    succeed(f"mera-ds run {folder} --until 02-video/merge", tmp_path_factory.mktemp("template"))
    return folder


@pytest.fixture
def merged(merged_template: Path, tmp_path: Path) -> Path:
    """Return a copy of it that a test may damage; no file of it is shared."""
    return Path(shutil.copytree(merged_template, tmp_path / "merged"))


@pytest.fixture
def fresh(merged_template: Path, tmp_path: Path) -> Path:
    """Return a copy of it on which nothing has been done yet."""
    without = shutil.ignore_patterns("stages", "tensorboard", "metrics.jsonl", "results.jsonl")
    return Path(shutil.copytree(merged_template, tmp_path / "fresh", ignore=without))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command which must fail and must leave no trace.

    It takes the command line, the exit status, the folder to watch, and variables; it returns the
    error message.
    """
    return lambda command, status, folder, **variables: _refused(
        command, status, folder, tmp_path, variables
    )


def _refused(
    command: str, status: int, folder: Path, place: Path, variables: dict[str, str]
) -> str:
    before = listing(folder)
    ended = run(command.replace("launch/", f"{REPOSITORY}/launch/"), place, **variables)
    assert ended.status == status, ended
    after = listing(folder)
    assert after.keys() == before.keys(), ended
    assert after == before
    return ended.message
