"""Adam's moments in 8 bit: it trains, and its checkpoints continue to the bit or to a rounding."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mera_ds.config import load_profile
from mera_ds.distributed import World, process_group
from mera_ds.errors import InputError
from mera_ds.identity import product_key
from mera_ds.methods import make_plan
from mera_ds.plan import TrainStep
from mera_ds.train.eightbit import adamw_8bit, pack, unpack

from .problem import Task, Trained, build_loader, prepare, trained, trainee
from .processes import run_ranks

STEPS = 4


def test_without_bitsandbytes_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"adamw8bit needs bitsandbytes.*pip install bitsandbytes"):
        adamw_8bit([])


def test_only_another_optimizer_changes_the_key(make_tiny_run: Any, run: Path) -> None:
    """What was trained before there was a choice stays valid."""
    plain = load_profile("tiny")
    plan = make_plan(plain)
    step = next(entry for entry in plan.steps if isinstance(entry, TrainStep))
    align = dataclasses.replace(plain.align, optimizer="adamw8bit")
    keys = [
        product_key(config, run, plan, step)
        for config in (plain, dataclasses.replace(plain, align=align))
    ]
    assert keys[0] != keys[1]


def states(numbers: int) -> list[dict[str, Any]]:
    """Return the state of a tensor after some steps of bitsandbytes, and an empty one."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    found = []
    for steps in (3, 0):
        tensor = torch.nn.Parameter(torch.zeros(numbers))
        optimizer = bitsandbytes.optim.AdamW8bit([tensor], lr=1e-3)
        optimizer.init_state(optimizer.param_groups[0], tensor, 0, 0)
        for _ in range(steps):
            scale = 10 ** torch.randn(numbers, generator=generator)
            tensor.grad = torch.randn(numbers, generator=generator) * scale
            optimizer.step()
        found.append(optimizer.state[tensor])
    return found


@pytest.mark.parametrize("numbers", [100, 4096, 3 * 4096 + 77, 2**20 + 300])
def test_packing_is_the_inverse_to_the_bit(numbers: int) -> None:
    trained_state, empty = states(numbers)
    assert trained_state["state1"].dtype == (torch.uint8 if numbers >= 4096 else torch.float32)
    numbers_before = unpack(trained_state)
    assert all(bool(entry.any()) for entry in numbers_before.values())
    pack(empty, numbers_before)
    numbers_after = unpack(empty)
    for name, entry in numbers_before.items():
        assert torch.equal(numbers_after[name], entry), name
    assert all(bool((entry == 0).all()) for entry in unpack(states(numbers)[1]).values())


def test_packing_other_numbers_rounds_no_worse_than_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    _, empty = states(3 * 4096 + 77)
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(3 * 4096 + 77, generator=generator)
    pack(empty, {"exp_avg": first, "exp_avg_sq": first.square()})
    for name, number, numbers in (("exp_avg", 1, first), ("exp_avg_sq", 2, first.square())):
        table = empty[f"qmap{number}"]
        codes, how = functional.quantize_blockwise(numbers, code=table, blocksize=256)
        expected = functional.dequantize_blockwise(codes, how)
        error = (unpack(empty)[name] - numbers).abs()
        assert bool((error <= (expected - numbers).abs() * 1.00001).all())


def _train(task: Task, cuts: list[tuple[int, int]], folder: Path) -> list[Trained]:
    """Train straight, and once more with a new engine at a step, under another ZeRO stage."""
    world = prepare()
    with process_group(world, timeout_seconds=60):
        return [_straight(task, world), *(_cut(task, world, *cut) for cut in cuts)]


def _take(engine: Any, task: Task, world: World, steps: range) -> list[float]:
    loader = build_loader(task, world)
    losses = []
    for step in steps:
        (batch,) = loader[step]
        loss = engine.backward(batch, batch.supervised_tokens * world.size, last=True)
        engine.step(dict.fromkeys(task.sets, 3e-3))
        losses.append(float(loss))
    return losses


def _straight(task: Task, world: World) -> Trained:
    with trainee(task, world) as (engine, start):
        return trained(engine, start, _take(engine, task, world, range(STEPS)))


def _cut(task: Task, world: World, at: int, zero: int) -> Trained:
    with trainee(task, world) as (engine, _):
        losses = _take(engine, task, world, range(at))
        state = engine.state()
    later = task.using(zero=zero)
    with trainee(later, world) as (engine, start):
        engine.load_state(state)
        losses += _take(engine, later, world, range(at, STEPS))
        return trained(engine, start, losses)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_continues(ranks: int, run: Path, tmp_path: Path) -> None:
    """The same blocks go on to the bit; others are rounded once more."""
    pytest.importorskip("bitsandbytes")
    task = Task(run, lora=True).training(optimizer="adamw8bit")
    straight, same, other = run_ranks(_train, ranks, task, [(2, 1), (2, 3)], tmp_path)[0]
    assert same.losses == straight.losses
    for name, entry in straight.parameters.items():
        assert np.array_equal(same.parameters[name], entry), name
    assert other.losses == pytest.approx(straight.losses, rel=1e-3)
    exact = run_ranks(_train, ranks, Task(run, lora=True), [], tmp_path)[0][0]
    assert straight.losses != exact.losses
    assert straight.losses == pytest.approx(exact.losses, rel=2e-2)
    assert straight.losses[-1] < straight.losses[0]
