"""Two "nodes" on one machine: two launchers with caches of their own and one run folder."""

import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mera_ds.features import FILE

from .commands import REPOSITORY, finish, readme_block, start, wait_for

pytestmark = pytest.mark.slow

NODES = "torchrun --nnodes 2"
SCRIPT = REPOSITORY / "launch/stage.py"
TIMEOUT = 10
GRACE = 35.0
"""Seconds that torchrun gives ranks to end, and some for a busy machine."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _tree(pid: int) -> list[psutil.Process]:
    """Return a launcher and all that it has started."""
    own = psutil.Process(pid)
    return [own, *own.children(recursive=True)]


def test_a_rank_stopped_on_one_node_ends_both(
    make_tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_tiny_run(
        "order=[image]",
        *("align.max_steps=5000", "align.epochs=5000", "execution.save_every=2"),
        f"execution.timeout_seconds={TIMEOUT}",
    )
    command = readme_block(NODES)[0]
    for printed, here in (
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        ("node1:29500", f"127.0.0.1:{_free_port()}"),
        ("launch/stage.py --modality audio", f"{SCRIPT} --run-folder {run} --modality image"),
    ):
        assert printed in command
        command = command.replace(printed, here)
    nodes = [start(command, tmp_path, {"MERA_CACHE": str(tmp_path / name)}) for name in "ab"]
    saved = run / "stages/01-image/align"
    for node in nodes:
        wait_for(lambda: any(saved.glob("step-??????")), node)
    trees = [_tree(node.pid) for node in nodes]
    for name in "ab":
        assert len(list((tmp_path / name).rglob(FILE))) == 1, "each node has its own features"
    stopped = next(entry for entry in trees[1] if "RANK" in entry.environ())
    rank = stopped.environ()["RANK"]
    stopped.suspend()
    started = [entry for _, *children in trees for entry in children]
    assert psutil.wait_procs(started, timeout=TIMEOUT + GRACE)[1] == []
    ended = [finish(node) for node in nodes]
    assert all(end.status != 0 for end in ended), ended
    errors = "".join(end.errors for end in ended)
    assert f"error: rank {rank} " in errors
    assert " at step " in errors
    assert "image/image-" in errors
