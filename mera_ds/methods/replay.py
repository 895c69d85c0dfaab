"""Replay (paper, section 5.1 and appendix D): review older modalities while learning a new one.

Stage i tunes on the joint data of D_i and R_i, with R_i being r % of D_1 … D_{i−1}, and updates all
that this data passes through: LoRA and the connectors of all modalities so far. The new connector
is aligned on its own captions alone, as nothing else trains there.
"""

from mera_ds.config import RunConfig
from mera_ds.methods.steps import Method, learn
from mera_ds.plan import DataPart, Step


def _write_stage(config: RunConfig, stage: int, previous: str | None, output: str) -> list[Step]:
    """Return align, and tune with the replay set."""
    older = config.order[: stage - 1]
    replay = [DataPart(modality=name, percent=config.replay.percent) for name in older]
    return [*learn(stage, config.order[stage - 1], previous, output, replay=replay)]


METHOD = Method(_write_stage, product="tuned")
