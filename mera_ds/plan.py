"""A run's plan: the list of steps that a method writes and the launcher carries out, as data.

Imports no torch: a plan can be made, printed and checked anywhere. Every step that makes a model
has an `output` folder, relative to the run, and starts from another step's output (or from the
bare backbone). `mera_ds.methods` writes plans.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mera_ds.errors import InputError
from mera_ds.files import read_json, write_json
from mera_ds.mergeconfig import CMA
from mera_ds.settings import parse

LORA = "lora"
"""Trainable set: the LoRA factors on the backbone."""

BACKBONE = "backbone"
"""Trainable set: all weights of the backbone (full fine-tuning)."""

Phase = Literal["align", "tune", "realign"]
Adapter = Literal["new", "carried", "woven"]
"""What of the backbone trains: fresh LoRA factors on the folded lineage (`new`); the newest ones
of the lineage, further (`carried`); or fresh ones beside all older ones, gated (`woven`)."""


def connector_set(modality: str) -> str:
    """Return the name of the trainable set "connector of this modality"."""
    return f"connector:{modality}"


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """A share of one modality's training data."""

    modality: str
    percent: float = 100.0
    """100: everything; less: the replay sample of that size (see `mera_ds.data.replay`)."""


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Hold the carried factors where they were:  strength/2 · Σ importance · (θ − θ_start)²."""

    source: str
    """Output of the step that measured the importance."""
    strength: float


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Train some parameter sets on some data, starting from an earlier product."""

    kind: Literal["train"] = "train"
    name: str
    stage: int
    modality: str
    phase: Phase
    start: str | None
    """Output of the step to start from; None: the bare backbone."""
    trainable: tuple[str, ...]
    data: tuple[DataPart, ...]
    output: str
    adapter: Adapter = "new"
    """Of a step that trains the backbone."""
    penalty: Penalty | None = None


@dataclass(frozen=True, kw_only=True)
class FisherStep:
    """Measure how the last stage's loss depends on each LoRA factor: its mean squared gradient."""

    kind: Literal["fisher"] = "fisher"
    name: str
    stage: int
    modality: str
    start: str
    """Output of the last stage."""
    data: tuple[DataPart, ...]
    previous: str | None
    """Output of the step that measured the stages before that; what it found is added."""
    decay: float
    """Factor of what is added."""
    output: str


@dataclass(frozen=True, kw_only=True)
class MergeStep:
    """Merge a tuned backbone with the one of the previous stage (paper, equation of CMA*)."""

    kind: Literal["merge"] = "merge"
    name: str
    stage: int
    modality: str
    start: str
    """Output of the tune step, whose newest delta is scaled."""
    coefficient: str
    """Weight of the newest delta, as an exact fraction, e.g. `1/3`; empty: the method says it."""
    output: str
    method: str = CMA
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the method (see `mera_ds.merge.methods`)."""
    importance: tuple[str, ...] = ()
    """Outputs of the steps that measured the Fisher information of stages, if the method uses
    that: of this stage and, at the second, of the first as well, which has no merge."""


@dataclass(frozen=True, kw_only=True)
class EvaluateStep:
    """Generate and score on the test sets of some modalities."""

    kind: Literal["evaluate"] = "evaluate"
    name: str
    stage: int
    modality: str
    start: str
    modalities: tuple[str, ...]
    output: str


Step = TrainStep | FisherStep | MergeStep | EvaluateStep
_KINDS: Mapping[str, type[Step]] = {
    "train": TrainStep,
    "fisher": FisherStep,
    "merge": MergeStep,
    "evaluate": EvaluateStep,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a run, in the order in which they are carried out."""

    method: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        """Check that each step starts from the output of an earlier one and that names differ."""
        made: set[str] = set()
        names: set[str] = set()
        for step in self.steps:
            if step.name in names or step.output in made:
                raise InputError(f"plan: two steps are called {step.name} or write {step.output}")
            for source in step_inputs(step):
                if source not in made:
                    raise InputError(f"plan: {step.name} starts from {source}, made by no step")
            names.add(step.name)
            made.add(step.output)

    def producer(self, output: str) -> Step:
        """Return the step that writes `output`."""
        return next(step for step in self.steps if step.output == output)

    def of_stage(self, modality: str) -> tuple[Step, ...]:
        """Return the steps of the stage that learns `modality`."""
        return tuple(step for step in self.steps if step.modality == modality)

    def final_model(self, modality: str) -> str:
        """Return the output that stands for the finished stage of `modality`."""
        steps = self.of_stage(modality)
        return [step.output for step in steps if isinstance(step, TrainStep | MergeStep)][-1]


def step_inputs(step: Step) -> list[str]:
    """Return the outputs of other steps that a step needs."""
    inputs = [step.start]
    if isinstance(step, TrainStep) and step.penalty is not None:
        inputs.append(step.penalty.source)
    if isinstance(step, FisherStep):
        inputs.append(step.previous)
    if isinstance(step, MergeStep):
        inputs += step.importance
    return [name for name in inputs if name is not None]


def stage_folder(stage: int, modality: str) -> str:
    """Return the folder of a stage, relative to the run, e.g. `stages/03-audio`."""
    return f"stages/{stage:02d}-{modality}"


def save_plan(plan: Plan, path: Path) -> None:
    """Write `plan.json`."""
    steps = [_step_facts(step) for step in plan.steps]
    write_json(path, {"schema": 1, "method": plan.method, "steps": steps})


def _step_facts(step: Step) -> dict[str, Any]:
    """Return a step as data, without what the earliest plans did not say either."""
    facts = dataclasses.asdict(step)
    unsaid: list[str] = []
    if isinstance(step, MergeStep):
        unsaid += ["method", "options"] if step.method == CMA else []
        unsaid += ["importance"] if not step.importance else []
    if isinstance(step, TrainStep):
        unsaid += ["adapter"] if step.adapter == "new" else []
        unsaid += ["penalty"] if step.penalty is None else []
    return {name: value for name, value in facts.items() if name not in unsaid}


def load_plan(path: Path) -> Plan:
    """Read `plan.json` strictly.

    Raises:
        InputError: on an unknown or missing key, naming it.
    """
    file = parse(_PlanFile, read_json(path), str(path))
    return Plan(method=file.method, steps=_parse_steps(file.steps, str(path)))


@dataclass(frozen=True, kw_only=True)
class _PlanFile:
    """What `plan.json` holds."""

    schema: Literal[1]
    method: str
    steps: tuple[Mapping[str, Any], ...]


def _parse_steps(values: Sequence[Mapping[str, Any]], where: str) -> tuple[Step, ...]:
    steps = []
    for position, value in enumerate(values):
        kind = str(value.get("kind"))
        if kind not in _KINDS:
            raise InputError(f"{where}: step {position} is of unknown kind {kind!r}")
        steps.append(parse(_KINDS[kind], value, f"{where}: step {position}"))
    return tuple(steps)
