"""The steps that all methods share: learn one modality the standard way, and evaluate."""

from collections.abc import Sequence

from mera_ds.config import RunConfig
from mera_ds.plan import (
    BACKBONE,
    LORA,
    DataPart,
    EvaluateStep,
    TrainStep,
    connector_set,
    stage_folder,
)


def step_name(stage: int, modality: str, what: str) -> str:
    """Return e.g. `03-audio/tune`."""
    return f"{stage:02d}-{modality}/{what}"


def learn(
    config: RunConfig, stage: int, modality: str, start: str | None, tune_output: str
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
    """
    folder = stage_folder(stage, modality)
    data = (DataPart(modality=modality),)
    connector = connector_set(modality)
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
        trainable=(connector, BACKBONE if config.tuning == "full" else LORA),
        data=data,
        output=tune_output,
    )
    return align, tune


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
