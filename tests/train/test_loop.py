"""Stopping and continuing: whatever ends a training step, the same command finishes it.

The processes are real and so are the signals. Products are compared byte by byte with those of a
run that nothing disturbed.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mera_ds.cli.launch import train_stage
from mera_ds.config import REPOSITORY
from mera_ds.errors import DataError, InputError, Interrupted, RankError
from mera_ds.files import FAILPOINT_VARIABLE, TEMPORARY, sha256_file, write_bytes
from mera_ds.log import Metrics

from .problem import losses
from .processes import Ended, Ranks, train_command

STEPS, EVERY = 6, 2
PRODUCT = Path("stages/01-audio/aligned")
CHECKPOINTS = Path("stages/01-audio/align")
MakeRun = Callable[..., Path]
Contents = dict[str, str]


@pytest.fixture(scope="module")
def template(make_tiny_run: MakeRun) -> Path:
    """Return a run that begins with sounds: their connector has dropout, and so random numbers."""
    return make_tiny_run(
        "order=[audio, image]",
        f"align.max_steps={STEPS}",
        f"tune.max_steps={STEPS}",
        "align.batch_size=4",
        "tune.batch_size=4",
        f"execution.save_every={EVERY}",
    )


@pytest.fixture
def fresh(template: Path, tmp_path: Path) -> Path:
    """Return an untouched copy of the run."""
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(
    template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Contents, list[float]]]:
    """Return a function that trains without disturbance, once for each way of executing it."""
    known: dict[tuple[int, int], tuple[Contents, list[float]]] = {}

    def train(ranks: int = 1, zero: int = 1) -> tuple[Contents, list[float]]:
        if (ranks, zero) not in known:
            run = Path(shutil.copytree(template, tmp_path_factory.mktemp("undisturbed") / "run"))
            _finish(run, f"execution.zero={zero}", ranks=ranks)
            known[ranks, zero] = _contents(run), losses(run)
        return known[ranks, zero]

    return train


def _contents(run: Path, product: Path = PRODUCT) -> Contents:
    files = (path for path in sorted((run / product).rglob("*")) if path.is_file())
    return {str(path.relative_to(run / product)): sha256_file(path) for path in files}


def _leftovers(run: Path) -> list[Path]:
    return list(run.rglob(f"*{TEMPORARY}*"))


def _start(
    run: Path, *arguments: str, failpoint: str = "", ranks: int = 1, phase: str = "align"
) -> Ranks:
    environment = {FAILPOINT_VARIABLE: failpoint}
    return train_command(
        run, "audio", *arguments, ranks=ranks, environment=environment, phases=(phase,)
    )


def _run(run: Path, *arguments: str, failpoint: str = "", ranks: int = 1) -> list[Ended]:
    return _start(run, *arguments, failpoint=failpoint, ranks=ranks).wait()


def _finish(run: Path, *arguments: str, ranks: int = 1) -> str:
    ended = _run(run, *arguments, ranks=ranks)
    assert [end.exit_code for end in ended] == [0] * ranks, ended[0].log
    return ended[0].log


def _kill(run: Path, failpoint: str, *arguments: str, ranks: int = 1) -> None:
    ended = _run(run, *arguments, failpoint=failpoint, ranks=ranks)
    assert -signal.SIGKILL in [end.exit_code for end in ended], ended[0].log


def _edit(run: Path, old: bytes, new: bytes) -> None:
    config = run / "config.yaml"
    content = config.read_bytes()
    assert old in content
    write_bytes(config, content.replace(old, new))


QUICK = ("train.step:4", "commit.before_rename:2", "commit.after_rename:3")
THOROUGH = (
    *(f"train.step:{step}" for step in (1, 2, 3, 5, 6)),
    *("commit.before_rename:1", "commit.before_rename:3"),
    *("commit.after_rename:1", "commit.after_rename:2"),
)


@pytest.mark.parametrize(
    "failpoint", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in THOROUGH)]
)
def test_killed_anywhere(
    failpoint: str, fresh: Path, undisturbed: Callable[..., tuple[Contents, list[float]]]
) -> None:
    """The commits are two checkpoints and the product."""
    contents, figures = undisturbed()
    _kill(fresh, failpoint)
    assert bool(_leftovers(fresh)) == failpoint.startswith("commit.before_rename")
    _finish(fresh)
    assert _contents(fresh) == contents
    assert losses(fresh) == figures
    assert not _leftovers(fresh)
    assert not list((fresh / CHECKPOINTS).iterdir()), "a finished phase keeps no checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_killed_under_every_stage(
    zero: int, fresh: Path, undisturbed: Callable[..., tuple[Contents, list[float]]]
) -> None:
    _kill(fresh, "train.step:4", f"execution.zero={zero}")
    assert "step-000002" in _finish(fresh, f"execution.zero={zero}")
    assert _contents(fresh) == undisturbed(zero=zero)[0]
    if zero < 3:
        assert _contents(fresh) == undisturbed()[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_killed_with_two_ranks(
    zero: int, fresh: Path, undisturbed: Callable[..., tuple[Contents, list[float]]]
) -> None:
    _kill(fresh, "train.step:6", f"execution.zero={zero}", ranks=2)
    assert "step-000004" in _finish(fresh, f"execution.zero={zero}", ranks=2)
    assert _contents(fresh) == undisturbed(ranks=2, zero=zero)[0]


@pytest.mark.slow
def test_killed_at_random_times(
    fresh: Path, undisturbed: Callable[..., tuple[Contents, list[float]]]
) -> None:
    generator = random.Random()
    for _ in range(10):
        ranks = _start(fresh)
        time.sleep(generator.uniform(0.1, 2.0))
        ranks.signal(signal.SIGKILL)
        ranks.wait()
    _finish(fresh)
    assert _contents(fresh) == undisturbed()[0]
    assert not _leftovers(fresh)


@pytest.mark.slow
def test_a_lost_rank_ends_the_others(
    fresh: Path, undisturbed: Callable[..., tuple[Contents, list[float]]]
) -> None:
    ranks = _start(fresh, ranks=2)
    _wait_for_steps(fresh, 1, ranks)
    ranks.signal(signal.SIGKILL, rank=1)
    survivor, lost = ranks.wait()
    assert lost.exit_code == -signal.SIGKILL
    assert survivor.exit_code == RankError.exit_code, "it must end by itself"
    (line,) = (text for text in survivor.log.splitlines() if text.startswith("error: "))
    assert re.match(
        r"error: rank 1 died or was stopped: process \d+ on \S+, .* at step \d+ with audio/audio-",
        line,
    )
    _finish(fresh, ranks=2)
    assert _contents(fresh) == undisturbed(ranks=2)[0]


@pytest.mark.slow
def test_another_stage_and_number_of_ranks_continue(fresh: Path) -> None:
    """Connector and LoRA; dropout is off for the comparison.

    One rank to two to one, ZeRO 1 to 3 to 2, later with offloading.
    """
    config = fresh / "config.yaml"
    write_bytes(
        config, config.read_bytes().replace(b"norm: data", b"norm: data\n        dropout: 0.0")
    )
    _finish(fresh)
    straight, changing = (
        Path(shutil.copytree(fresh, fresh.with_name(name))) for name in ("straight", "changing")
    )
    assert _start(straight, phase="tune").wait()[0].exit_code == 0
    killed = "train.step:3"
    for zero, offload, ranks, failpoint in (
        (1, False, 1, killed),
        (3, True, 2, killed),
        (2, True, 1, ""),
    ):
        settings = [f"execution.zero={zero}"]
        if offload:
            path = REPOSITORY / "ds_configs" / f"zero{zero}-offload.json"
            settings.append(f"execution.ds_config={path}")
        ended = _start(changing, *settings, failpoint=failpoint, ranks=ranks, phase="tune").wait()
        assert (ended[0].exit_code == 0) == (not failpoint), ended[0].log
    assert losses(changing, "01-audio/tune") == pytest.approx(
        losses(straight, "01-audio/tune"), rel=1e-6
    )
    model = Path("stages/01-audio/model")
    for file in ("connectors/audio.safetensors", "deltas/01-audio.safetensors"):
        found, expected = (load_file(run / model / file) for run in (changing, straight))
        assert found.keys() == expected.keys()
        error, size = (
            sum(float((found[key] * one - expected[key]).square().sum()) for key in expected)
            for one in (1, 0)
        )
        assert error < 1e-8 * size


def _wait_for_steps(run: Path, count: int, ranks: Ranks) -> None:
    while len(losses(run)) < count:
        assert ranks.alive, ranks.log()
        time.sleep(0.005)


@pytest.fixture
def long(make_tiny_run: MakeRun) -> Path:
    """Return a run with steps enough to be stopped in the middle, and no regular checkpoint."""
    return make_tiny_run(
        "order=[audio]", "align.max_steps=60", "align.batch_size=4", "execution.save_every=1000"
    )


@pytest.mark.parametrize(
    ("number", "saving"),
    [
        (signal.SIGTERM, "background"),
        pytest.param(signal.SIGINT, "blocking", marks=pytest.mark.slow),
    ],
)
def test_a_stop_signal_saves_at_the_next_step(number: int, saving: str, long: Path) -> None:
    undisturbed = Path(shutil.copytree(long, long.with_name("undisturbed")))
    ranks = _start(long, f"execution.saving={saving}")
    _wait_for_steps(long, 2, ranks)
    ranks.signal(number)
    (stopped,) = ranks.wait()
    assert stopped.exit_code == Interrupted.exit_code, stopped.log
    done = len(losses(long))
    assert done < 60
    assert f"stopped at step {done} of 60, saved; run the same command to continue" in stopped.log
    (checkpoint,) = (long / CHECKPOINTS).iterdir()
    assert checkpoint.name == f"step-{done:06d}"
    assert f"continuing from {checkpoint}" in _finish(long)
    _finish(undisturbed)
    assert _contents(long) == _contents(undisturbed)
    assert losses(long) == losses(undisturbed)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(long: Path) -> None:
    ranks = _start(long, ranks=2)
    _wait_for_steps(long, 2, ranks)
    ranks.signal(signal.SIGTERM, rank=1)
    assert [end.exit_code for end in ranks.wait()] == [Interrupted.exit_code] * 2
    assert [path.name for path in (long / CHECKPOINTS).iterdir()] == [
        f"step-{len(losses(long)):06d}"
    ]


class _StopsItself(Metrics):
    """Sends this process SIGTERM when the last step is done but the phase isn't over."""

    def write(self, name: str, step: int, values: dict[str, float]) -> None:
        super().write(name, step, values)
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)


def _train_stopping_in_the_last_step(run: Path) -> None:
    import mera_ds.train.stage

    mera_ds.train.stage.Metrics = _StopsItself
    sys.argv = ["stage.py", "--run-folder", str(run), "--modality", "audio"]
    sys.exit(train_stage(("align", "tune")))


def test_a_stop_signal_in_the_last_step_is_not_lost(
    fresh: Path, undisturbed: Callable[..., tuple[Contents, list[float]]]
) -> None:
    """It must not start the next phase."""
    (stopped,) = Ranks(_train_stopping_in_the_last_step, 1, fresh).wait()
    assert stopped.exit_code == Interrupted.exit_code, stopped.log
    assert f"stopped at step {STEPS} of {STEPS}" in stopped.log
    _finish(fresh)
    assert _contents(fresh) == undisturbed()[0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_the_real_command_stops_and_continues(launcher: str, long: Path) -> None:
    start = [sys.executable]
    if launcher == "torchrun":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = REPOSITORY / "launch" / "stage.py"
    command = [*start, str(script), "--run-folder", str(long), "--modality", "audio"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(losses(long)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    if launcher == "python":
        assert process.returncode == Interrupted.exit_code
    assert process.returncode != 0
    done = len(losses(long))
    assert f"stopped at step {done} of 60, saved" in errors
    assert [path.name for path in (long / CHECKPOINTS).iterdir()] == [f"step-{done:06d}"]
    _finish(long)


def test_a_checkpoint_of_other_settings_is_refused(fresh: Path) -> None:
    _kill(fresh, "train.step:4")
    _edit(fresh, b"lr_connector: 0.003", b"lr_connector: 0.004")
    (refused,) = _run(fresh)
    assert refused.exit_code == InputError.exit_code
    assert "step-000002 was made with other data, settings or weights" in refused.log
    _edit(fresh, b"lr_connector: 0.004", b"lr_connector: 0.003")
    _finish(fresh)


def test_a_damaged_checkpoint_is_refused(fresh: Path) -> None:
    _kill(fresh, "train.step:6")
    path = fresh / CHECKPOINTS / "step-000004" / "moments.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (refused,) = _run(fresh)
    assert refused.exit_code == DataError.exit_code
    assert f"error: {path} was changed or damaged" in refused.log
    shutil.rmtree(path.parent)
    assert "step-000002" in _finish(fresh)


@pytest.mark.slow
def test_loader_processes_change_nothing(
    fresh: Path, undisturbed: Callable[..., tuple[Contents, list[float]]]
) -> None:
    _kill(fresh, "train.step:4", "execution.workers=2")
    _finish(fresh, "execution.workers=2")
    assert _contents(fresh) == undisturbed()[0]
