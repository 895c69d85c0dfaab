"""A finished shard folder for the tests."""

from pathlib import Path

import pytest

from .samples import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a complete folder of twelve samples in six tars."""
    path = tmp_path / "numbers" / "train"
    write(path)
    return path
