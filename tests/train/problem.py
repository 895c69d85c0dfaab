"""One small training task, done by the engine on any number of ranks, and by a plain loop.

The plain loop is the reference: torch's AdamW, in one process and fp32, on the mean over the
supervised tokens of each global batch. It shares the model and the readers with the engine, but
neither DeepSpeed, nor the loop, nor the way in which a global batch is cut up.
"""

import dataclasses
import json
import logging
import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mera_ds.batch import Batch, Sample
from mera_ds.config import ExecutionConfig, PhaseConfig, RunConfig, load_config, resolve_path
from mera_ds.data.dataset import TRAIN, ModalityData, UnitReader
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World, ensure_launcher_variables, process_group
from mera_ds.features import FeatureStore
from mera_ds.identity import data_folders
from mera_ds.log import Metrics, logger, set_up_console
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders, build_model
from mera_ds.model.encoders import Encoder
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.trainable import set_trainable
from mera_ds.plan import LORA, connector_set
from mera_ds.train.engine import Engine
from mera_ds.train.loop import Phase, train_phase
from mera_ds.train.schedule import peak_rates

Array = npt.NDArray[np.float32]
Sets = Mapping[str, Mapping[str, nn.Parameter]]

RATE = 3e-3
SETTINGS = PhaseConfig(
    tasks=("caption", "qa"),
    batch_size=8,
    lr_connector=RATE,
    lr_backbone=RATE / 2,
    epochs=100,
    max_steps=6,
    warmup_ratio=0.0,
    schedule="constant",
)


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    run: Path
    modalities: tuple[str, ...] = ("image",)
    lora: bool = False
    dtype: str = "fp32"
    backbone: Mapping[str, Any] = field(default_factory=dict)
    """Other settings of the backbone."""
    settings: PhaseConfig = SETTINGS
    execution: ExecutionConfig = field(default_factory=lambda: ExecutionConfig(zero=1))
    units: int = 64
    """How many units of each modality there are."""
    poisoned: tuple[int, ...] = ()
    """Steps whose global batch has a sample with features that are not a number."""
    loss_scale: float | None = None
    """Where fp16's search for a loss scale begins; None: where the engine says."""

    def using(self, **execution: Any) -> "Task":
        """Return the same task with other execution settings."""
        return dataclasses.replace(self, execution=dataclasses.replace(self.execution, **execution))

    def training(self, **settings: Any) -> "Task":
        """Return the same task with other hyperparameters."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **settings))

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of the trainable sets."""
        return (*map(connector_set, self.modalities), *([LORA] if self.lora else []))


@dataclass(frozen=True)
class Trained:
    """What a training came to."""

    losses: list[float]
    start: dict[str, Array]
    """Parameters before the first step."""
    parameters: dict[str, Array]
    moments: dict[str, Array]
    """Adam's, as `<name>.exp_avg` and `<name>.exp_avg_sq`."""
    log: list[str] = field(default_factory=list)
    """The messages of rank 0."""

    @property
    def skipped(self) -> list[int]:
        """The steps, from 0, that the log calls skipped."""
        found = [re.match(r"step (\d+): .*skipped", line) for line in self.log]
        return [int(match[1]) for match in found if match is not None]


class _Messages(logging.Handler):
    """Keeps the messages of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.lines.append(record.getMessage())


class PoisonedLoader(StepLoader):
    """Gives not-a-number for the features of one sample, on the last rank, at some steps."""

    poisoned: tuple[int, ...] = ()

    def __getitem__(self, step: int) -> list[Batch]:
        """Return the micro-batches of this rank, poisoned or not."""
        batches = super().__getitem__(step)
        if step not in self.poisoned or self._settings.rank != self._settings.world - 1:
            return batches
        first, *others = batches[0].samples
        bad = dataclasses.replace(first, media=torch.full_like(first.media, math.nan))
        return [Batch((bad, *others), batches[0].counted), *batches[1:]]


def build_loader(task: Task, world: World) -> StepLoader:
    """Return the loader that a training step would build, on the first units only."""
    settings = LoaderSettings(
        batch_size=task.settings.batch_size,
        epochs=task.settings.epochs,
        max_steps=task.settings.max_steps,
        seed=0,
        rank=world.rank,
        world=world.size,
        micro_batch=task.execution.micro_batch_size,
        workers=task.execution.workers,
    )
    loader = PoisonedLoader(build_mixture(task, world), settings)
    loader.poisoned = task.poisoned
    return loader


def build_mixture(task: Task, world: World) -> dict[str, MixturePart]:
    """Return the first units of each modality."""
    config = _config(task)
    encoders = build_encoders(config, task.run, task.modalities)
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, task.run))
    return {
        modality: _part(task, config, modality, encoders[modality], tokenizer, world)
        for modality in task.modalities
    }


def _part(
    task: Task, config: RunConfig, modality: str, encoder: Encoder, tokenizer: Any, world: World
) -> MixturePart:
    data = ModalityData(modality, data_folders(config, task.run, modality), TRAIN)
    store = FeatureStore(data, encoder)
    store.compute_missing(world)
    prompts = PromptBuilder(config.prompt, tokenizer)
    reader = UnitReader(data, config.modalities[modality], prompts, store.load, encoded=True)
    units = data.units(task.settings.tasks)[: task.units]
    return MixturePart(reader, units, list(map(data.length, units)), list(map(data.unit_id, units)))


def build_trainee(task: Task) -> tuple[MultimodalLM, Sets]:
    """Return a fresh model in training mode and its trainable sets."""
    config = _config(task)
    encoders = build_encoders(config, task.run, task.modalities)
    lora_for = task.modalities[0] if task.lora else None
    model = build_model(config, task.run, None, task.modalities, encoders, lora_for)
    model.train()
    return model, set_trainable(model, task.sets)


def _config(task: Task) -> RunConfig:
    config = load_config(task.run)
    changes = {"dtype": task.dtype, **task.backbone}
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, **changes))


def prepare() -> World:
    """Set up a rank, as the commands do."""
    torch.set_num_threads(1)
    world = ensure_launcher_variables()
    set_up_console(world.rank)
    return world


def train_all(tasks: Mapping[str, Task], folder: Path) -> dict[str, Trained | str]:
    """Train some tasks one after another on these ranks; an error gives its text instead."""
    world = prepare()
    results: dict[str, Trained | str] = {}
    with process_group(world, timeout_seconds=60):
        for name, task in tasks.items():
            try:
                results[name] = train(task, world, folder / name)
            except Exception:  # noqa: BLE001 - one broken task must not hide the others
                results[name] = traceback.format_exc()
    return results


def train(task: Task, world: World, folder: Path) -> Trained:
    """Train a task through the engine and the loop, with its checkpoints in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    loader = build_loader(task, world)
    with trainee(task, world) as (engine, start):
        rates = peak_rates(task.settings, task.sets, {})
        phase = Phase("test", task.settings, rates, folder, "key", seed=0)
        messages = _Messages()
        logger.addHandler(messages)
        try:
            with Metrics(folder, world.is_main) as metrics:
                train_phase(engine, loader, phase, task.execution, world, metrics)
        finally:
            logger.removeHandler(messages)
        return trained(engine, start, losses(folder), messages.lines)


@contextmanager
def trainee(task: Task, world: World) -> Iterator[tuple[Engine, dict[str, Array]]]:
    """Hold a fresh model under the engine; also give its trainable parameters from before."""
    if task.dtype == "fp16":
        allow_fp16()
    model, sets = build_trainee(task)
    start = {name: _array(parameter) for name, parameter in _named(sets).items()}
    engine = Engine(model, sets, task.settings, task.execution, task.dtype, world)
    if task.loss_scale is not None:
        engine._engine.optimizer.loss_scaler.cur_scale = task.loss_scale
    try:
        yield engine, start
    finally:
        engine.close()


def trained(
    engine: Engine, start: dict[str, Array], losses: list[float], log: Sequence[str] = ()
) -> Trained:
    """Return where an engine stands; every rank must call it."""
    state = engine.state()
    return Trained(
        losses,
        start,
        {name: _array(tensor) for name, tensor in state.parameters.items()},
        {name: _array(tensor) for name, tensor in state.moments.items()},
        list(log),
    )


def allow_fp16() -> None:
    """Let DeepSpeed compute in fp16 where the CPU has no instructions for it but torch does."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def losses(folder: Path, phase: str | None = None) -> list[float]:
    """Return the loss of each step of a phase from the metrics; of a step done twice, the last."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    found = {row["step"]: row["loss"] for row in rows if phase in (None, row["name"])}
    return [found[step] for step in sorted(found)]


def train_plainly(
    task: Task, skip: Sequence[int] = (), factors: Sequence[float] | None = None
) -> Trained:
    """Train a task with torch alone, in this process.

    Args:
        task: its `execution`, `dtype` and `schedule` are not used.
        skip: steps whose update is left out.
        factors: factor of the learning rates at each step; None: constant.
    """
    task = dataclasses.replace(task, dtype="fp32", poisoned=())
    torch.set_num_threads(1)
    loader = build_loader(task, World(rank=0, size=1, local_rank=0))
    model, sets = build_trainee(task)
    steps = (list(_by_modality(loader, step, task)) for step in range(loader.total_steps))
    return plain_loop(model, sets, steps, task.settings, skip, factors)


def _by_modality(loader: StepLoader, step: int, task: Task) -> Iterator[Batch]:
    """The global batch of a step, without cutting it into micro-batches."""
    samples = [sample for batch in loader[step] for sample in batch.samples]
    assert sorted(sample.id for sample in samples) == sorted(loader.sample_ids(step))
    for modality in task.modalities:
        chosen = [sample for sample in samples if sample.modality == modality]
        if chosen:
            yield whole(chosen)


def whole(samples: Sequence[Sample]) -> Batch:
    """Return a batch of which every sample counts."""
    return Batch(tuple(samples), (True,) * len(samples))


def plain_loop(
    model: MultimodalLM,
    sets: Sets,
    steps: Iterator[Sequence[Batch]],
    settings: PhaseConfig,
    skip: Sequence[int] = (),
    factors: Sequence[float] | None = None,
) -> Trained:
    """Train on global batches with torch's AdamW."""
    named = _named(sets)
    start = {name: _array(parameter) for name, parameter in named.items()}
    groups: list[dict[str, Any]] = [
        {
            "params": list(entry.values()),
            "peak": settings.lr_backbone if name == LORA else settings.lr_connector,
        }
        for name, entry in sets.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    groups = optimizer.param_groups
    found = []
    for step, batches in enumerate(steps):
        tokens = sum(batch.supervised_tokens for batch in batches)
        loss = sum((model(batch) for batch in batches), torch.zeros(())) / tokens
        optimizer.zero_grad()
        loss.backward()
        if settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(list(named.values()), settings.max_grad_norm)
        for group in groups:
            group["lr"] = group["peak"] * (factors[step] if factors is not None else 1.0)
        if step not in skip:
            optimizer.step()
        found.append(float(loss.detach()))
    moments = {
        f"{name}.{key}": _array(optimizer.state[parameter][key])
        for name, parameter in named.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return Trained(found, start, {name: _array(entry) for name, entry in named.items()}, moments)


def _named(sets: Sets) -> dict[str, nn.Parameter]:
    return {
        f"{group}/{name}": parameter
        for group, entry in sets.items()
        for name, parameter in entry.items()
    }


def _array(tensor: Tensor) -> Array:
    return tensor.detach().float().cpu().numpy().copy()


def meaningful(name: str) -> bool:
    """Return whether a parameter has a gradient; Adam makes full steps from rounding errors alone.

    A softmax doesn't change when its logits shift, so biases of attention keys have none. And the
    sounds of the tiny data are one token long: a softmax over one token has no gradient at all.
    """
    return re.search(r"attention\.key\.bias|crossattention\.attention\.(query|key)", name) is None


def worst_moment(found: Trained, expected: Trained) -> float:
    """Return the largest error of a moment tensor, relative to its largest entry."""
    assert found.moments.keys() == expected.moments.keys()
    errors = {
        name: float(np.abs(found.moments[name] - tensor).max() / (np.abs(tensor).max() or 1.0))
        for name, tensor in expected.moments.items()
        if meaningful(name)
    }
    assert all(math.isfinite(error) for error in errors.values()), errors
    return max(errors.values())


def whole_change(found: Trained, expected: Trained) -> float:
    """Return the error of all parameters together (L2), relative to how far training moved them."""
    assert found.parameters.keys() == expected.parameters.keys()
    names = [name for name in expected.parameters if meaningful(name)]
    error = sum(np.square(found.parameters[n] - expected.parameters[n]).sum() for n in names)
    moved = sum(np.square(expected.parameters[n] - expected.start[n]).sum() for n in names)
    return math.sqrt(error / moved)


def worst_loss(found: Trained, expected: Trained) -> float:
    """Return the largest relative error of a step's loss."""
    pairs = zip(found.losses, expected.losses, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)
