"""Sequential fine-tuning: learn one modality after another, without any countermeasure."""

from mera_ds.config import RunConfig
from mera_ds.methods.steps import evaluate, learn
from mera_ds.plan import Plan, Step, stage_folder


def plan(config: RunConfig) -> Plan:
    """Return align, tune, evaluate for each modality, each stage from the last one's model."""
    steps: list[Step] = []
    previous = None
    for number, modality in enumerate(config.order, start=1):
        model = f"{stage_folder(number, modality)}/model"
        steps += learn(config, number, modality, previous, model)
        steps.append(evaluate(number, modality, model, config.order[:number]))
        previous = model
    return Plan(method="finetune", steps=tuple(steps))
