"""Arranges runs for tables and figures: by profile, then by method and settings, then by order."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

from mera_ds.report.gains import (
    GainUndefined,
    Mean,
    Progress,
    ScoreTable,
    average,
    average_progress,
    backward_gain,
    expert_warnings,
    forward_gain,
    progress,
    relative_gain,
)
from mera_ds.report.labels import NAMES, method_name, method_rank
from mera_ds.report.results import EXPERT, METRICS, Run, Score

GAINS = {"backward": backward_gain, "forward": forward_gain}
Column = tuple[str, str]
"""A modality and a task: one test set."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed: one method, one order."""

    label: str
    """The method, with the settings that tell it from others of the same method."""
    order: tuple[str, ...]
    runs: tuple[Run, ...]
    tables: tuple[ScoreTable, ...]
    """One a run."""

    @property
    def method(self) -> str:
        """Return the method's name in the configuration."""
        return self.runs[0].config.method

    @property
    def last_stage(self) -> int:
        """Return the last stage that any of the runs has a score of."""
        return max(run.last_stage for run in self.runs)

    @property
    def seeds(self) -> set[int]:
        """Return the seeds of the runs."""
        return {run.config.seed for run in self.runs}

    def part(self, kept: Sequence[bool]) -> "Group | None":
        """Return the group with those of its runs that are kept; None if it is none of them."""
        pairs = list(compress(zip(self.runs, self.tables, strict=True), kept))
        if not pairs:
            return None
        runs, tables = zip(*pairs, strict=True)
        return replace(self, runs=runs, tables=tables)

    def score(self, stage: int, column: Column) -> Mean:
        """Return the mean score over the runs."""
        return _mean_score([run.scores.get((stage, *column)) for run in self.runs])

    def modality_gain(self, stage: int, modality: str) -> Mean:
        """Return the mean relative gain of one modality over the runs, in percent."""
        found = []
        for table in self.tables:
            try:
                found.append(Mean(relative_gain(table, stage, modality), 1, 1))
            except GainUndefined as error:
                found.append(Mean(None, 0, 1, reasons=(str(error),)))
        return average(found)

    def progress(self, gain: str) -> Progress:
        """Return the `backward` or `forward` gain over the stages, averaged over the runs."""
        return average_progress([progress(GAINS[gain], table) for table in self.tables])


@dataclass(frozen=True)
class GainRow:
    """One gain of one method over the stages, averaged over seeds."""

    label: str
    order: tuple[str, ...] | None
    """None: the mean over all orders of the method."""
    progress: Progress
    groups: tuple[Group, ...]
    """Those that it is taken over."""


@dataclass(frozen=True)
class Section:
    """Everything of one profile: only runs of one profile are compared."""

    profile: str
    limits: str
    groups: tuple[Group, ...]
    experts: tuple[Run, ...]
    """Expert runs; the upper bound of a run are those of its seed (see `bounding`)."""

    @property
    def runs(self) -> list[Run]:
        """Return all runs, those of the experts first."""
        return [*self.experts, *(run for group in self.groups for run in group.runs)]

    @property
    def orders(self) -> list[tuple[str, ...]]:
        """Return the different orders of the groups, or of the experts if there are no groups.

        One that the experts have comes first.
        """
        experts = [run.config.order for run in self.experts]
        members = [group.order for group in self.groups]
        first = [order for order in experts if order in members]
        return list(dict.fromkeys([*first, *members] or experts))

    def columns(self, order: Sequence[str]) -> list[Column]:
        """Return the test sets that anything was measured on: modalities as in `order`."""
        measured = {key[1:] for run in self.runs for key in run.scores}
        pairs = [(modality, task) for modality in order for task in METRICS]
        return [pair for pair in pairs if pair in measured]

    @property
    def all_columns(self) -> list[Column]:
        """Return the test sets of all orders."""
        return list(dict.fromkeys(pair for order in self.orders for pair in self.columns(order)))

    def rows(self, column: Column) -> list[Score]:
        """Return every score on one test set."""
        return [
            score for run in self.runs for key, score in run.scores.items() if key[1:] == column
        ]

    def majority(self, column: Column) -> float | None:
        """Return the share of the most frequent answer of a test set, if it has one."""
        shares = [row.majority for row in self.rows(column) if row.majority is not None]
        return shares[-1] if shares else None

    def without_media(self, column: Column) -> float | None:
        """Return what the bare backbone scores without media, measured as the runs were."""
        known = [row.yardstick for row in self.rows(column)]
        found = []
        for row in (row for run in self.runs for row in run.without_media):
            measured = {**row, "test items": row["count"] + row["missing"]}
            same = any(all(measured.get(key, y[key]) == y[key] for key in y) for y in known)
            if same and (row["modality"], row["task"]) == column:
                found.append(float(row["score"]))
        return found[-1] if found else None

    def expert(self, column: Column) -> Mean:
        """Return the mean score of the experts."""
        return _mean_score([_expert_score(run, column) for run in self.experts])

    def some_orders(self, label: str) -> str:
        """Return the orders that a method has runs of; empty if it has runs of all."""
        numbers = [self.orders.index(g.order) + 1 for g in self.groups if g.label == label]
        if len(numbers) == len(self.orders):
            return ""
        return f"order{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)))}"

    def gains(self, gain: str) -> list[GainRow]:
        """Return a gain by method and order, with the mean over orders last in each method."""
        rows = []
        for label in dict.fromkeys(group.label for group in self.groups):
            groups = [group for group in self.groups if group.label == label]
            each = [group.progress(gain) for group in groups]
            rows += [GainRow(label, g.order, p, (g,)) for g, p in zip(groups, each, strict=True)]
            if len(groups) > 1:
                rows.append(GainRow(label, None, average_progress(each), tuple(groups)))
        return rows

    def warnings(self) -> list[str]:
        """Return what a reader has to know before trusting the numbers."""
        found = []
        for column in self.all_columns:
            name = "/".join(column)
            missing = sum(row.missing for row in self.rows(column))
            if missing:
                found.append(
                    f"{name}: {missing} prediction(s) or judgement(s) are missing, over all runs "
                    "and stages; those scores are not final."
                )
            others = {test[2] for run in self.runs for test in run.others if test[:2] == column}
            if others:
                found.append(
                    f"{name} was also tested on {', '.join(sorted(others))}: those scores are in "
                    "results.jsonl only, and in no table, gain or figure."
                )
            yardsticks = [row.yardstick for row in self.rows(column)]
            differing = [key for key in yardsticks[0] if len({str(y[key]) for y in yardsticks}) > 1]
            if differing:
                found.append(
                    f"{name} was scored in different ways ({', '.join(differing)}): its scores are "
                    "not all comparable; evaluate these runs again with one setting."
                )
        bounds = {column: self.expert(column).value for column in self.all_columns}
        experts = {column: score for column, score in bounds.items() if score is not None}
        tests = {
            "the majority class": self.majority,
            "the backbone without media": self.without_media,
        }
        floors = {
            name: {column: value for column in bounds if (value := floor(column)) is not None}
            for name, floor in tests.items()
        }
        tables = [table for group in self.groups for table in group.tables]
        return [
            *found,
            *expert_warnings(experts, floors, tables),
            *self._unequal_runs(),
            *self._unfinished(),
            *self._first_stages(),
        ]

    @property
    def members(self) -> list[tuple[str, tuple[Run, ...]]]:
        """Return the runs by label, the experts first; a label comes once for each order."""
        experts = NAMES[EXPERT].text, self.experts
        return [experts, *((group.label, group.runs) for group in self.groups)]

    def _unequal_runs(self) -> list[str]:
        found = []
        for label, runs in self.members:
            seeds = {run.config.seed for run in runs}
            if len(seeds) < len(runs):
                found.append(f"{label}: {len(runs)} runs, but only {len(seeds)} different seed(s).")
        differing = differing_settings(self.experts)
        if differing:
            found.append(f"The experts differ in {', '.join(differing)}.")
        some = {group.label: self.some_orders(group.label) for group in self.groups}
        if any(some.values()):
            listed = "; ".join(
                f"{label} ({orders} only)" for label, orders in some.items() if orders
            )
            found.append(
                "Not run in every order, so means over orders are not over the same ones: "
                f"{listed}."
            )
        seeds = {seed for group in self.groups for seed in group.seeds}
        fewer = {group.label: group.seeds for group in self.groups if group.seeds != seeds}
        if fewer:
            listed = "; ".join(
                f"{label} (seed {_joined(own)} only)" for label, own in fewer.items()
            )
            found.append(
                f"Not run with every seed ({_joined(seeds)}), so means over seeds are not over the "
                f"same ones: {listed}."
            )
        return found

    def _unfinished(self) -> list[str]:
        found = [
            f"{run.folder.name} ({label}) {run.stages_measured} of {len(run.config.order)}"
            for label, runs in self.members
            for run in runs
            if run.stages_measured < len(run.config.order)
        ]
        return [f"Not finished, stages measured so far: {'; '.join(found)}."] if found else []

    def _first_stages(self) -> list[str]:
        """Say where the first stage, which counts as 100 %, measured something else."""
        found = []
        for group in self.groups:
            gain = group.modality_gain(1, group.order[0]).value
            if gain is not None and abs(gain - 100) >= 1:
                order = self.orders.index(group.order) + 1
                found.append(f"{group.label}, order {order}: {gain:.2f} %")
        if not found:
            return []
        said = "Stage 1 counts as 100 %, as in the paper; measured against its expert it is"
        return [f"{said}: {'; '.join(found)}."]


def summarise(runs: Sequence[Run]) -> list[Section]:
    """Arrange runs into one section per profile: in the paper's order, others last."""
    return [
        _section(profile, [run for run in runs if run.config.profile == profile])
        for profile in dict.fromkeys(run.config.profile for run in runs)
    ]


def score_table(run: Run, experts: Sequence[Run], name: str) -> ScoreTable:
    """Put a run's scores beside those of the experts that it is measured by (see `bounding`)."""
    bounds: dict[Column, float] = {}
    incomparable: dict[tuple[int, str, str], str] = {}
    for column in dict.fromkeys(key[1:] for expert in experts for key in expert.scores):
        scores = [score for _, score in bounding(run, experts, column)]
        bounds[column] = statistics.fmean(score.score for score in scores)
        for key, score in run.scores.items():
            other = next((s for s in scores if s.yardstick != score.yardstick), None)
            if key[1:] == column and other is not None:
                incomparable[key] = _difference(score, other)
    values = {key: score.score for key, score in run.scores.items()}
    return ScoreTable(name, run.config.order, values, bounds, incomparable)


def bounding(run: Run, experts: Sequence[Run], column: Column) -> list[tuple[Run, Score]]:
    """Return whose mean score a run's is divided by: of the experts of its seed, else of all.

    So stage 1, which is what the expert of the same seed is, keeps to its 100 %.
    """
    found = [(expert, score) for expert in experts if (score := _expert_score(expert, column))]
    return [pair for pair in found if pair[0].config.seed == run.config.seed] or found


def _section(profile: str, runs: Sequence[Run]) -> Section:
    experts = tuple(run for run in runs if run.config.method == EXPERT)
    known = [run.config.order for run in experts]
    others = sorted(
        (run for run in runs if run.config.method != EXPERT),
        key=lambda run: (
            *(method_rank(run.config.method), run.config.replay.percent),
            run.config.order not in known,
        ),
    )
    labels = {run.folder: _label(run, others) for run in others}
    keys = dict.fromkeys((labels[run.folder], run.config.order) for run in others)
    groups = []
    for label, order in keys:
        members = [r for r in others if (labels[r.folder], r.config.order) == (label, order)]
        tables = [score_table(run, experts, f"{label} ({run.folder.name})") for run in members]
        groups.append(Group(label, order, tuple(members), tuple(tables)))
    return Section(profile, runs[0].config.limits, tuple(groups), experts)


def _label(run: Run, runs: Sequence[Run]) -> str:
    """Return the method's name; where runs of that name differ in settings, with this run's."""
    name = method_name(run.config)
    same = [other for other in runs if method_name(other.config) == name]
    keys = differing_settings(same)
    if not keys:
        return name
    values = [run.settings.get(key, "unset") for key in keys]
    short = [key.rpartition(".")[2] for key in keys]
    said = [value.strip('"') for value in values]  # they are JSON
    text = ", ".join(f"{key}={value}" for key, value in zip(short, said, strict=True))
    if len(text) <= 24:
        return f"{name} [{text}]"
    variants: list[list[str]] = []
    for other in same:
        found = [other.settings.get(key, "unset") for key in keys]
        if found not in variants:
            variants.append(found)
    return f"{name} #{variants.index(values) + 1}"


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return the dotted keys of the settings that are not the same in all of the runs."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({each.get(key) for each in settings}) > 1]


def _joined(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _expert_score(run: Run, column: Column) -> Score | None:
    return next((score for key, score in run.scores.items() if key[1:] == column), None)


def _mean_score(scores: Sequence[Score | None]) -> Mean:
    return average([Mean(s.score, 1, 1) if s else Mean(None, 0, 1) for s in scores])


def _difference(score: Score, expert: Score) -> str:
    names = [name for name, value in score.yardstick.items() if expert.yardstick[name] != value]
    values = [f"{name} {expert.yardstick[name]}, not {score.yardstick[name]}" for name in names]
    return f"the expert was scored with {'; '.join(values)}"
