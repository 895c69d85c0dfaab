"""The learning rate as a pure function of the step."""

import math

from mera_ds.config import PhaseConfig


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
