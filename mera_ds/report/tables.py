"""The tables of a report, as plain text, Markdown and CSV.

Every table says its metric and unit, judge, tokenizer, number of test items and the profile's
limits. Scores are rounded as in the paper: CIDEr and gains to two decimals, accuracy to three.
"""

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mera_ds.report.gains import Mean
from mera_ds.report.results import METRICS, Score
from mera_ds.report.summary import GAINS, Column, Group, Section, differing_settings

WIDTH = 120
"""Longest line of the terminal text."""

_UNITS = {"caption": "CIDEr", "qa": "Acc"}
_DECIMALS = {"caption": 2, "qa": 3}
_MEANING = {
    "backward": "mean over the modalities learnt before a stage of S/S_expert",
    "forward": "S/S_expert of the modality learnt in a stage",
}
_PARTIAL = "(1/2): mean over 1 of 2 runs; the others have not got so far, or their value is n/a."
_CSV_HEADER = (
    "table profile method order stage modality task metric unit value runs runs_total "
    "standard_deviation_over_runs reason judge tokenizer test_items limits"
).split()


@dataclass(frozen=True)
class Table:
    """A table ready to print."""

    title: str
    header: tuple[str, ...]
    """A newline makes a second line."""
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    labels: int
    """How many columns on the left name the row."""


def section_tables(section: Section) -> list[Table]:
    """Return the tables of one profile: runs, scores by order, and gains if there are experts."""
    tables = [_runs_table(section)]
    tables += [_scores_table(section, order) for order in section.orders]
    if section.groups and section.experts:
        tables += [_gains_table(section, gain) for gain in GAINS]
    return tables


def to_text(table: Table, width: int = WIDTH) -> str:
    """Return aligned plain text; columns that don't fit follow in further blocks."""
    lines = [header.split("\n") for header in table.header]
    height = max(map(len, lines))
    above = [tuple((cell + [""] * height)[i] for cell in lines) for i in range(height)]
    grid = [*above, *table.rows]
    widths = [max(len(row[i]) for row in grid) for i in range(len(table.header))]
    labels = list(range(table.labels))
    blocks = [list(labels)]
    for column in range(table.labels, len(widths)):
        if sum(widths[i] + 2 for i in [*blocks[-1], column]) - 2 > width and blocks[-1] != labels:
            blocks.append(list(labels))
        blocks[-1].append(column)
    text = [table.title]
    for block in blocks:
        for number, row in enumerate(grid):
            cells = [
                row[i].ljust(widths[i]) if i < table.labels else row[i].rjust(widths[i])
                for i in block
            ]
            text.append("  ".join(cells).rstrip())
            if number == height - 1:
                text.append("-" * (sum(widths[i] + 2 for i in block) - 2))
        text.append("")
    for note in table.notes:
        text.append(wrap(note, width))
    return "\n".join(text).rstrip() + "\n"


def wrap(text: str, width: int = WIDTH) -> str:
    """Return a sentence on lines of at most `width`; names and flags with hyphens stay whole."""
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False)


def to_markdown(table: Table) -> str:
    """Return a Markdown table under a heading, with the notes as a list."""
    header = [cell.replace("\n", " ") for cell in table.header]
    rule = ["---"] * table.labels + ["---:"] * (len(header) - table.labels)
    rows = [[cell.strip().replace("|", "\\|") for cell in row] for row in table.rows]
    lines = [f"| {' | '.join(row)} |" for row in [header, rule, *rows]]
    return "\n".join([f"### {table.title}", "", *lines, "", *(f"- {note}" for note in table.notes)])


def to_csv(sections: Sequence[Section]) -> str:
    """Return every number of every table, one a row, unrounded."""
    target = io.StringIO()
    writer = csv.DictWriter(target, _CSV_HEADER, lineterminator="\n")
    writer.writeheader()
    for section in sections:
        common = {"profile": section.profile, "limits": section.limits}
        for row in [*_score_values(section), *_gain_values(section)]:
            writer.writerow({**common, **row})
    return target.getvalue()


def _runs_table(section: Section) -> Table:
    header = ("Method", "Run", "Order", "Seed", "Stages", "Weights")
    rows = []
    notes = [_limits(section)]
    members = [("expert", section.experts), *((g.label, g.runs) for g in section.groups)]
    for label, runs in members:
        for run in runs:
            order = run.config.order
            stages = len({stage for stage, _, _ in run.scores})
            last = max(run.scores.values(), key=lambda score: score.stage, default=None)
            weights = last.model[:12] if last else "no results yet"
            done = f"{stages} of {len(order)}"
            name = str(run.folder)
            name = name if len(name) <= 48 else f"...{name[-45:]}"
            place = (_order_number(section, order), str(run.config.seed))
            rows.append((label, name, *place, done, weights))
    for number, order in enumerate(section.orders, start=1):
        notes.append(f"Order {number}: {', '.join(order)}.")
    for method in dict.fromkeys(run.config.method for run in section.runs):
        same = [run for run in section.runs if run.config.method == method]
        for key in differing_settings(same):
            values = [f"{run.folder.name} {run.settings.get(key, 'unset')}" for run in same]
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
    if section.experts:
        cells = [_score_cell(section.expert(column), column[1]) for column in columns]
        rows.append(("Expert", "", str(len(section.experts)), *cells))
    for group in groups:
        for stage in range(1, group.last_stage + 1):
            label = (group.label, f"{stage} {order[stage - 1]}", str(len(group.runs)))
            rows.append((*label, *(_group_cell(group, stage, column) for column in columns)))
    notes = [
        *(["*: learnt in that stage; -: not learnt yet; n/a: not measured."] if groups else []),
        *_measurement(section, columns),
    ]
    title = f"Scores after every stage, profile {section.profile}"
    if groups:
        title += f", order {_order_number(section, order)}: {', '.join(order)}"
    partial = any("(" in cell for row in rows for cell in row[3:])
    notes += [_PARTIAL] if partial else []
    return Table(title, tuple(header), tuple(rows), (*notes, _limits(section)), 3)


def _gains_table(section: Section, gain: str) -> Table:
    entries = section.gains(gain)
    length = max(len(entry.progress.stages) for entry in entries)
    several = any(entry.progress.mean.spread is not None for entry in entries)
    header = ["Method", "Order", "Runs", "Done", *(f"Stage {i + 1}" for i in range(length))]
    header += ["Mean", "Std", *(["Spread"] if several else [])]
    rows = []
    for entry in entries:
        found = entry.progress
        order = _order_number(section, entry.order) if entry.order else "mean"
        done = f"{found.finished}/{len(found.stages)}"
        stages = [_gain_cell(stage) for stage in found.stages]
        stages += ["-"] * (length - len(stages))
        spread = found.mean.spread
        last = [_gain_cell(found.mean), _gain_cell(found.deviation)]
        last += ["-" if spread is None else f"{spread:.2f}"] if several else []
        rows.append((entry.label, order, str(found.mean.total), done, *stages, *last))
    notes = [
        f"In % of the expert: {_MEANING[gain]}. Stage 1 counts as 100 %. Mean and Std (sample "
        "standard deviation, n - 1) are taken over the stages that are done.",
    ]
    if several:
        notes.append("Spread: sample standard deviation of Mean over runs (row `mean`: orders).")
    if any("(" in cell for row in rows for cell in row[4:]):
        notes.append(_PARTIAL)
    reasons = [reason for e in entries for mean in e.progress.stages for reason in mean.reasons]
    notes += [f"n/a: {reason}." for reason in dict.fromkeys(reasons)]
    notes += [*_measurement(section, section.all_columns), _limits(section)]
    title = f"{gain.capitalize()} Relative Gain (%), profile {section.profile}"
    return Table(title, tuple(header), tuple(rows), tuple(notes), 4)


def _group_cell(group: Group, stage: int, column: Column) -> str:
    modality, task = column
    if modality not in group.order[:stage]:
        return "- "
    newest = modality == group.order[stage - 1]
    return _score_cell(group.score(stage, column), task, "*" if newest else " ")


def _score_cell(mean: Mean, task: str, mark: str = " ") -> str:
    if mean.value is None:
        return "n/a "
    return f"{mean.value:.{_DECIMALS[task]}f}{_of_runs(mean)}{mark}"


def _gain_cell(mean: Mean) -> str:
    if mean.value is None:
        return "n/a" if mean.reasons or not mean.total else "-"
    return f"{mean.value:.2f}{_of_runs(mean)}"


def _of_runs(mean: Mean) -> str:
    return f" ({mean.runs}/{mean.total})" if mean.runs < mean.total else ""


def _measurement(section: Section, columns: Sequence[Column]) -> list[str]:
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


def _limits(section: Section) -> str:
    return f"Limits: {section.limits or 'the profile states none'}"


def _order_number(section: Section, order: tuple[str, ...]) -> str:
    orders = section.orders
    return str(orders.index(order) + 1) if order in orders else "-"


def _joined(values: Iterator[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def _score_values(section: Section) -> Iterator[dict[str, object]]:
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
        if section.experts:
            yield {**common, "table": "expert", **_mean_values(section.expert(column))}
        for group in section.groups:
            for stage in range(1, group.last_stage + 1):
                if column[0] in group.order[:stage]:
                    place = {"method": group.label, "order": ">".join(group.order), "stage": stage}
                    values = _mean_values(group.score(stage, column))
                    yield {**common, "table": "score", **place, **values}


def _gain_values(section: Section) -> Iterator[dict[str, object]]:
    entries = [(gain, row) for gain in GAINS for row in section.gains(gain) if section.experts]
    for gain, row in entries:
        place = {
            **_origin([score for column in section.all_columns for score in section.rows(column)]),
            "table": f"{gain}_gain",
            "method": row.label,
            "order": ">".join(row.order) if row.order else "mean over orders",
            "unit": "% of expert",
        }
        stages = [*enumerate(row.progress.stages, start=1)]
        summary = [("mean", row.progress.mean), ("std", row.progress.deviation)]
        for stage, mean in [*stages, *summary]:
            yield {**place, "stage": stage, **_mean_values(mean)}


def _origin(rows: Sequence[Score]) -> dict[str, object]:
    return {
        "judge": _joined(str(row.judge) for row in rows if row.judge),
        "tokenizer": _joined(str(row.tokenizer) for row in rows if row.tokenizer),
        "test_items": _joined(str(row.count) for row in rows),
    }


def _mean_values(mean: Mean) -> dict[str, object]:
    return {
        "value": "" if mean.value is None else mean.value,
        "runs": mean.runs,
        "runs_total": mean.total,
        "standard_deviation_over_runs": "" if mean.spread is None else mean.spread,
        "reason": "; ".join(dict.fromkeys(mean.reasons)),
    }
