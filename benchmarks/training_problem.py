"""What `benchmarks/training.py` trains: a random model, drawn features and texts, and our loop."""

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mera_ds.batch import Batch, Sample
from mera_ds.config import ExecutionConfig, LoraConfig, PhaseConfig, Recomputation
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.data.units import UnitList, UnitRef
from mera_ds.distributed import World, ensure_launcher_variables, process_group
from mera_ds.model.build import seed_everything
from mera_ds.model.connectors import build_connector
from mera_ds.model.lora import attach_lora
from mera_ds.model.mllm import Layout, MultimodalLM
from mera_ds.model.recompute import set_recomputation
from mera_ds.model.trainable import set_trainable
from mera_ds.plan import LORA, connector_set
from mera_ds.train.engine import Engine
from mera_ds.train.loop import Phase, train_phase
from mera_ds.train.state import Progress, save_checkpoint
from mera_ds.train.watch import Watch

MODALITY = "image"
RATE = 1e-3


@dataclass(frozen=True)
class Problem:
    """A model's proportions, and the lengths of its data."""

    vocabulary: int
    hidden: int = 512
    layers: int = 8
    feature_dim: int = 1024
    media_tokens: int = 576
    texts: int = 1
    """Texts of each medium."""
    shortest: int = 18
    longest: int = 78
    """Question tokens, between which lengths are even."""
    answer: int = 12
    batch: int = 4
    steps: int = 2
    """The first warms up and isn't counted."""
    units: int | None = None
    """Units of an epoch; None: as many as the steps need."""
    together: int = 1

    @property
    def heads(self) -> int:
        """Heads of 64, as far as there are that many."""
        return max(2, self.hidden // 64)


@dataclass
class Marks:
    """CPU and wall seconds at the beginning of each step, and at the end."""

    cpu: list[float]
    wall: list[float]

    def take(self) -> None:
        """Note now."""
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())

    def spent(self) -> tuple[float, float]:
        """Return CPU and wall seconds from the second step on."""
        return self.cpu[-1] - self.cpu[1], self.wall[-1] - self.wall[1]


def write_backbone(folder: Path, problem: Problem) -> None:
    """Write a random Llama in the proportions of Llama-3-8B, unless it is there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=problem.vocabulary,
        hidden_size=problem.hidden,
        intermediate_size=problem.hidden * 7 // 2,
        num_hidden_layers=problem.layers,
        num_attention_heads=problem.heads,
        num_key_value_heads=max(1, problem.heads // 4),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def load_llm(folder: Path, checkpointing: bool) -> Any:
    """Load the backbone, frozen."""
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm.requires_grad_(False)
    llm.config.use_cache = False
    if checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    return llm


def lora_config(problem: Problem) -> LoraConfig:
    """LoRA whose rank is to the width as 128 to 4096."""
    rank = max(2, problem.hidden // 32)
    return LoraConfig(rank=rank, alpha=float(rank))


def make_connector(problem: Problem) -> Any:
    """Return the fresh connector, equal at every call."""
    seed_everything("connector")
    return build_connector("mlp", {}, problem.feature_dim, problem.hidden)


@dataclass(frozen=True)
class Drawn:
    """Samples drawn from their numbers: text `n` belongs to medium `n // texts`."""

    problem: Problem

    def length(self, unit: int) -> int:
        """Question tokens of a unit."""
        problem = self.problem
        span = problem.longest - problem.shortest + 1
        return problem.shortest + int(np.random.default_rng(unit).integers(span))

    def read(self, unit: UnitRef) -> Sample:
        """Return a sample."""
        problem, number = self.problem, unit.medium
        draw = np.random.default_rng(number)
        medium = number // problem.texts
        length = self.length(number)
        ids = draw.integers(3, problem.vocabulary, length + problem.answer).tolist()
        generator = torch.Generator().manual_seed(medium)
        return Sample(
            id=f"drawn/{medium}#{number}",
            modality=MODALITY,
            prefix_ids=(1, 2),
            suffix_ids=tuple(ids[:length]),
            answer_ids=tuple(ids[length:]),
            media=torch.randn(problem.media_tokens, problem.feature_dim, generator=generator),
            encoded=True,
            medium=(0, medium),
        )


class MarkedLoader(StepLoader):
    """Notes when each step is asked for and given."""

    marks: Marks
    waited: float = 0.0
    most: int | None = None
    """Stop after so many steps."""

    def batches(self, start: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield the steps."""
        steps = super().batches(start)
        for number in range(self.most or self.total_steps):
            self.marks.take()
            before = time.perf_counter()
            try:
                found = next(steps)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before if number else 0.0
            yield found
        if self.most is not None:
            self.marks.take()
            raise Enough


class Enough(Exception):
    """The steps that were to be measured are done."""


def make_loader(problem: Problem, world: World, micro_batch: int | None = None) -> MarkedLoader:
    """Return the loader of a problem."""
    drawn: Any = Drawn(problem)
    count = problem.units or problem.batch * problem.steps
    numbers = np.arange(count, dtype=np.uint32)
    units = UnitList([numbers], np.zeros(count, np.uint16), numbers)
    short = count < 10**4
    lengths = np.array([drawn.length(unit) for unit in range(count)]) if short else np.ones(count)
    media = np.arange(count) // problem.texts
    part = MixturePart(drawn, units, lengths.astype(np.int64), _Names(count), media)
    settings = LoaderSettings(
        batch_size=problem.batch,
        epochs=1,
        max_steps=None,
        seed=0,
        rank=world.rank,
        world=world.size,
        micro_batch=micro_batch or problem.batch,
        workers=0,
        texts_together=problem.together,
    )
    loader = MarkedLoader({MODALITY: part}, settings)
    loader.marks = Marks([], [])
    return loader


class _Names(list[str]):
    def __init__(self, count: int) -> None:
        super().__init__(map(str, range(count)))


@dataclass(frozen=True)
class Ours:
    """How mera-ds trains a problem."""

    recomputation: Recomputation = False
    layout: Layout = field(default_factory=Layout)
    micro_batch: int = 16

    @property
    def execution(self) -> ExecutionConfig:
        """As the engine and the loop take it."""
        return ExecutionConfig(zero=1, save_every=10**6, micro_batch_size=self.micro_batch)


@contextmanager
def our_engine(folder: Path, problem: Problem, how: Ours, world: World) -> Iterator[Engine]:
    """Hold the model under the engine."""
    llm = load_llm(folder, checkpointing=False)
    set_recomputation(llm, how.recomputation)
    seed_everything("lora")
    attach_lora(llm, lora_config(problem))
    connectors = {MODALITY: make_connector(problem)}
    model = MultimodalLM(llm, connectors, {}, 10**6, how.layout).train()
    sets = set_trainable(model, (connector_set(MODALITY), LORA))
    engine = Engine(model, sets, phase_settings(problem), how.execution, "fp32", world)
    try:
        yield engine
    finally:
        engine.close()


def phase_settings(problem: Problem) -> PhaseConfig:
    """AdamW at a constant rate, without clipping."""
    return PhaseConfig(
        tasks=("caption",),
        batch_size=problem.batch,
        lr_connector=RATE,
        lr_backbone=RATE,
        warmup_ratio=0.0,
        schedule="constant",
    )


def phase_of(problem: Problem, work: Path) -> Phase:
    """Return the phase that our loop trains."""
    rates = {connector_set(MODALITY): RATE, LORA: RATE}
    return Phase("bench", phase_settings(problem), rates, work / "phase", "key", seed=0)


@dataclass(frozen=True)
class LossLog:
    """Keeps what the loop writes as metrics."""

    rows: list[dict[str, float]]

    def write(self, name: str, step: int, values: dict[str, float]) -> None:
        """Keep a row."""
        self.rows.append(values)


def train_ours(folder: Path, work: Path, problem: Problem, how: Ours) -> dict[str, Any]:
    """Train the problem with our loop; return seconds, losses and positions."""
    world = ensure_launcher_variables()
    log: Any = LossLog([])
    with process_group(world, 600), our_engine(folder, problem, how, world) as engine:
        loader = make_loader(problem, world, how.micro_batch)
        phase = phase_of(problem, work)
        with Watch(phase.folder, world, 600) as watch:
            train_phase(engine, loader, phase, how.execution, world, log, watch)
        loader.marks.take()
        cpu, wall = loader.marks.spent()
        before = time.perf_counter()
        save_checkpoint(work / "phase", "key", Progress(problem.steps, 0), engine.state(), keep=1)
        return {
            "saving": time.perf_counter() - before,
            "cpu": cpu,
            "wall": wall,
            "waited": loader.waited,
            "tokens": tokens(problem, loader),
            "losses": [row["loss"] for row in log.rows],
            "saved": float(np.mean([row["positions_saved"] for row in log.rows])),
        }


def first_step(folder: Path, work: Path, problem: Problem, start: int) -> dict[str, Any]:
    """Return the seconds from nothing but the model to the end of the first step.

    Args:
        folder: the backbone.
        work: where the checkpoint is, or none for `start` 0.
        problem: with the units of a whole epoch.
        start: steps that were done before.
    """
    world, log = ensure_launcher_variables(), cast(Any, LossLog([]))
    how = Ours()
    with process_group(world, 600), our_engine(folder, problem, how, world) as engine:
        phase = phase_of(problem, work)
        if start:
            save_checkpoint(phase.folder, "key", Progress(start, 0), engine.state(), keep=1)
        began, cpu = time.perf_counter(), time.process_time()
        loader = make_loader(problem, world)
        loader.most = 1
        with contextlib.suppress(Enough):
            with Watch(phase.folder, world, 600) as watch:
                train_phase(engine, loader, phase, how.execution, world, log, watch)
        return {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def tokens(problem: Problem, loader: StepLoader) -> int:
    """Return the number of real positions of the steps that are counted."""
    drawn = Drawn(problem)
    found = [
        drawn.length(int(name))
        for step in range(1, problem.steps)
        for name in loader.sample_ids(step)
    ]
    return sum(found) + len(found) * (2 + problem.media_tokens + problem.answer)


def smaller(problem: Problem) -> Problem:
    """Return a problem of the same kind that takes a second, for the test of the benchmark."""
    return replace(
        problem,
        vocabulary=min(512, problem.vocabulary),
        hidden=32,
        layers=2,
        feature_dim=16,
        media_tokens=max(2, problem.media_tokens // 36),
        longest=min(problem.longest, 30),
        answer=4,
    )
