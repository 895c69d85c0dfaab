"""Sequential fine-tuning: learn one modality after another, without any countermeasure."""

from mera_ds.config import RunConfig
from mera_ds.methods.steps import Method, learn
from mera_ds.plan import Step


def _write_stage(config: RunConfig, stage: int, previous: str | None, output: str) -> list[Step]:
    """Return align and tune, from the last stage's model."""
    return [*learn(stage, config.order[stage - 1], previous, output)]


METHOD = Method(_write_stage, product="tuned")
