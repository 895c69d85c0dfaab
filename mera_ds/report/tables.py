"""The tables of a report, as plain text, Markdown and CSV.

Every table says its metric and unit, judge, tokenizer, number of test items and the profile's
limits. Scores are rounded as in the paper: CIDEr and gains to two decimals, accuracy to three.
"""

import csv
import io
from collections.abc import Iterator, Sequence

from mera_ds.report.bootstrap import RESAMPLES, Interval
from mera_ds.report.gains import Mean
from mera_ds.report.intervals import Intervals
from mera_ds.report.render import Table
from mera_ds.report.results import EXPERT, METRICS, Score
from mera_ds.report.summary import GAINS, Column, Group, Section, differing_settings

_UNITS = {"caption": "CIDEr", "qa": "Acc"}
_DECIMALS = {"caption": 2, "qa": 3}
_MEANING = {
    "backward": "mean over the modalities learnt before a stage of S/S_expert",
    "forward": "S/S_expert of the modality learnt in a stage",
}
PARTIAL = "(1/2): mean over 1 of 2 runs; the others have not got so far, or their value is n/a."
_MARKS = (
    "*: learnt in that stage; +: better than after the stage before; -: not learnt yet; n/a: not "
    "measured. Several runs (seeds): mean ± sample standard deviation."
)
_CSV_HEADER = (
    "table profile method order stage modality task metric unit value runs runs_total "
    "standard_deviation_over_runs low95 high95 reason judge tokenizer test_items limits"
).split()


def section_tables(section: Section, intervals: Intervals) -> list[Table]:
    """Return the tables of one profile: runs, scores by order, and gains if there are experts."""
    tables = [_runs_table(section)]
    tables += [_scores_table(section, order) for order in section.orders]
    if section.groups and section.experts:
        tables += [_last_table(section, intervals, order) for order in section.orders]
        tables += [_gains_table(section, intervals, gain) for gain in GAINS]
    return tables


def to_csv(sections: Sequence[tuple[Section, Intervals]]) -> str:
    """Return every number of every table, one a row, unrounded."""
    target = io.StringIO()
    writer = csv.DictWriter(target, _CSV_HEADER, lineterminator="\n")
    writer.writeheader()
    for section, intervals in sections:
        common = {"profile": section.profile, "limits": section.limits}
        for row in [*_score_values(section, intervals), *_gain_values(section, intervals)]:
            writer.writerow({**common, **row})
    return target.getvalue()


def _runs_table(section: Section) -> Table:
    header = ("Method", "Run", "Order", "Seed", "Stages", "Weights")
    rows = []
    notes = [limits_note(section)]
    for label, runs in section.members:
        for run in runs:
            order = run.config.order
            last = max(run.scores.values(), key=lambda score: score.stage, default=None)
            weights = last.model[:12] if last else "no results yet"
            done = f"{run.stages_measured} of {len(order)}"
            name = str(run.folder)
            name = name if len(name) <= 48 else f"...{name[-45:]}"
            place = (_order_number(section, order), str(run.config.seed))
            rows.append((label, name, *place, done, weights))
    for number, order in enumerate(section.orders, start=1):
        notes.append(f"Order {number}: {', '.join(order)}.")
    for method in dict.fromkeys(run.config.method for run in section.runs):
        same = {run.folder: run for run in section.runs if run.config.method == method}
        for key in differing_settings([*same.values()]):
            names = {
                (run.folder.name if method == EXPERT else label): run.settings.get(key, "unset")
                for label, runs in section.members
                for run in runs
                if run.folder in same
            }
            values = [f"{name} {value}" for name, value in names.items()]
            notes.append(f"{method} differs in {key}: {', '.join(values)}.")
    return Table(f"Runs of profile {section.profile}", header, tuple(rows), tuple(notes), 6)


def _scores_table(section: Section, order: tuple[str, ...]) -> Table:
    columns = section.columns(order)
    groups = [group for group in section.groups if group.order == order]
    header = ["Method", "Stage", "Runs"]
    header += [f"{modality}\n{_UNITS[task]}" for modality, task in columns]
    items = [_joined(str(row.count) for row in section.rows(column)) for column in columns]
    rows = [("Test items", "", "", *(f"{cell} " for cell in items))]
    shares = [section.majority(column) for column in columns]
    majority = ["- " if share is None else f"{share:.3f} " for share in shares]
    rows.append(("Majority class", "", "", *majority))
    floors = [section.without_media(column) for column in columns]
    if any(floor is not None for floor in floors):
        cells = [
            "- " if floor is None else _score_cell(Mean(floor, 1, 1), task)
            for floor, (_, task) in zip(floors, columns, strict=True)
        ]
        rows.append(("Backbone, no media", "", "", *cells))
    if section.experts:
        cells = [_score_cell(section.expert(column), column[1]) for column in columns]
        rows.append(("Expert", "", str(len(section.experts)), *cells))
    for group in groups:
        for stage in range(1, group.last_stage + 1):
            label = (group.label, f"{stage} {order[stage - 1]}", str(len(group.runs)))
            rows.append((*label, *(_group_cell(group, stage, column) for column in columns)))
    notes = [
        *([_MARKS] if groups else []),
        *measurement_notes(section, columns),
    ]
    title = f"scores after every stage, profile {section.profile}"
    if groups:
        title += f", order {_order_number(section, order)}: {', '.join(order)}"
    partial = any("(" in cell for row in rows for cell in row[3:])
    notes += [PARTIAL] if partial else []
    notes.append(limits_note(section))
    return Table(title, tuple(header), tuple(rows), tuple(notes), 3, paper="Tables 9 and 10")


def _last_table(section: Section, intervals: Intervals, order: tuple[str, ...]) -> Table:
    """Return absolute scores beside relative gains, after the last stage of each group."""
    columns = section.columns(order)
    modalities = list(dict.fromkeys(modality for modality, _ in columns))
    tasks = {name: [task for modality, task in columns if modality == name] for name in modalities}
    header = ["Method", "Stage"]
    for name in modalities:
        header += [*(f"{name}\n{_UNITS[task]}" for task in tasks[name]), f"{name}\ngain, 95 % CI"]
    rows = []
    for group in (group for group in section.groups if group.order == order):
        stage = group.last_stage
        cells = []
        for name in modalities:
            cells += [_group_cell(group, stage, (name, task)).strip() for task in tasks[name]]
            cells.append(_relative_cell(group, intervals, stage, name))
        rows.append((group.label, str(stage), *cells))
    title = (
        f"After the last stage, profile {section.profile}, order {_order_number(section, order)}"
    )
    notes = (
        "Gain: mean over the tasks of S/S_expert in %, with its 95 % confidence interval: paired "
        f"bootstrap over test items, {RESAMPLES} draws. {_MARKS}",
        *([PARTIAL] if any("(" in cell for row in rows for cell in row[2:]) else []),
        *measurement_notes(section, columns),
        limits_note(section),
    )
    return Table(title, tuple(header), tuple(rows), notes, 2)


def _relative_cell(group: Group, intervals: Intervals, stage: int, modality: str) -> str:
    if modality not in group.order[:stage]:
        return "-"
    found = intervals.modality_gain(group, stage, modality)
    inside = "" if found is None else f" [{found.low:.1f}, {found.high:.1f}]"
    return f"{_gain_cell(group.modality_gain(stage, modality))}{inside}"


def _gains_table(section: Section, intervals: Intervals, gain: str) -> Table:
    entries = section.gains(gain)
    length = max(len(entry.progress.stages) for entry in entries)
    several = any(entry.progress.mean.spread is not None for entry in entries)
    header = ["Method", "Order", "Runs", "Done", *(f"Stage {i + 1}" for i in range(length))]
    header += ["Mean", "95 % CI", "Std", *(["Spread"] if several else [])]
    rows = []
    for entry in entries:
        found = entry.progress
        whole = intervals.mean_gain(entry.groups, gain, found.finished) if found.finished else None
        order = _order_number(section, entry.order) if entry.order else "mean"
        done = f"{found.finished}/{len(found.stages)}"
        stages = [_gain_cell(stage) for stage in found.stages]
        stages += ["-"] * (length - len(stages))
        spread = found.mean.spread
        last = [_gain_cell(found.mean), _interval_cell(whole), _gain_cell(found.deviation)]
        last += ["-" if spread is None else f"{spread:.2f}"] if several else []
        rows.append((entry.label, order, str(found.mean.total), done, *stages, *last))
    notes = [
        f"In % of the expert: {_MEANING[gain]}. Stage 1 counts as 100 %. Mean and Std (sample "
        "standard deviation, n - 1) are taken over the stages that are done. 95 % CI of Mean: "
        f"paired bootstrap over test items, {RESAMPLES} draws; -: items not stored.",
    ]
    if several:
        notes.append("Spread: sample standard deviation of Mean over runs (row `mean`: orders).")
    if any("(" in cell for row in rows for cell in row[4:]):
        notes.append(PARTIAL)
    reasons = [reason for e in entries for mean in e.progress.stages for reason in mean.reasons]
    notes += [f"n/a: {reason}." for reason in dict.fromkeys(reasons)]
    notes += [*measurement_notes(section, section.all_columns), limits_note(section)]
    title = f"{gain.capitalize()} Relative Gain by stage (%), profile {section.profile}"
    return Table(title, tuple(header), tuple(rows), tuple(notes), 4)


def _group_cell(group: Group, stage: int, column: Column) -> str:
    modality, task = column
    if modality not in group.order[:stage]:
        return "- "
    if modality == group.order[stage - 1]:
        return _score_cell(group.score(stage, column), task, "*")
    now, before = (group.score(number, column) for number in (stage, stage - 1))
    known = now.value is not None and before.value is not None and now.runs == before.runs
    better = known and (now.value or 0.0) > (before.value or 0.0)
    return _score_cell(now, task, "+" if better else " ")


def _score_cell(mean: Mean, task: str, mark: str = " ") -> str:
    if mean.value is None:
        return "n/a "
    decimals = _DECIMALS[task]
    spread = "" if mean.spread is None else f"±{mean.spread:.{decimals}f}"
    return f"{mean.value:.{decimals}f}{spread}{of_runs(mean)}{mark}"


def _gain_cell(mean: Mean) -> str:
    if mean.value is None:
        return "n/a" if mean.reasons or not mean.total else "-"
    return f"{mean.value:.2f}{of_runs(mean)}"


def _interval_cell(found: Interval | None) -> str:
    return "-" if found is None else f"{found.low:.2f} to {found.high:.2f}"


def of_runs(mean: Mean) -> str:
    return f" ({mean.runs}/{mean.total})" if mean.runs < mean.total else ""


def measurement_notes(section: Section, columns: Sequence[Column]) -> list[str]:
    """Say how the scores were made and how far chance alone moves them."""
    rows = [row for column in columns for row in section.rows(column)]
    judged = [row for row in rows if row.metric == "accuracy"]
    captioned = [row for row in rows if row.metric == "cider"]
    notes = []
    if captioned:
        counts = _joined(str(row.count) for row in captioned)
        tokenizers = _joined(str(row.tokenizer) for row in captioned)
        notes.append(
            f"CIDEr x 100, higher is better: tokenizer {tokenizers}; {counts} test items a task."
        )
    if judged:
        counts = _joined(str(row.count) for row in judged)
        margin = 1.96 * 0.5 / min(row.count for row in judged) ** 0.5
        notes.append(
            f"Acc, share of right answers (0 to 1): judge {_joined(str(r.judge) for r in judged)}; "
            f"{counts} test items a task, so chance alone moves it by up to ±{margin:.3f} "
            "(95 % interval)."
        )
    return notes


def limits_note(section: Section) -> str:
    return f"Limits: {section.limits or 'the profile states none'}"


def _order_number(section: Section, order: tuple[str, ...]) -> str:
    orders = section.orders
    return str(orders.index(order) + 1) if order in orders else "-"


def _joined(values: Iterator[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _score_values(section: Section, intervals: Intervals) -> Iterator[dict[str, object]]:
    for column in section.all_columns:
        share = section.majority(column)
        common: dict[str, object] = {
            "modality": column[0],
            "task": column[1],
            "metric": METRICS[column[1]],
            "unit": "CIDEr x 100" if column[1] == "caption" else "share of right answers",
            **_origin(section.rows(column)),
        }
        if share is not None:
            yield {**common, "table": "majority", "value": share}
        floor = section.without_media(column)
        if floor is not None:
            yield {**common, "table": "without media", "value": floor}
        if section.experts:
            yield {**common, "table": "expert", **_mean_values(section.expert(column))}
        for group in section.groups:
            for stage in range(1, group.last_stage + 1):
                if column[0] in group.order[:stage]:
                    place = {"method": group.label, "order": ">".join(group.order), "stage": stage}
                    values = _mean_values(group.score(stage, column))
                    found = _interval_values(intervals.score(group, stage, column))
                    yield {**common, "table": "score", **place, **values, **found}


def _gain_values(section: Section, intervals: Intervals) -> Iterator[dict[str, object]]:
    entries = [(gain, row) for gain in GAINS for row in section.gains(gain) if section.experts]
    for gain, row in entries:
        place = {
            **_origin([score for column in section.all_columns for score in section.rows(column)]),
            "table": f"{gain}_gain",
            "method": row.label,
            "order": ">".join(row.order) if row.order else "mean over orders",
            "unit": "% of expert",
        }
        done = row.progress.finished
        for stage, mean in enumerate(row.progress.stages, start=1):
            there = mean.value is not None
            found = intervals.gain(row.groups, gain, stage) if there else None
            yield {**place, "stage": stage, **_mean_values(mean), **_interval_values(found)}
        whole = intervals.mean_gain(row.groups, gain, done) if done else None
        mean_values = _mean_values(row.progress.mean)
        yield {**place, "stage": "mean", **mean_values, **_interval_values(whole)}
        yield {**place, "stage": "std", **_mean_values(row.progress.deviation)}


def _origin(rows: Sequence[Score]) -> dict[str, object]:
    return {
        "judge": _joined(str(row.judge) for row in rows if row.judge),
        "tokenizer": _joined(str(row.tokenizer) for row in rows if row.tokenizer),
        "test_items": _joined(str(row.count) for row in rows),
    }


def _interval_values(found: Interval | None) -> dict[str, object]:
    return {} if found is None else {"low95": found.low, "high95": found.high}


def _mean_values(mean: Mean) -> dict[str, object]:
    return {
        "value": "" if mean.value is None else mean.value,
        "runs": mean.runs,
        "runs_total": mean.total,
        "standard_deviation_over_runs": "" if mean.spread is None else mean.spread,
        "reason": "; ".join(dict.fromkeys(mean.reasons)),
    }
