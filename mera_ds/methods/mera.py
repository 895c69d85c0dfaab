"""MERA: merge, then realign (paper, section 4).

Stage i learns its modality from θ_{i−1}, merges the backbone with the previous one by a
cumulative moving average,

    θ_i = (i−1)/i · θ_{i−1} + 1/i · θ_tuned      (backbone only; connectors are kept),

and then trains all connectors so far, alone, on r % of the data of all modalities so far. With
θ_tuned = θ_{i−1} + Δ_i the average is θ_{i−1} + Δ_i / i: the newest delta gets the coefficient 1/i
and no older one changes. (`merge.method` chooses another rule.) In the first stage the average is
the identity and nothing is misaligned, so it ends with the tuned model.
"""

from mera_ds.config import RunConfig
from mera_ds.mergeconfig import CMA
from mera_ds.methods.steps import evaluate, learn, step_name
from mera_ds.plan import (
    DataPart,
    MergeStep,
    Plan,
    Step,
    TrainStep,
    connector_set,
    stage_folder,
)


def plan(config: RunConfig) -> Plan:
    """Return align, tune, merge, realign, evaluate for each modality."""
    steps: list[Step] = []
    previous = None
    for number, modality in enumerate(config.order, start=1):
        model = f"{stage_folder(number, modality)}/model"
        if number == 1:
            steps += learn(config, number, modality, previous, model)
        else:
            steps += _merge_and_realign(config, number, modality, previous, model)
        steps.append(evaluate(number, modality, model, config.order[:number]))
        previous = model
    return Plan(method="mera", steps=tuple(steps))


def _merge_and_realign(
    config: RunConfig, stage: int, modality: str, previous: str | None, model: str
) -> list[Step]:
    folder = stage_folder(stage, modality)
    learned = learn(config, stage, modality, previous, f"{folder}/tuned")
    merge = MergeStep(
        name=step_name(stage, modality, "merge"),
        stage=stage,
        modality=modality,
        start=learned[-1].output,
        coefficient=f"1/{stage}" if config.merge.method == CMA else "",
        output=f"{folder}/merged",
        method=config.merge.method,
        options=config.merge.options,
    )
    seen = config.order[:stage]
    realign = TrainStep(
        name=step_name(stage, modality, "realign"),
        stage=stage,
        modality=modality,
        phase="realign",
        start=merge.output,
        trainable=tuple(connector_set(name) for name in seen),
        data=tuple(DataPart(modality=name, percent=config.replay.percent) for name in seen),
        output=model,
    )
    return [*learned, merge, realign]
