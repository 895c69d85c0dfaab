"""The learning rate as a pure function of the step."""

import math
from collections.abc import Mapping, Sequence

from mera_ds.config import PhaseConfig
from mera_ds.errors import InputError
from mera_ds.plan import BACKBONE, LORA


def peak_rates(
    phase: PhaseConfig, sets: Sequence[str], scales: Mapping[str, float]
) -> dict[str, float]:
    """Return the peak learning rate of each trainable set.

    Args:
        phase: gives `lr_connector` and `lr_backbone`.
        sets: names of the trainable sets.
        scales: factors of single sets; 1 where there is none.

    Raises:
        InputError: if the backbone trains but has no rate.
    """
    backbone = {BACKBONE, LORA} & set(sets)
    if backbone and phase.lr_backbone is None:
        raise InputError("this phase trains the backbone, but its lr_backbone is not set")
    rates = {name: phase.lr_connector for name in sets}
    if phase.lr_backbone is not None:
        rates |= dict.fromkeys(backbone, phase.lr_backbone)
    return {name: rate * scales.get(name, 1.0) for name, rate in rates.items()}


def learning_rate_factor(phase: PhaseConfig, step: int, total: int) -> float:
    """Return the factor of the peak rate: linear warm-up, then cosine or constant.

    Args:
        phase: gives `warmup_ratio` and `schedule`.
        step: number of the optimizer step, counted from 0.
        total: number of steps of the phase.
    """
    warmup = math.ceil(phase.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if phase.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))
