"""A small run that the faults happen to."""

from collections.abc import Callable
from pathlib import Path

import pytest
from train.conftest import _process_server as _process_server

SHORT = (
    "order=[image]",
    "align.max_steps=6",
    "align.batch_size=4",
    "execution.save_every=2",
)


@pytest.fixture
def run(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run of one modality with six steps and two checkpoints."""
    return make_tiny_run(*SHORT)
