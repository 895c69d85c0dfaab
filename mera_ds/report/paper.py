"""The paper's Tables 2 to 5, for our runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mera_ds.report.costs import Cost
from mera_ds.report.gains import Mean, Progress
from mera_ds.report.labels import ABLATION, method_rank, plain_method
from mera_ds.report.parameters import run_parameters
from mera_ds.report.render import Table
from mera_ds.report.summary import Group, Section, differing_settings
from mera_ds.report.tables import PARTIAL, limits_note, measurement_notes, of_runs

_BACKWARD = (
    "Backward Relative Gain in %: mean over the modalities learnt before a stage of S/S_expert, of "
    "the same seed where there is such an expert. Mean and Std (sample standard deviation, n - 1) "
    "over the stages that are done; stage 1 counts as 100 %. Several runs of a method (seeds): "
    "Mean ± their sample standard deviation."
)


def paper_tables(section: Section, costs: Mapping[Path, Cost]) -> list[Table]:
    """Return those of Tables 2, 3, 4 and 5 that the section's runs give something for.

    Args:
        section: the runs of one profile.
        costs: what each of them took.
    """
    tables = []
    if section.groups and section.experts:
        tables.append(_gains(section, section.groups, "Table 2", "Backward Relative Gain"))
    tables.append(_overheads(section, costs))
    if section.groups and section.experts:
        ablation = [group for name in ABLATION for group in section.groups if group.method == name]
        if len({group.method for group in ablation}) > 1:
            title = "what merging and realigning add"
            tables.append(_gains(section, ablation, "Table 4", title))
        if pairs := _realigned(section.groups):
            tables.append(_improvements(section, pairs))
    return tables


_UNEQUAL = (
    "n/a: with and without realigning not measured over the same stages, or with no seed alike."
)
_SEEDS = "What realigning adds is measured over the seeds that were run with and without it."
_NOTHING = ("-", "+0.00", "-0.00")
_RANKS = "Best of a column in bold, second best underlined."
_BETTER = "In bold what realigning improves: a higher mean, a lower deviation."
_COUNTS = ("Trained\nM", "Added\nM")
_GENERATION = ("Generation\nGB", "Generation\ns/text", "Generation\nms/token")
Rows = Mapping[str, Mapping[tuple[str, ...], Progress]]
"""Backward gain by label and order."""


def _progress(groups: Sequence[Group]) -> dict[str, dict[tuple[str, ...], Progress]]:
    found: dict[str, dict[tuple[str, ...], Progress]] = {}
    for group in groups:
        found.setdefault(group.label, {})[group.order] = group.progress("backward")
    return found


def _gains(section: Section, groups: Sequence[Group], paper: str, title: str) -> Table:
    found = _progress(groups)
    orders = [order for order in section.orders if any(order in row for row in found.values())]
    rows = [
        (label, *(cell for order in orders for cell in _cells(by_order.get(order))))
        for label, by_order in found.items()
    ]
    best, second = set(), set()
    for place, order in enumerate(orders):
        for column, figure, sign in ((1, "mean", 1), (2, "deviation", -1)):
            first, next_best = _ranked(found, order, figure, sign)
            best |= {(row, column + 2 * place) for row in first}
            second |= {(row, column + 2 * place) for row in next_best}
    means = [entry.mean for by_order in found.values() for entry in by_order.values()]
    partial = [PARTIAL] if any(0 < mean.runs < mean.total for mean in means) else []
    notes = (_BACKWARD, *partial, *_order_notes(section, orders), *_origin(section))
    return Table(
        f"{title} (%), profile {section.profile}",
        ("Method", *_headers(section, orders)),
        tuple(rows),
        notes,
        1,
        frozenset(best),
        frozenset(second),
        _RANKS,
        paper,
    )


def _ranked(
    found: Rows, order: tuple[str, ...], figure: str, sign: int
) -> tuple[list[int], list[int]]:
    """Return the rows with the best and with the second-best value, of those that got furthest.

    Args:
        found: the rows.
        order: whose.
        figure: `mean` or `deviation`.
        sign: 1 if more is better, -1 if less is.
    """
    there = {row: by[order] for row, by in enumerate(found.values()) if order in by}
    furthest = max((entry.finished for entry in there.values()), default=0)
    means: dict[int, Mean] = {row: getattr(entry, figure) for row, entry in there.items()}
    values = {
        row: sign * round(means[row].value or 0.0, 2)
        for row, entry in there.items()
        if entry.finished == furthest and means[row].value is not None
    }
    if len(values) < 2:
        return [], []
    best, second = [*sorted(set(values.values()), reverse=True), None][:2]
    ranked = [[row for row, value in values.items() if value == rank] for rank in (best, second)]
    return ranked[0], ranked[1]


def _cells(entry: Progress | None) -> tuple[str, str]:
    if entry is None:
        return "-", "-"
    spread = entry.mean.spread
    seeds = "" if spread is None else f" ± {spread:.2f}"
    stages = len(entry.stages)
    part = "" if entry.finished == stages else f" ({entry.finished} of {stages} stages)"
    some = of_runs(entry.mean) if entry.mean.runs else ""
    return f"{_number(entry.mean.value)}{seeds}{some}{part}", _number(entry.deviation.value)


def _number(value: float | None, form: str = ".2f") -> str:
    return "n/a" if value is None else f"{value:{form}}"


def _headers(section: Section, orders: Sequence[tuple[str, ...]]) -> list[str]:
    names = [f"Order {section.orders.index(order) + 1}" for order in orders]
    return [f"{name}\n{figure}" for name in names for figure in ("Mean", "Std")]


def _order_notes(section: Section, orders: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"Order {section.orders.index(order) + 1}: {', '.join(order)}." for order in orders]


def _origin(section: Section) -> list[str]:
    return [*measurement_notes(section, section.all_columns), limits_note(section)]


def _overheads(section: Section, costs: Mapping[Path, Cost]) -> Table:
    header = ("Method", "Runs", *_COUNTS, "Training\nGB", "Training\nhours", *_GENERATION)
    labels = dict.fromkeys(group.label for group in section.groups)
    members = [
        (label, [run for group in section.groups if group.label == label for run in group.runs])
        for label in labels
    ]
    members += [("Expert", list(section.experts))] if section.experts else []
    rows = []
    for label, runs in members:
        found = [costs[run.folder] for run in runs]
        counts = [run_parameters(run) for run in runs]
        rows.append(
            (
                label,
                str(len(runs)),
                _millions([count.trained for count in counts]),
                _millions([count.added for count in counts]),
                _number(_largest([cost.train_memory_gb for cost in found])),
                _number(_mean([cost.train_hours for cost in found]), ".3g"),
                _number(_largest([cost.generate_memory_gb for cost in found])),
                _number(_mean([cost.generate_seconds for cost in found]), ".3g"),
                _number(_mean([cost.token_milliseconds for cost in found]), ".3g"),
            )
        )
    everything = [costs[run.folder] for run in section.runs]
    sizes = sorted({size for cost in everything for size in cost.batch_sizes})
    batches = " / ".join(map(str, sizes)) or "evaluate.batch_size"
    machines = dict.fromkeys(m for run in section.runs for m in costs[run.folder].hardware)
    notes = (
        "Trained: most parameters that one step trains, in millions. Added: what the newest model "
        "has beside base and encoders, which is its connectors, and deltas and gates if they are "
        "woven; other deltas fold into the base.",
        "GB (1e9 bytes): largest of all steps on one rank, GPU memory or on a CPU resident memory. "
        "Hours: all training steps and measurements of Fisher information, clock time times ranks, "
        "mean over runs; steps taken over from another run count as if done again. n/a: not "
        "recorded.",
        f"Generation: in batches of {batches} texts, with the encoding of media and prompts; for "
        "the latency at batch 1, evaluate with evaluate.batch_size=1.",
        f"Hardware: {'; '.join(machines) or 'not recorded'}.",
        limits_note(section),
    )
    title = f"training and inference overheads, profile {section.profile}"
    return Table(title, header, tuple(rows), notes, 1, paper="Table 3")


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _millions(counts: Sequence[int | None]) -> str:
    most = _largest(counts)
    return _number(None if most is None else most / 1e6, ".3g")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _realigned(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Return each group with realigning, of the same order beside the likest without.

    The likest is that with the fewest settings that differ.
    """
    pairs = []
    for realigned in groups:
        plain = plain_method(realigned.method)
        found = [g for g in groups if g.method == plain and g.order == realigned.order]
        unlike = [len(differing_settings([g.runs[0], realigned.runs[0]])) for g in found]
        nearest = [g for g, count in zip(found, unlike, strict=True) if count == min(unlike)]
        if len(nearest) == 1:
            pairs.append((nearest[0], realigned))
    return sorted(pairs, key=lambda pair: method_rank(pair[0].method))


def _improvements(section: Section, pairs: Sequence[tuple[Group, Group]]) -> Table:
    used = [group.order for group, _ in pairs]
    orders = [order for order in section.orders if order in used]
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for label in dict.fromkeys(plain.label for plain, _ in pairs):
        same = [(plain, realigned) for plain, realigned in pairs if plain.label == label]
        before = {plain.order: plain.progress("backward") for plain, _ in same}
        rows.append((label, *(cell for order in orders for cell in _cells(before.get(order)))))
        for name in dict.fromkeys(realigned.label for _, realigned in same):
            by_order = {pair[1].order: pair for pair in same if pair[1].label == name}
            changes = [_changes(by_order.get(order)) for order in orders]
            cells = [cell for pair in changes for cell in pair]
            better = {
                place
                for place, cell in enumerate(cells)
                if cell[0] == "+-"[place % 2] and cell not in _NOTHING
            }
            best |= {(len(rows), 1 + place) for place in better}
            rows.append((f"+ Realigning: {name}", *cells))
    seeds = [_SEEDS] if any(plain.seeds != realigned.seeds for plain, realigned in pairs) else []
    unequal = [_UNEQUAL] if any("n/a" in cell for row in rows for cell in row) else []
    notes = (_BACKWARD, *seeds, *unequal, *_order_notes(section, orders), *_origin(section))
    title = f"realigning after any method (%), profile {section.profile}"
    header = ("Method", *_headers(section, orders))
    return Table(
        title, header, tuple(rows), notes, 1, frozenset(best), marks=_BETTER, paper="Table 5"
    )


def _changes(pair: tuple[Group, Group] | None) -> tuple[str, str]:
    """Return what realigning adds to mean and deviation, over equally many stages.

    Of runs with several seeds, over the seeds that both have.
    """
    if pair is None:
        return "-", "-"
    seeds = pair[0].seeds & pair[1].seeds
    before, after = (group.part([run.config.seed in seeds for run in group.runs]) for group in pair)
    if before is None or after is None:
        return "n/a", "n/a"
    plain, realigned = before.progress("backward"), after.progress("backward")
    if plain.finished != realigned.finished:
        return "n/a", "n/a"
    pairs = ((plain.mean, realigned.mean), (plain.deviation, realigned.deviation))
    cells = [
        "n/a" if one.value is None or two.value is None else f"{two.value - one.value:+.2f}"
        for one, two in pairs
    ]
    return cells[0], cells[1]
