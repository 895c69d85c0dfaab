"""A realign over four modalities comes to the same connectors on any ranks and ZeRO stage."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from mera_ds.config import REPOSITORY
from mera_ds.distributed import process_group
from mera_ds.plan import EvaluateStep
from mera_ds.sequence import execute_step, open_run

from .problem import losses, meaningful, prepare
from .processes import run_ranks, train_command

LAST = Path("stages/04-pointcloud")
STEPS = 4
Connectors = dict[str, Tensor]


def _learn_all_but_the_last_realign(run: Path) -> None:
    opened = open_run(run)
    world = prepare()
    with process_group(world, timeout_seconds=60):
        for step in opened.plan.steps[:-2]:
            if not isinstance(step, EvaluateStep):
                execute_step(opened, step, world)


@pytest.fixture(scope="module")
def merged(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run of four modalities up to the last merge; without dropout, to compare ranks."""
    run = make_tiny_run(
        "align.max_steps=2",
        "tune.max_steps=2",
        f"realign.max_steps={STEPS}",
        "realign.batch_size=10",
        "modalities.audio.connector.options.dropout=0.0",
    )
    run_ranks(_learn_all_but_the_last_realign, 1, run, timeout=200)
    return run


def _realign(run: Path, *arguments: str, ranks: int) -> None:
    words = (run, "pointcloud", *arguments)
    ended = train_command(*words, ranks=ranks, phases=("realign",)).wait()
    assert all(end.exit_code == 0 for end in ended), ended[0].log


def _connectors(run: Path, product: str) -> Connectors:
    return {
        f"{path.stem}/{name}": tensor
        for path in sorted((run / LAST / product / "connectors").iterdir())
        for name, tensor in load_file(path).items()
    }


def _distance(first: Connectors, second: Connectors) -> float:
    assert first.keys() == second.keys()
    squares = (first[name] - second[name] for name in first if meaningful(name))
    return sum(float(difference.square().sum()) for difference in squares) ** 0.5


@pytest.fixture(scope="module")
def alone(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run realigned by one process."""
    run = Path(shutil.copytree(merged, tmp_path_factory.mktemp("alone") / "run"))
    _realign(run, ranks=1)
    return run


def _assert_equal(run: Path, alone: Path) -> None:
    """Compare connectors, relative to how far realigning moved them (measured: 2e-5)."""
    start, expected = _connectors(alone, "merged"), _connectors(alone, "model")
    assert {name.partition("/")[0] for name in expected} == {
        *("image", "video", "audio", "pointcloud")
    }
    moved = _distance(expected, start)
    assert moved > 0.1
    assert _distance(_connectors(run, "model"), expected) < 2e-4 * moved
    name = "04-pointcloud/realign"
    assert losses(run, name) == pytest.approx(losses(alone, name), rel=1e-6)
    assert len(losses(run, name)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_realign_as_one(zero: int, merged: Path, alone: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(merged, tmp_path / "run"))
    arguments = (f"execution.zero={zero}", "execution.micro_batch_size=1")
    _realign(run, *arguments, ranks=2)
    _assert_equal(run, alone)


@pytest.mark.slow
def test_the_real_command_under_torchrun(merged: Path, alone: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(merged, tmp_path / "run"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(REPOSITORY / "launch" / "realign.py")
    words = ["--run-folder", str(run), "--modality", "pointcloud", "execution.zero=2"]
    command = [sys.executable, *launcher, script, *words]
    subprocess.run(command, check=True, timeout=120, env=os.environ)
    _assert_equal(run, alone)
