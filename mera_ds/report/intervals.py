"""Confidence intervals of a section's scores and gains (see `mera_ds.report.bootstrap`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mera_ds.report.bootstrap import (
    Interval,
    Resampled,
    Values,
    backward,
    forward,
    interval,
    relative,
    resample,
)
from mera_ds.report.summary import Column, Group, Section

_GAINS = {"backward": backward, "forward": forward}


class _Unknown(Exception):
    """Items of a run are not stored, or a score has no comparable expert."""


@dataclass(frozen=True)
class Intervals:
    """Intervals over test items; None where the items' scores are not stored."""

    section: Section

    @cached_property
    def _resampled(self) -> Resampled:
        return resample(self.section.runs)

    def score(self, group: Group, stage: int, column: Column) -> Interval | None:
        """Return the interval of a mean score over a group's runs."""
        values = self._resampled.mean(group.runs, (stage, *column))
        return None if values is None else interval(values)

    def gain(self, groups: Sequence[Group], gain: str, stage: int) -> Interval | None:
        """Return the interval of a gain at a stage, averaged over groups (of several orders)."""
        return self._averaged(groups, gain, [stage])

    def mean_gain(self, groups: Sequence[Group], gain: str, stages: int) -> Interval | None:
        """Return the interval of a gain's mean over all `stages`, averaged over groups.

        As in `average_progress`, of the runs that got as far.
        """
        parts = [
            group.part([table.finished_stages >= stages for table in group.tables])
            for group in groups
        ]
        furthest = [part for part in parts if part is not None]
        return self._averaged(furthest, gain, range(1, stages + 1))

    def modality_gain(self, group: Group, stage: int, modality: str) -> Interval | None:
        """Return the interval of the relative gain of one modality."""
        try:
            return interval(self._relative(group, stage, modality))
        except _Unknown:
            return None

    def _averaged(
        self, groups: Sequence[Group], gain: str, stages: Sequence[int]
    ) -> Interval | None:
        try:
            found = [self._gain(group, gain, stage) for group in groups for stage in stages]
        except _Unknown:
            return None
        return interval(np.mean(found, axis=0)) if found else None

    def _gain(self, group: Group, gain: str, stage: int) -> Values:
        return _GAINS[gain](
            stage, group.order, lambda modality: self._relative(group, stage, modality)
        )

    def _relative(self, group: Group, stage: int, modality: str) -> Values:
        scores, experts = [], []
        for task in group.tables[0].tasks(modality):
            key = (stage, modality, task)
            values = self._resampled.mean(group.runs, key)
            if values is None or any(key in table.incomparable for table in group.tables):
                raise _Unknown
            scores.append(values)
            experts.append(self._expert((modality, task)))
        if not scores:
            raise _Unknown
        return relative(scores, experts)

    def _expert(self, column: Column) -> Values:
        found = [
            self._resampled.scores.get((str(run.folder), key))
            for run in self.section.experts
            for key in run.scores
            if key[1:] == column
        ]
        known = [values for values in found if values is not None]
        if not known or len(known) < len(found) or min(float(v.min()) for v in known) <= 0:
            raise _Unknown
        return np.asarray(np.mean(known, axis=0))
