"""Estimates of a plan's steps."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mera_ds.config import ExecutionConfig, RunConfig, resolve_path
from mera_ds.data.replay import replay_count
from mera_ds.errors import MeraError
from mera_ds.estimate.device import UTILISATION, Speed
from mera_ds.estimate.memory import SIZE, Training, inference_memory, total, training_memory
from mera_ds.estimate.parts import Part, connector_part, encoder_part
from mera_ds.estimate.shape import read_shape
from mera_ds.estimate.work import (
    Texts,
    forward_flops,
    judge_dollars,
    text_tokens,
    texts_of,
    training_flops,
)
from mera_ds.plan import (
    BACKBONE,
    LORA,
    DataPart,
    EvaluateStep,
    FisherStep,
    MergeStep,
    Step,
    TrainStep,
)

ANSWER_TOKENS = 14
"""Assumed length of what is generated."""
MERGE_SECONDS = 5.0
"""A merge of deltas, which writes coefficients or small files only."""
DISK_SPEED = 1e9
"""Assumed bytes per second at which weights are read, written or hashed."""
STATE_BYTES = 12
"""Of a checkpoint, per trained parameter: its fp32 value and Adam's moments."""
LEAST_STEPS = 5
"""From so many steps on, the time that a step takes is measured rather than estimated."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a step takes."""

    samples: int = 0
    steps: int = 0
    """Optimizer steps."""
    memory: float = 0.0
    """Peak of one rank, in bytes: allocated on a GPU, resident on a CPU."""
    seconds: float = 0.0
    measured: bool = False
    """Whether `seconds` comes from steps that were done."""
    disk: float = 0.0
    """Bytes that stay."""
    disk_meanwhile: float = 0.0
    """Bytes of checkpoints that are there while it runs."""
    judge_calls: int = 0
    dollars: float | None = None
    from_paper: bool = False
    """Whether data is missing and the paper's sizes were taken."""


@dataclass(frozen=True)
class _Passes:
    """What it takes to go once through some data."""

    samples: int
    flops: float
    longest: int
    """Longest row in tokens."""
    features: float
    """Bytes of the media's features."""
    from_paper: bool


class Estimator:
    """Estimates for one run on one device."""

    def __init__(self, config: RunConfig, run: Path, speed: Speed) -> None:
        """Read the backbone's size.

        Raises:
            InputError: if it is not known.
        """
        self._config = config
        self._run = run
        self._speed = speed
        self._shape = read_shape(resolve_path(config.backbone.path, run))
        self._encoder = cache(self._find_encoder)
        self._connector = cache(self._find_connector)

    def estimate(self, step: Step) -> Estimate:
        """Return what a step takes.

        Raises:
            InputError: if what it depends on is missing.
            DataError: if it is damaged.
        """
        if isinstance(step, MergeStep):
            return self._merge()
        if isinstance(step, EvaluateStep):
            return self._evaluation(step)
        if isinstance(step, FisherStep):
            return self._fisher(step)
        return self._training(step)

    def _find_encoder(self, modality: str) -> Part:
        return encoder_part(self._config.modalities[modality], self._run)

    def _find_connector(self, modality: str) -> tuple[int, int]:
        settings = self._config.modalities[modality]
        return connector_part(settings, self._encoder(modality), self._shape.width)

    def _encoder_bytes(self, modality: str) -> float:
        options = self._config.modalities[modality].encoder.options
        return self._encoder(modality).parameters * SIZE[str(options.get("dtype", "fp32"))]

    def _texts(self, part: DataPart, tasks: Sequence[str]) -> list[Texts]:
        return texts_of(self._config, self._run, part.modality, "train", tasks)

    def _row(self, modality: str, texts: Texts) -> tuple[float, float]:
        """Return the mean and the greatest length of a row in tokens."""
        prompt, settings = self._config.prompt, self._config.modalities[modality]
        media = self._connector(modality)[1]
        lengths = [
            media + text_tokens(prompt, settings.caption_prompt, texts.task, chars)
            for chars in (texts.chars, texts.longest)
        ]
        return lengths[0], min(lengths[1], prompt.max_length)

    def _backbone_bytes(self) -> float:
        return self._shape.parameters * float(SIZE[self._config.backbone.dtype])

    def _merge(self) -> Estimate:
        """Return what it takes to scale a delta, or to average two whole backbones."""
        if self._config.tuning == "lora":
            return Estimate(seconds=MERGE_SECONDS)
        # Both are read and the average is written, and all three are hashed.
        weights = self._backbone_bytes()
        return Estimate(seconds=MERGE_SECONDS + 6 * weights / DISK_SPEED, disk=weights)

    def _passes(
        self, data: Sequence[DataPart], phase: str, rank: int, full: bool = False
    ) -> _Passes:
        """Return what it takes to go forward and back once through some data."""
        settings, execution = self._config.phase(phase), self._config.execution
        # Selective recomputation does no product again.
        recompute = self._config.backbone.gradient_checkpointing not in ("none", "selective", 0)
        samples, flops, longest, features, from_paper = 0, 0.0, 0.0, 0.0, False
        for part in data:
            encoder = self._encoder(part.modality)
            for texts in self._texts(part, settings.tasks):
                count = replay_count(texts.count, part.percent)
                mean, most = self._row(part.modality, texts)
                labels = mean - self._connector(part.modality)[1]
                flops += count * training_flops(self._shape, mean, labels, rank, recompute, full)
                flops += count * encoder.flops * (execution.features == "online")
                features += texts.media * encoder.tokens * encoder.width * 4
                samples += count
                longest = max(longest, most)
                from_paper = from_paper or texts.from_paper
        return _Passes(samples, flops, math.ceil(longest), features, from_paper)

    def _rate(self) -> float:
        """Return the operations per second of all ranks."""
        execution = self._config.execution
        return self._speed.flops * UTILISATION[self._speed.device] * execution.processes

    def _training(self, step: TrainStep) -> Estimate:
        settings, execution = self._config.phase(step.phase), self._config.execution
        rank = self._config.lora.rank if LORA in step.trainable else 0
        full = BACKBONE in step.trainable
        passes = self._passes(step.data, step.phase, rank, full)
        steps = math.ceil(passes.samples / settings.batch_size) * settings.epochs
        steps = min(steps, settings.max_steps or steps)
        flops = passes.flops * steps * settings.batch_size / max(1, passes.samples)
        added = sum(self._connector(part.modality)[0] for part in step.data)
        added += self._shape.lora(rank)
        state = STATE_BYTES * float(added + (self._shape.parameters if full else 0))
        saves = max(0, steps - 1) // execution.save_every
        per_step = seconds_per_step(self._run, step.name)
        seconds = flops / self._rate() if per_step is None else steps * per_step
        if full:  # the others are saved while the training goes on
            seconds += (saves * state + self._backbone_bytes()) / DISK_SPEED
        cached = execution.features == "cached" and step.phase == "align"
        return Estimate(
            samples=passes.samples,
            steps=steps,
            memory=self._training_memory(step, rank, passes.longest),
            seconds=seconds,
            measured=per_step is not None,
            disk=4 * added
            + (self._backbone_bytes() if full else 0)
            + (passes.features if cached else 0),
            disk_meanwhile=state * _checkpoints(execution, steps, saves),
            from_paper=passes.from_paper,
        )

    def _fisher(self, step: FisherStep) -> Estimate:
        """Samples go through the model one by one; there is no optimizer."""
        rank = self._config.lora.rank
        passes = self._passes(step.data, "tune", rank)
        factors = 4.0 * self._shape.lora(rank)
        return Estimate(
            samples=passes.samples,
            memory=self._backbone_bytes() + 3 * factors,
            seconds=passes.flops / self._rate(),
            disk=factors,
            from_paper=passes.from_paper,
        )

    def _training_memory(self, step: TrainStep, rank: int, longest: int) -> float:
        backbone, execution = self._config.backbone, self._config.execution
        ranks = execution.processes
        settings = self._config.phase(step.phase)
        rows = min(execution.micro_batch_size, math.ceil(settings.batch_size / ranks))
        media = max(self._connector(part.modality)[1] for part in step.data)
        training = Training(
            shape=self._shape,
            dtype=backbone.dtype,
            lora_rank=rank,
            full=BACKBONE in step.trainable,
            dropout=self._config.lora.dropout,
            recompute=backbone.gradient_checkpointing,
            rows=rows,
            length=longest,
            labels=rows * max(1, longest - media) // 2,
            connectors=sum(self._connector(part.modality)[0] for part in step.data),
            encoders=sum(self._encoder_bytes(part.modality) for part in step.data),
            zero=execution.zero,
            ranks=ranks,
            moment_bytes=2.0 if settings.optimizer == "adamw8bit" else 8.0,
            penalty_bytes=0.0 if step.penalty is None else 2.0 * SIZE[backbone.dtype],
            embedding_on_device=backbone.embedding_device == "same",
        )
        return total(training_memory(training, self._speed.device))

    def _evaluation(self, step: EvaluateStep) -> Estimate:
        settings = self._config.evaluate
        weights = self._backbone_bytes()
        new = min(ANSWER_TOKENS, settings.max_new_tokens)
        items, calls, longest, seconds, dollars, from_paper = 0, 0, 0.0, 0.0, 0.0, False
        for modality in step.modalities:
            for texts in texts_of(self._config, self._run, modality, "test", ("caption", "qa")):
                count = texts.count if texts.task == "qa" else min(texts.media, texts.count)
                count = min(count, settings.limit or count)
                mean, most = self._row(modality, texts)
                prompts = count * mean * forward_flops(self._shape, mean)
                batches = math.ceil(count / settings.batch_size)
                rate = self._speed.flops * UTILISATION[self._speed.device]
                seconds += prompts / rate + batches * new * weights / self._speed.bandwidth
                seconds += count * self._encoder(modality).flops / rate
                longest = max(longest, most)
                items += count
                from_paper = from_paper or texts.from_paper
                if texts.task == "qa":
                    calls += count if settings.judge == "openai" else 0
                    dollars += judge_dollars(self._config, count, texts.chars) or 0.0
        memory = inference_memory(
            self._speed.device,
            self._shape,
            self._config.backbone.dtype,
            settings.batch_size,
            math.ceil(longest) + settings.max_new_tokens,
            sum(self._encoder_bytes(name) for name in step.modalities),
            sum(self._connector(name)[0] for name in step.modalities),
        )
        return Estimate(
            samples=items,
            memory=memory,
            seconds=seconds,
            judge_calls=calls,
            dollars=dollars if calls else None,
            from_paper=from_paper,
        )


def _checkpoints(execution: ExecutionConfig, steps: int, saves: int) -> int:
    """Return how many are there at once: a new one is written, or saved at a stop, beside those."""
    kept = min(execution.keep_checkpoints, saves)
    return kept + 1 + (max(0, steps - 1) // execution.keep_every if execution.keep_every else 0)


def seconds_per_step(run: Path, name: str) -> float | None:
    """Return what a step of a phase took, by the run's own figures; None if it did too few."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return None
    times = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            times += [float(row["time"])] if row["name"] == name else []
        except (ValueError, KeyError, TypeError):  # the last line of a killed run
            continue
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return statistics.median(gaps) if len(gaps) >= LEAST_STEPS else None


def try_estimate(estimator: Estimator, step: Step) -> Estimate | str:
    """Return a step's estimate, or why there is none."""
    try:
        return estimator.estimate(step)
    except MeraError as error:
        return str(error)
