"""The steps that methods share, and the frame that a method's stages are put in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mera_ds.config import RunConfig
from mera_ds.errors import InputError
from mera_ds.plan import (
    BACKBONE,
    LORA,
    Adapter,
    DataPart,
    EvaluateStep,
    FisherStep,
    Penalty,
    Plan,
    Step,
    TrainStep,
    connector_set,
    stage_folder,
)

StageWriter = Callable[[RunConfig, int, str | None, str], list[Step]]
"""Writes a stage's training: (configuration, number of the stage from 1, output of the previous
stage or None, where the stage's model goes)."""


@dataclass(frozen=True)
class Method:
    """How a method learns a modality."""

    write_stage: StageWriter
    product: str
    """Folder, within a stage, of its model where realigning follows."""


def plan_stages(config: RunConfig, name: str, method: Method, realigned: bool) -> Plan:
    """Return the plan of a method that learns one modality after another.

    Args:
        config: the run's configuration.
        name: name of the method, with realigning or without.
        method: writes the stages.
        realigned: whether all stages but the first, where nothing is misaligned yet, end with
            training all connectors so far on the replay set (paper, sections 4.2 and 5.5).
    """
    steps: list[Step] = []
    previous = None
    for stage, modality in enumerate(config.order, start=1):
        folder = stage_folder(stage, modality)
        model = f"{folder}/model"
        if realigned and stage > 1:
            learned = f"{folder}/{method.product}"
            steps += method.write_stage(config, stage, previous, learned)
            steps.append(realign(config, stage, learned, model))
        else:
            steps += method.write_stage(config, stage, previous, model)
        steps.append(evaluate(stage, modality, model, config.order[:stage]))
        previous = model
    return Plan(method=name, steps=tuple(steps))


def step_name(stage: int, modality: str, what: str) -> str:
    """Return e.g. `03-audio/tune`."""
    return f"{stage:02d}-{modality}/{what}"


def learn(
    config: RunConfig,
    stage: int,
    modality: str,
    start: str | None,
    tune_output: str,
    *,
    replay: Sequence[DataPart] = (),
    adapter: Adapter = "new",
    penalty: Penalty | None = None,
) -> tuple[TrainStep, TrainStep]:
    """Align the new connector on captions, then tune it with the backbone on captions and QA.

    This is the standard training of an MLLM on one modality (paper, sections 4.1 and 5.1): from
    the previous stage's model, which gives θ_tuned.

    Args:
        config: says what is tuned of the backbone: LoRA on it, or all of it.
        stage: number of the stage, from 1.
        modality: what to learn.
        start: output of the previous stage; None: the bare backbone.
        tune_output: where the tuned model goes.
        replay: older data that is tuned on as well, together with its connectors.
        adapter: what of the backbone is tuned.
        penalty: what holds it.

    Raises:
        InputError: if the configuration tunes all weights and this can't be done here.
    """
    _require_trainable(config, adapter)
    folder = stage_folder(stage, modality)
    data = (DataPart(modality=modality),)
    connector = connector_set(modality)
    tuned = BACKBONE if config.tuning == "full" else LORA
    align = TrainStep(
        name=step_name(stage, modality, "align"),
        stage=stage,
        modality=modality,
        phase="align",
        start=start,
        trainable=(connector,),
        data=data,
        output=f"{folder}/aligned",
    )
    tune = TrainStep(
        name=step_name(stage, modality, "tune"),
        stage=stage,
        modality=modality,
        phase="tune",
        start=align.output,
        trainable=(*(connector_set(part.modality) for part in replay), connector, tuned),
        data=(*replay, *data),
        output=tune_output,
        adapter=adapter,
        penalty=penalty,
    )
    return align, tune


def _require_trainable(config: RunConfig, adapter: Adapter) -> None:
    """Refuse full fine-tuning of what can't be tuned in full."""
    if config.tuning == "lora":
        return
    if adapter != "new":
        raise InputError(
            f"method={config.method} is defined on LoRA's factors, and tuning=full has none; use "
            "tuning=lora"
        )
    if config.backbone.embedding_device != "same":
        raise InputError(
            f"backbone.embedding_device={config.backbone.embedding_device} keeps the input "
            "embedding out of training, and tuning=full trains it; use embedding_device=same"
        )


def fisher_folder(config: RunConfig, stage: int) -> str:
    """Return where the Fisher information that a stage measures goes."""
    return f"{stage_folder(stage, config.order[stage - 1])}/fisher"


def measure_fisher(
    config: RunConfig,
    stage: int,
    model: str,
    data: DataPart,
    *,
    previous: str | None = None,
    decay: float = 1.0,
) -> FisherStep:
    """Measure the Fisher information of a model on some data, and add what was measured before.

    Args:
        config: the run's configuration.
        stage: number of the stage that the step belongs to, from 1.
        model: the model's folder.
        data: what it is measured on.
        previous: an earlier measurement to add to; None: nothing.
        decay: factor of `previous`.
    """
    modality = config.order[stage - 1]
    return FisherStep(
        name=step_name(stage, modality, "fisher"),
        stage=stage,
        modality=modality,
        start=model,
        data=(data,),
        previous=previous,
        decay=decay,
        output=fisher_folder(config, stage),
    )


def realign(config: RunConfig, stage: int, start: str, output: str) -> TrainStep:
    """Train all connectors so far, alone, on r % of the data of all modalities so far."""
    modality, seen = config.order[stage - 1], config.order[:stage]
    return TrainStep(
        name=step_name(stage, modality, "realign"),
        stage=stage,
        modality=modality,
        phase="realign",
        start=start,
        trainable=tuple(connector_set(name) for name in seen),
        data=tuple(DataPart(modality=name, percent=config.replay.realigning) for name in seen),
        output=output,
    )


def evaluate(stage: int, modality: str, model: str, modalities: Sequence[str]) -> EvaluateStep:
    """Evaluate a stage's model on some modalities."""
    return EvaluateStep(
        name=step_name(stage, modality, "evaluate"),
        stage=stage,
        modality=modality,
        start=model,
        modalities=tuple(modalities),
        output=f"{stage_folder(stage, modality)}/evaluation",
    )
