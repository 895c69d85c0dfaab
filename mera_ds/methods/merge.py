"""Merging, the first half of MERA: merge, then realign (paper, section 4).

Stage i learns its modality from θ_{i−1} and merges the backbone with the previous one by a
cumulative moving average,

    θ_i = (i−1)/i · θ_{i−1} + 1/i · θ_tuned      (backbone only; connectors are kept).

With θ_tuned = θ_{i−1} + Δ_i the average is θ_{i−1} + Δ_i / i: the newest delta gets the coefficient
1/i and no older one changes. (`merge.method` chooses another rule; with `merge.fisher=data` every
stage's Fisher information is measured behind its tune.) In the first stage the average is the
identity, so it ends with the tuned model. MERA realigns after it (see `realign` in `steps`).
"""

from mera_ds.config import RunConfig
from mera_ds.mergeconfig import CMA
from mera_ds.methods.steps import Method, fisher_folder, learn, measure_fisher, step_name
from mera_ds.plan import DataPart, FisherStep, MergeStep, Step, stage_folder


def _write_stage(config: RunConfig, stage: int, previous: str | None, output: str) -> list[Step]:
    """Return align, tune and merge."""
    modality = config.order[stage - 1]
    if stage == 1:
        return [*learn(config, stage, modality, previous, output), *_measure(config, stage, output)]
    tuned = f"{stage_folder(stage, modality)}/tuned"
    measured = _measure(config, stage, tuned)
    merge = MergeStep(
        name=step_name(stage, modality, "merge"),
        stage=stage,
        modality=modality,
        start=tuned,
        coefficient=f"1/{stage}" if config.merge.method == CMA else "",
        output=output,
        method=config.merge.method,
        options=config.merge.options,
        importance=tuple(
            fisher_folder(config, place) for place in ((1, 2) if stage == 2 else (stage,))
        )
        if measured
        else (),
    )
    return [*learn(config, stage, modality, previous, tuned), *measured, merge]


def _measure(config: RunConfig, stage: int, tuned: str) -> list[FisherStep]:
    """Return the step that measures a tuned model's Fisher information, if merging needs it."""
    if config.merge.fisher != "data":
        return []
    data = DataPart(modality=config.order[stage - 1], percent=config.merge.fisher_percent)
    return [measure_fisher(config, stage, tuned, data)]


METHOD = Method(_write_stage, product="merged")
