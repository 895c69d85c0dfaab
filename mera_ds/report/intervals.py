"""Confidence intervals of a section's scores and gains (see `mera_ds.report.bootstrap`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mera_ds.report.bootstrap import (
    Interval,
    Key,
    Resampled,
    Values,
    backward,
    forward,
    interval,
    relative,
    resample,
)
from mera_ds.report.gains import ScoreTable
from mera_ds.report.results import Run
from mera_ds.report.summary import Column, Group, Section, bounding

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
        tasks = group.tables[0].tasks(modality)
        found = [
            self._run_relative(run, table, [(stage, modality, task) for task in tasks])
            for run, table in zip(group.runs, group.tables, strict=True)
            if tasks and all((stage, modality, task) in run.scores for task in tasks)
        ]
        if not found:
            raise _Unknown
        return np.asarray(np.mean(found, axis=0))

    def _run_relative(self, run: Run, table: ScoreTable, keys: Sequence[Key]) -> Values:
        scores = [self._resampled.scores.get((str(run.folder), key)) for key in keys]
        known = [values for values in scores if values is not None]
        if len(known) < len(keys) or any(key in table.incomparable for key in keys):
            raise _Unknown
        return relative(known, [self._expert(run, key[1:]) for key in keys])

    def _expert(self, run: Run, column: Column) -> Values:
        found = [
            self._resampled.scores.get((str(expert.folder), (score.stage, *column)))
            for expert, score in bounding(run, self.section.experts, column)
        ]
        known = [values for values in found if values is not None]
        if not known or len(known) < len(found) or min(float(v.min()) for v in known) <= 0:
            raise _Unknown
        return np.asarray(np.mean(known, axis=0))
