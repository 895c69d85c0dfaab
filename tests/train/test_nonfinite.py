"""A sample that is not a number: its step is skipped, counted and named; weights never see it."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mera_ds.cli.launch import train_stage
from mera_ds.distributed import World
from mera_ds.errors import NumericError
from mera_ds.files import read_json

from .problem import (
    PoisonedLoader,
    Task,
    Trained,
    build_loader,
    train_all,
    train_plainly,
    whole_change,
    worst_moment,
)
from .processes import Ranks, run_ranks

POISONED = (1, 4)
HALF = [("bf16", zero) for zero in (1, 2, 3)] + [("fp16", zero) for zero in (1, 2, 3)]


def _task(run: Path, dtype: str = "fp32", zero: int = 1) -> Task:
    """Accumulate micro-batches of two samples; one of them, on the last rank, is poisoned."""
    task = Task(run, modalities=("image", "audio"), dtype=dtype, poisoned=POISONED)
    return task.using(zero=zero, micro_batch_size=2, save_every=2)


def _train(run: Path, folder: Path, cases: list[tuple[str, int]]) -> dict[str, Trained]:
    tasks = {f"{dtype}-{zero}": _task(run, dtype, zero) for dtype, zero in cases}
    results = run_ranks(train_all, 2, tasks, folder, timeout=300)[0]
    for result in results.values():
        assert isinstance(result, Trained), result
    return results


def _assert_named_and_counted(found: Trained, run: Path, checkpoints: Path) -> None:
    assert set(POISONED) <= set(found.skipped)
    assert all(np.isfinite(found.losses[step]) != (step in POISONED) for step in range(6))
    assert all(np.isfinite(tensor).all() for tensor in found.parameters.values())
    assert all(np.isfinite(tensor).all() for tensor in found.moments.values())
    loader = build_loader(_task(run), World(rank=0, size=1, local_rank=0))
    for step in POISONED:
        (line,) = (entry for entry in found.log if entry.startswith(f"step {step}: loss nan"))
        assert all(name in line for name in loader.sample_ids(step))
    assert read_json(checkpoints / "step-000004" / "state.json")["nonfinite_steps"] == 1


@pytest.mark.parametrize("zeros", [(1, 3), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_a_poisoned_step_is_left_out(zeros: tuple[int, int], run: Path, tmp_path: Path) -> None:
    """Everything else is trained as if the step had not been."""
    expected = train_plainly(_task(run), skip=POISONED)
    for name, found in _train(run, tmp_path, [("fp32", zero) for zero in zeros]).items():
        assert found.skipped == list(POISONED)
        _assert_named_and_counted(found, run, tmp_path / name)
        assert worst_moment(found, expected) < 1e-3
        assert whole_change(found, expected) < 2e-4


@pytest.mark.slow
def test_a_poisoned_step_is_left_out_in_half_precision(run: Path, tmp_path: Path) -> None:
    for name, found in _train(run, tmp_path, HALF).items():
        _assert_named_and_counted(found, run, tmp_path / name)
        expected = train_plainly(_task(run), skip=found.skipped)
        assert whole_change(found, expected) < 0.2


def _train_poisoned(run: Path, poisoned: tuple[int, ...], budget: int) -> None:
    """Run the command on data of which some steps are poisoned."""
    import mera_ds.train.stage

    def poisoned_loader(mixture: Any, settings: Any) -> PoisonedLoader:
        loader = PoisonedLoader(mixture, settings)
        loader.poisoned = poisoned
        return loader

    mera_ds.train.stage.StepLoader = poisoned_loader
    words = ["--run-folder", str(run), "--modality", "image"]
    sys.argv = ["stage.py", *words, f"execution.max_nonfinite_steps={budget}"]
    sys.exit(train_stage(("align",)))


def test_too_many_end_the_command(make_tiny_run: Any) -> None:
    run = make_tiny_run("align.max_steps=8", "align.batch_size=4", "execution.save_every=2")
    poisoned = (1, 3, 5)
    (ended,) = Ranks(_train_poisoned, 1, run, poisoned, 2).wait()
    assert ended.exit_code == NumericError.exit_code, ended.log
    message = "error: 3 steps were not finite, more than execution.max_nonfinite_steps=2"
    assert message in ended.log
    assert "the last one held image/image-" in ended.log
    checkpoints = run / "stages/01-image/align"
    state = read_json(checkpoints / "step-000004" / "state.json")
    assert state["nonfinite_steps"] == 2, "the count goes on after a restart"
    (again,) = Ranks(_train_poisoned, 1, run, poisoned, 2).wait()
    assert again.exit_code == NumericError.exit_code
    (ended,) = Ranks(_train_poisoned, 1, run, poisoned, 3).wait()
    assert ended.exit_code == 0, ended.log


def test_the_search_for_a_loss_scale_is_no_fault(run: Path, tmp_path: Path) -> None:
    """Otherwise each rise of the scale, every 1000 steps, would use up the budget."""
    task = Task(run, dtype="fp16", loss_scale=2.0**24).training(max_steps=14)
    task = task.using(max_nonfinite_steps=0, save_every=2)
    found = run_ranks(train_all, 1, {"search": task}, tmp_path)[0]["search"]
    assert isinstance(found, Trained), found
    assert 4 < len(found.skipped) < 12
    assert not any("not finite" in line for line in found.log)
    assert read_json(tmp_path / "search" / "step-000012" / "state.json")["nonfinite_steps"] == 0


def test_poison_at_the_lowest_loss_scale_is_counted(run: Path, tmp_path: Path) -> None:
    """DeepSpeed would end with an error of its own there."""
    task = Task(run, dtype="fp16", loss_scale=1.0, poisoned=(0, 1, 2, 3))
    found = run_ranks(train_all, 1, {"lowest": task}, tmp_path)[0]["lowest"]
    assert isinstance(found, Trained), found
    assert found.skipped == [0, 1, 2, 3]
    assert sum("not finite" in line for line in found.log) == 4
