"""Training under DeepSpeed, on one and two ranks, against the same training with torch alone.

Tolerances are a few times the worst errors that were measured. Adam's moments, which are sums of
gradients, are compared tensor by tensor. Parameters are compared all together, relative to how far
training moved them: Adam makes full steps from the smallest gradients, rounding errors included. A
wrong mean or a lost gradient gives errors near 1.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mera_ds.config import REPOSITORY, ExecutionConfig
from mera_ds.distributed import World, process_group
from mera_ds.errors import InputError
from mera_ds.files import read_json
from mera_ds.train.engine import Engine, engine_config

from .problem import (
    Task,
    Trained,
    build_loader,
    build_trainee,
    prepare,
    train_all,
    train_plainly,
    trainee,
    whole_change,
    worst_loss,
    worst_moment,
)
from .processes import run_ranks

LOSS, MOMENT, CHANGE = 1e-6, 1e-3, 2e-4
"""fp32; measured: 2e-7, 1.2e-4, 4.5e-5."""
HALF_LOSS = {"bf16": 5e-3, "fp16": 1e-3}
"""Measured: 1.2e-3 and 2e-4."""
HALF_CHANGE = {"bf16": 0.2, "fp16": 0.1}
"""Measured: 0.08 and 0.04."""

FOUR = ("image", "video", "audio", "pointcloud")
CLIP = 0.05
COSINE = (0.25, 0.5, 0.75, 1.0, 0.75, 0.25)
"""Factors of the learning rate: three steps of warm-up, then three of a cosine."""
Plain = Callable[[str], Trained]
Results = dict[str, Trained | str]

TASKS: dict[str, Callable[[Path], Task]] = {
    # One connector and LoRA, at different rates; one micro-batch a step.
    "tune": lambda run: Task(run, lora=True),
    # Four connectors, several micro-batches of one sample each; of some a rank has none of its own.
    "realign": lambda run: (
        Task(run, FOUR).training(batch_size=11, max_steps=3).using(micro_batch_size=1)
    ),
    # Nine units: the last batch of an epoch has one sample.
    "uneven": lambda run: Task(run, units=9).training(batch_size=4),
    "decay": lambda run: Task(run).training(weight_decay=0.1, max_steps=3),
    "cosine": lambda run: Task(run).training(warmup_ratio=0.34, schedule="cosine"),
    "clip": lambda run: Task(run, lora=True).training(max_grad_norm=CLIP, max_steps=3),
}


def _cases(run: Path, tasks: str, zeros: tuple[int, ...], dtype: str = "fp32") -> dict[str, Task]:
    return {
        f"{name}-zero{zero}-{dtype}": dataclasses.replace(TASKS[name](run), dtype=dtype).using(
            zero=zero
        )
        for name in tasks.split()
        for zero in zeros
    }


def _train(run: Path, folder: Path, ranks: int, cases: dict[str, Task]) -> Results:
    return run_ranks(train_all, ranks, cases, folder, timeout=300)[0]


def _result(results: Results, name: str) -> Trained:
    result = results[name]
    assert isinstance(result, Trained), result
    return result


@pytest.fixture(scope="module")
def plain(run: Path) -> Plain:
    """Return a function that gives the plain loop's result for a task."""

    def result(name: str) -> Trained:
        return train_plainly(TASKS[name](run), factors=COSINE if name == "cosine" else None)

    return functools.cache(result)


@pytest.fixture(scope="module")
def two_ranks(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return the quick cases on two ranks."""
    cases = (
        _cases(run, "tune", (0, 1, 2, 3))
        | _cases(run, "realign", (2, 3))
        | _cases(run, "uneven", (1, 3))
        | _cases(run, "clip", (0, 2))
    )
    return _train(run, tmp_path_factory.mktemp("two"), 2, cases)


def _assert_exact(found: Trained, expected: Trained) -> None:
    assert worst_loss(found, expected) < LOSS
    assert worst_moment(found, expected) < MOMENT
    assert whole_change(found, expected) < CHANGE
    assert not found.skipped


@pytest.mark.parametrize(
    "case",
    [
        *(f"tune-zero{zero}" for zero in range(4)),
        "realign-zero2",
        "realign-zero3",
        "uneven-zero1",
        "uneven-zero3",
        "clip-zero0",
        "clip-zero2",
    ],
)
def test_two_ranks_train_as_plain_torch(case: str, two_ranks: Results, plain: Plain) -> None:
    _assert_exact(_result(two_ranks, f"{case}-fp32"), plain(case.partition("-")[0]))


def test_training_moves_every_tensor(plain: Plain) -> None:
    """The comparison would be empty otherwise."""
    for name in ("tune", "realign"):
        reference = plain(name)
        still = [
            key
            for key, tensor in reference.parameters.items()
            if np.array_equal(tensor, reference.start[key])
        ]
        assert not still


def test_zero_0_to_2_are_equal_to_the_bit(two_ranks: Results) -> None:
    expected = _result(two_ranks, "tune-zero0-fp32")
    for zero in (1, 2):
        found = _result(two_ranks, f"tune-zero{zero}-fp32")
        assert found.losses == expected.losses
        for name, tensor in expected.parameters.items():
            assert np.array_equal(found.parameters[name], tensor), name


def test_the_tasks_are_uneven(run: Path) -> None:
    """Ranks differ in supervised tokens, and in the last batch one has nothing that counts."""
    ranks = [
        build_loader(TASKS["uneven"](run), World(rank=rank, size=2, local_rank=rank))
        for rank in range(2)
    ]
    steps = [[loader[step] for step in range(3)] for loader in ranks]
    tokens = [[sum(b.supervised_tokens for b in batches) for batches in own] for own in steps]
    assert tokens[0][1] != tokens[1][1] > 0
    assert (len(steps[0][2][0].samples), tokens[1][2]) == (1, 0)
    realign = build_loader(TASKS["realign"](run), World(rank=1, size=2, local_rank=1))
    assert len(realign[0]) > 4, "several micro-batches of one modality"
    assert any(False in batch.counted for batch in realign[0])


def _gradient_norm(trained: Trained) -> float:
    """The root mean square over the steps of the gradient's norm, from Adam's second moments."""
    second = [value for name, value in trained.moments.items() if name.endswith(".exp_avg_sq")]
    return math.sqrt(sum(map(np.sum, second)) / (1 - 0.999 ** len(trained.losses)))


def test_gradients_are_not_clipped_unless_asked(two_ranks: Results, plain: Plain) -> None:
    free = _gradient_norm(plain("tune"))
    assert free > 2.0, "the gradients must be large enough to show DeepSpeed's own limit of 1"
    for zero in range(4):
        found = _gradient_norm(_result(two_ranks, f"tune-zero{zero}-fp32"))
        assert found == pytest.approx(free, rel=1e-4)
    for zero in (0, 2):
        found = _gradient_norm(_result(two_ranks, f"clip-zero{zero}-fp32"))
        assert found == pytest.approx(CLIP, rel=1e-3)


def test_clipping_is_always_written() -> None:
    for clip in (0.0, 2.5):
        assert engine_config(ExecutionConfig(zero=2), "fp32", clip)["gradient_clipping"] == clip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_task_and_stage_trains_as_plain_torch(
    ranks: int, run: Path, tmp_path: Path, plain: Plain
) -> None:
    cases = _cases(run, " ".join(TASKS), (0, 1, 2, 3))
    results = _train(run, tmp_path, ranks, cases)
    for name in cases:
        _assert_exact(_result(results, name), plain(name.partition("-")[0]))


@pytest.mark.slow
def test_other_engine_settings_train_the_same(run: Path, tmp_path: Path, plain: Plain) -> None:
    """Offloading; cutting all parameters, for which the tiny ones are too small by default; both;
    and computing activations again when parameters are cut."""
    offloads = {zero: REPOSITORY / "ds_configs" / f"zero{zero}-offload.json" for zero in (2, 3)}
    cut, both = tmp_path / "cut.json", tmp_path / "both.json"
    settings = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    cut.write_text(json.dumps({"zero_optimization": settings}))
    offload = read_json(offloads[3])
    offload["zero_optimization"] |= settings
    both.write_text(json.dumps(offload))
    cases = {
        f"{name}-{path.stem}": TASKS[name](run).using(zero=zero, ds_config=str(path))
        for name in ("tune", "realign")
        for zero, path in ((2, offloads[2]), (3, cut))
    }
    tune = cases["tune-cut"]
    for setting in ("all", "selective"):
        backbone = {"gradient_checkpointing": setting}
        cases[f"tune-{setting}"] = dataclasses.replace(tune, backbone=backbone)
    for path in (offloads[3], both):
        cases[f"tune-{path.stem}"] = tune.using(ds_config=str(path))
    results = _train(run, tmp_path, 2, cases)
    for name in cases:
        _assert_exact(_result(results, name), plain(name.partition("-")[0]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_close_to_plain_torch(
    dtype: str, ranks: int, run: Path, tmp_path: Path
) -> None:
    """fp16 may skip steps until its loss scale fits; the reference leaves out the same ones."""
    cases = _cases(run, "tune realign", (1, 2, 3), dtype)
    results = _train(run, tmp_path, ranks, cases)
    for name in cases:
        found = _result(results, name)
        assert len(found.skipped) <= (2 if dtype == "fp16" else 0)
        expected = train_plainly(TASKS[name.partition("-")[0]](run), found.skipped)
        assert worst_loss(found, expected) < HALF_LOSS[dtype]
        assert whole_change(found, expected) < HALF_CHANGE[dtype]


def _errors_of_masters(tasks: list[Task]) -> list[float]:
    """Return by how much the engine's fp32 weights differ from the model's at the start."""
    world = prepare()
    errors = []
    with process_group(world, timeout_seconds=60):
        for task in tasks:
            with trainee(task, world) as (engine, start):
                found = engine.parameters()
            errors.append(max(float(np.abs(found[k].numpy() - start[k]).max()) for k in start))
    return errors


def test_masters_start_from_the_unrounded_weights(run: Path) -> None:
    tasks = [
        Task(run, lora=True, dtype=dtype).using(zero=zero)
        for dtype, zero in (("fp32", 0), ("fp32", 3), ("bf16", 1), ("bf16", 3), ("fp16", 2))
    ]
    assert run_ranks(_errors_of_masters, 2, tasks)[0] == [0.0] * len(tasks)


def _refusals(tasks: list[Task]) -> list[str]:
    world = prepare()
    messages = []
    with process_group(world, timeout_seconds=60):
        for task in tasks:
            model, sets = build_trainee(task)
            try:
                Engine(model, sets, task.settings, task.execution, task.dtype, world)
            except InputError as error:
                messages.append(str(error))
    return messages


def test_what_deepspeed_would_do_wrong_is_refused(run: Path) -> None:
    tasks = [Task(run, dtype=dtype).using(zero=0) for dtype in ("bf16", "fp16")]
    for dtype, message in zip(("bf16", "fp16"), run_ranks(_refusals, 1, tasks)[0], strict=True):
        assert f"execution.zero=0 with backbone.dtype={dtype}" in message
        assert "execution.zero=1" in message


def test_fp16_without_the_hardware_is_refused(run: Path) -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this processor computes fp16")
    message = run_ranks(_refusals, 1, [Task(run, dtype="fp16")])[0][0]
    assert "backbone.dtype=fp16" in message
    assert "bf16 or fp32" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": 1.0}, "sets 'gradient_clipping'"),
        ({"zero_optimization": {"stage": 3}}, "is for ZeRO 3, but execution.zero is 2"),
        ({}, "is for ZeRO 0, but execution.zero is 2"),
    ],
)
def test_engine_settings_that_contradict_the_run_are_refused(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | settings if settings else {}))
    with pytest.raises(InputError, match=message):
        engine_config(ExecutionConfig(zero=2, ds_config=str(path)), "fp32", 0.0)
