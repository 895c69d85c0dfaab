"""What a training step computes and keeps, seen by a probe under the whole engine.

Tensors are counted, not measured: on a GPU the same ones are made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from probes import Operations

from mera_ds.distributed import World, process_group
from mera_ds.train.engine import Engine

from .problem import Task, build_loader, build_trainee, prepare
from .processes import run_ranks

FOUR = ("image", "video", "audio", "pointcloud")
PHASES: dict[str, Callable[[Path], Task]] = {
    "align": lambda run: Task(run),
    "tune": lambda run: Task(run, lora=True),
    "realign": lambda run: Task(run, FOUR).using(micro_batch_size=4),
}


@dataclass(frozen=True)
class Step:
    """What the probe saw in one training step."""

    vocabulary: int
    labels: int
    """Most label positions of a micro-batch."""
    vocabulary_rows: int
    """Most rows of a tensor as wide as the vocabulary."""
    positions: set[int]
    """Positions of each micro-batch, padding included."""
    trainable: dict[str, tuple[int, ...]]
    frozen: dict[str, tuple[int, ...]]
    """Shapes of parameters by their names in the model."""
    with_gradient: set[str]
    made_backward: set[tuple[int, ...]]
    """Shapes of all tensors of the backward passes."""
    adam_numbers: int
    """Elements of Adam's first moments."""


def _observe(tasks: dict[str, Task]) -> dict[str, Step]:
    world = prepare()
    with process_group(world, timeout_seconds=60):
        return {name: _step(task, world) for name, task in tasks.items()}


def _step(task: Task, world: World) -> Step:
    """Take one training step of a task under the probe."""
    model, sets = build_trainee(task)
    named = dict(model.named_parameters())
    trainable, frozen = (
        {name: tuple(entry.shape) for name, entry in named.items() if entry.requires_grad == wanted}
        for wanted in (True, False)
    )
    engine = Engine(model, sets, task.settings, task.execution, task.dtype, world)
    batches = build_loader(task, world)[0]
    tokens = sum(batch.supervised_tokens for batch in batches)
    positions: set[int] = set()
    model.llm.base_model.register_forward_hook(
        lambda module, given, found: positions.add(found.last_hidden_state[..., 0].numel())
    )
    with Operations(list(named.values())) as operations:
        for number, batch in enumerate(batches):
            engine.backward(batch, tokens, number == len(batches) - 1)
        with_gradient = {name for name, entry in named.items() if entry.grad is not None}
        engine.step(dict.fromkeys(sets, 1e-3))
    vocabulary = model.llm.config.vocab_size
    state = engine._optimizer.state
    step = Step(
        vocabulary=vocabulary,
        labels=max(batch.supervised_tokens for batch in batches),
        vocabulary_rows=operations.rows_of(vocabulary),
        positions=positions,
        trainable=trainable,
        frozen=frozen,
        with_gradient=with_gradient,
        made_backward=operations.backward_shapes,
        adam_numbers=sum(entry["exp_avg"].numel() for entry in state.values()),
    )
    engine.close()
    return step


@pytest.fixture(scope="module")
def steps(run: Path) -> dict[str, Step]:
    """Return a step of each phase."""
    tasks = {name: task(run) for name, task in PHASES.items()}
    return run_ranks(_observe, 1, tasks)[0]


@pytest.mark.parametrize("phase", PHASES)
class TestStep:
    def test_logits_exist_at_label_positions_only(self, phase: str, steps: dict[str, Step]) -> None:
        step = steps[phase]
        assert step.vocabulary not in {size for shape in step.frozen.values() for size in shape[1:]}
        assert step.vocabulary_rows == step.labels < min(step.positions) / 2

    def test_no_gradient_of_a_frozen_weight_is_formed(
        self, phase: str, steps: dict[str, Step]
    ) -> None:
        """Some frozen matrices have the shape of a trainable one; the others can be told apart."""
        step = steps[phase]
        assert step.with_gradient <= step.trainable.keys()
        assert all(name.startswith("llm.") for name in step.frozen)
        learned = {shape[::way] for shape in step.trainable.values() for way in (1, -1)}
        told_apart = {shape for shape in step.frozen.values() if len(shape) == 2} - learned
        assert len(told_apart) >= 3, "embedding, feed-forward up and down"
        assert not step.positions & {size for shape in told_apart for size in shape}
        assert not step.made_backward & {shape[::way] for shape in told_apart for way in (1, -1)}

    def test_the_optimizer_knows_the_trainable_numbers_only(
        self, phase: str, steps: dict[str, Step]
    ) -> None:
        step = steps[phase]
        numbers = sum(_count(shape) for shape in step.trainable.values())
        assert numbers <= step.adam_numbers < numbers + 100, "up to a padding"
        assert any(".lora_" in name for name in step.trainable) == (phase == "tune")

    def test_embedding_and_head_are_frozen(self, phase: str, steps: dict[str, Step]) -> None:
        wide = (steps[phase].vocabulary, 64)
        assert wide in steps[phase].frozen.values()
        assert wide not in steps[phase].trainable.values()


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
