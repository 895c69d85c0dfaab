"""The process server of the training tests, and the run they train on."""

import multiprocessing.forkserver
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from .processes import server


@pytest.fixture(scope="session", autouse=True)
def _process_server(cache: Path) -> Iterator[None]:
    """Start the server at once, on the CPU alone; it imports while the first test prepares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("DEEPSPEED_LOG_LEVEL", "error")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        server()
        multiprocessing.forkserver.ensure_running()
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def run(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run without dropout: its random numbers would differ with the number of ranks."""
    return make_tiny_run("modalities.audio.connector.options.dropout=0.0")
