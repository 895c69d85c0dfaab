"""Experts: each modality learned alone from the bare backbone (paper, section 5.1).

Their scores are the upper bounds S^sup of the relative gains.
"""

from mera_ds.config import RunConfig
from mera_ds.methods.steps import evaluate, learn
from mera_ds.plan import Plan, Step, stage_folder


def plan(config: RunConfig) -> Plan:
    """Return align, tune, evaluate for each modality, each from the bare backbone."""
    steps: list[Step] = []
    for number, modality in enumerate(config.order, start=1):
        model = f"{stage_folder(number, modality)}/model"
        steps += learn(config, number, modality, None, model)
        steps.append(evaluate(number, modality, model, [modality]))
    return Plan(method="expert", steps=tuple(steps))
