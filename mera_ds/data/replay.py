"""Replay lists: which r % of a modality's units are kept (paper, section 4.2).

The list is fixed by the seed, stratified by task, and nested: every unit of a smaller percentage
is in every larger one. It is stored as unit ids.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def replay_sample(ids: Sequence[str], tasks: Sequence[str], percent: float, seed: int) -> list[int]:
    """Return the positions of the replay units, in their original order.

    Each task gives its own r %, rounded up, so that no task is lost.

    Args:
        ids: unit ids of one modality.
        tasks: the task of each unit.
        percent: r, in (0, 100].
        seed: seed of the run.
    """
    draws = np.fromiter((_draw(name, seed) for name in ids), dtype="S32", count=len(ids))
    names = np.asarray(tasks)
    chosen: list[int] = []
    for task in sorted(set(tasks)):
        positions = np.flatnonzero(names == task)
        order = positions[np.argsort(draws[positions], kind="stable")]
        chosen += order[: replay_count(len(order), percent)].tolist()
    return sorted(chosen)


def replay_count(units: int, percent: float) -> int:
    """Return how many of a task's units a replay list of r % keeps: the share, rounded up."""
    # In floats, 1.1 % of 3000 is a little more than 33.
    return math.ceil(units * Fraction(str(percent)) / 100)


def _draw(unit_id: str, seed: int) -> bytes:
    """A fixed pseudo-random value of a unit: independent of the percentage and of other units."""
    return hashlib.sha256(f"{seed}/{unit_id}".encode()).digest()
