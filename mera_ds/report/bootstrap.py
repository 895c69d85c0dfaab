"""Confidence intervals by a paired bootstrap over test items.

Test items are drawn with replacement, many times; every model is measured on the same draws, so
that what an item makes hard for all of them cancels in a relative gain. CIDEr's document
frequencies stay those of the whole set. The draws depend on the test's name and size alone.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mera_ds.files import read_json
from mera_ds.plan import stage_folder
from mera_ds.report.results import Run

RESAMPLES = 1000
LEVEL = 95
"""Per cent that an interval covers."""

Values = NDArray[np.float64]
"""(RESAMPLES,) one figure, on each draw of the items."""
Key = tuple[int, str, str]
"""Stage, modality, task."""


@dataclass(frozen=True)
class Interval:
    """Between the 2.5th and the 97.5th percentile of the draws."""

    low: float
    high: float


def interval(values: Values) -> Interval:
    """Return the interval of a figure."""
    edge = (100 - LEVEL) / 2
    low, high = np.percentile(values, [edge, 100 - edge])
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class Resampled:
    """The scores of some runs on every draw."""

    scores: Mapping[tuple[str, Key], Values]
    """By run folder and key; what has no stored items is not in it."""

    def mean(self, runs: Sequence[Run], key: Key) -> Values | None:
        """Return the mean score over runs; None unless every run that has the score has items."""
        found = [self.scores.get((str(run.folder), key)) for run in runs if key in run.scores]
        known = [values for values in found if values is not None]
        return np.mean(known, axis=0) if known and len(known) == len(found) else None


def resample(runs: Sequence[Run]) -> Resampled:
    """Draw the items of every test and score every run on the draws."""
    items = {str(run.folder): _items(run) for run in runs}
    tests = dict.fromkeys(key[1:] for run in runs for key in run.scores)
    scores: dict[tuple[str, Key], Values] = {}
    for modality, task in tests:
        draws: dict[tuple[str, ...], NDArray[np.float32]] = {}
        for folder, found in items.items():
            for key, values in found.items():
                if key[1:] == (modality, task):
                    ids = tuple(sorted(values))
                    if ids not in draws:
                        draws[ids] = _draw(f"{modality}/{task}", len(ids))
                    scores[folder, key] = _means(draws[ids], [values[name] for name in ids])
    return Resampled(scores)


def backward(stage: int, order: Sequence[str], gain_of: Callable[[str], Values]) -> Values:
    """Return the Backward Relative Gain of a stage on every draw (see `gains.backward_gain`)."""
    if stage == 1:
        return np.full(RESAMPLES, 100.0)
    return np.mean([gain_of(modality) for modality in order[: stage - 1]], axis=0)


def forward(stage: int, order: Sequence[str], gain_of: Callable[[str], Values]) -> Values:
    """Return the Forward Relative Gain of a stage on every draw (see `gains.forward_gain`)."""
    return np.full(RESAMPLES, 100.0) if stage == 1 else gain_of(order[stage - 1])


def relative(scores: Sequence[Values], experts: Sequence[Values]) -> Values:
    """Return the relative gain over a modality's tasks on every draw, in percent."""
    ratios = [score / expert for score, expert in zip(scores, experts, strict=True)]
    return 100 * np.mean(ratios, axis=0)


def _items(run: Run) -> dict[Key, Mapping[str, float | None]]:
    """Return what each item scored, by stage, modality and task; of old runs nothing."""
    found: dict[Key, Mapping[str, float | None]] = {}
    stages = {score.stage: score.stage_modality for score in run.scores.values()}
    for stage, modality in stages.items():
        path = run.folder / stage_folder(stage, modality) / "evaluation" / "per_item.json"
        stored: Mapping[str, Any] = read_json(path)["items"] if path.exists() else {}
        for name, values in stored.items():
            name_of_modality, task = name.rsplit("/", 1)
            key = (stage, name_of_modality, task)
            if key in run.scores and len(values) == run.scores[key].count + run.scores[key].missing:
                found[key] = values
    return found


def _draw(name: str, count: int) -> NDArray[np.float32]:
    """Return how often each item is drawn (RESAMPLES, count)."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {count}".encode()).digest()[:8], "big")
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, [1 / count] * count, RESAMPLES).astype(np.float32)


def _means(draws: NDArray[np.float32], values: Sequence[float | None]) -> Values:
    there = np.array([value is not None for value in values], dtype=np.float32)
    known = np.array([0.0 if value is None else value for value in values], dtype=np.float32)
    return (draws @ known).astype(np.float64) / np.maximum(draws @ there, 1)
