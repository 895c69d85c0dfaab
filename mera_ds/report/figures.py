"""The figures of a report: gains over the stages (paper: Figures 2 and 3) and scores.

Readable at the width of one printed column and in grey: every method has its own marker and line.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mera_ds.report.gains import Mean
from mera_ds.report.labels import paper_labels
from mera_ds.report.results import METRICS
from mera_ds.report.summary import GAINS, Column, Section

COLUMN_INCHES = 3.5
_HALF_COLUMN = 25
"""Letters of a legend that fit beside a second column of it."""


@dataclass(frozen=True)
class Picture:
    """A figure, drawn."""

    png: bytes
    svg: bytes
    inches: float
    """Width."""


_LONG: Any = (0, (6, 1))
_MIXED: Any = (0, (4, 1, 1, 1, 1, 1))
_Style = tuple[str, Any, str]
"""Marker, line style, colour."""
_Look = tuple[*_Style, float]
"""With how far it stands aside, in stages, so that equal values don't hide each other."""
_Name = tuple[str, str]
"""Profile and label of a method."""
_Looks = dict[_Name, _Look]
_LOOKS: tuple[_Style, ...] = (
    ("o", "-", "#0072B2"),
    ("s", "--", "#D55E00"),
    ("^", "-.", "#009E73"),
    ("D", ":", "#CC79A7"),
    ("v", "-", "#E69F00"),
    ("X", "--", "#56B4E9"),
    ("P", "-.", "#000000"),
    ("*", ":", "#7F7F7F"),
    ("<", _LONG, "#003F66"),
    (">", _MIXED, "#7A3500"),
    ("p", _LONG, "#004D38"),
    ("h", _MIXED, "#7A2F5B"),
    ("d", _LONG, "#8A6100"),
    ("8", _MIXED, "#1F5F8A"),
    ("H", _LONG, "#8C1C13"),
    ("4", _MIXED, "#5B3A8E"),
)
_STYLE: dict[str, Any] = {
    "figure.dpi": 300,
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "mera-ds",
}
_RULE = "#555555"
_DOTS: Any = (0, (1, 1))
_UNITS = {"caption": "CIDEr × 100", "qa": "Accuracy"}


def gains_figure(sections: Sequence[Section]) -> Picture:
    """Draw Backward (left) and Forward (right) Relative Gain by stage, averaged over orders.

    A hollow marker is a mean over some of the runs only: the others have no value there. A method
    without a run in some order is named with those it has. Bars are the sample standard deviation
    over seeds, where a method has one order.
    """
    looks = _looks(sections)
    partial = False
    names: dict[_Name, str] = {}
    with mpl.rc_context(_rc()):
        figure = Figure(figsize=(COLUMN_INCHES, 1), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, gain in zip(panels, GAINS, strict=True):
            axes.axhline(100, color=_RULE, linewidth=0.8)
            for section in sections:
                rows = section.gains(gain) if section.experts else []
                for row in {row.label: row for row in rows}.values():
                    look = looks.get((section.profile, row.label))
                    if look is None:  # nothing is measured yet
                        continue
                    spreads = row.order is not None
                    partial |= _line(axes, row.progress.stages, look, spreads=spreads)
                    some = section.some_orders(row.label)
                    names[section.profile, row.label] = f"{row.label} ({some})" if some else ""
            _number_stages(axes, max(len(order) for s in sections for order in s.orders))
            axes.set_xlabel("Stage")
            axes.set_title(f"{gain.capitalize()} Relative Gain", loc="left")
        panels[0].set_ylabel("% of the expert")
        _finish(figure, 2.7, [*_handles(looks, partial, names), _rule("expert (100 %)", "-")])
        return _picture(figure)


def scores_figure(sections: Sequence[Section]) -> Picture:
    """Draw each test set's score over the stages: a row a modality and order, a column a task.

    Bars are the sample standard deviation over runs, where a method has several (seeds).
    """
    looks = _looks(sections)
    partial = False
    grid = [
        (section, order, modality)
        for section in sections
        for order in section.orders
        for modality in dict.fromkeys(modality for modality, _ in section.columns(order))
    ]
    last = {(section.profile, order): modality for section, order, modality in grid}
    measured = {task for section in sections for _, task in section.all_columns}
    tasks = [task for task in METRICS if task in measured]
    with mpl.rc_context(_rc()):
        figure = Figure(figsize=(COLUMN_INCHES, 1), layout="constrained")
        panels = figure.subplots(len(grid), len(tasks), squeeze=False)
        for row, (section, order, modality) in zip(panels, grid, strict=True):
            for axes, task in zip(row, tasks, strict=True):
                axes.set_visible((modality, task) in section.columns(order))
                if axes.get_visible():
                    partial |= _draw_scores(axes, section, order, (modality, task), looks)
                    axes.tick_params(labelbottom=modality == last[section.profile, order])
            first = next(axes for axes in row if axes.get_visible())
            first.set_ylabel(f"{modality}\n{first.get_ylabel()}")
            if modality == section.columns(order)[0][0]:
                first.set_title(_heading(sections, section, order), loc="left")
        for axes in panels[-1]:
            axes.set_xlabel("Stage")
        figure.align_ylabels(panels)
        handles = _handles(looks, partial, {})
        handles += [_rule("expert", "-")] if any(s.experts for s in sections) else []
        handles.append(_rule("majority class", _DOTS))
        _finish(figure, 0.3 + 1.1 * len(grid), handles)
        return _picture(figure)


def _heading(sections: Sequence[Section], section: Section, order: tuple[str, ...]) -> str:
    """Return what tells an order's panels from those of others; nothing if there is one."""
    parts = [section.profile] if len(sections) > 1 else []
    parts += [f"order {section.orders.index(order) + 1}"] if len(section.orders) > 1 else []
    return ", ".join(parts)


def _draw_scores(
    axes: Axes, section: Section, order: tuple[str, ...], column: Column, looks: _Looks
) -> bool:
    expert = section.expert(column).value if section.experts else None
    majority = section.majority(column)
    if expert is not None:
        axes.axhline(expert, color=_RULE, linewidth=0.8)
    if majority is not None:
        axes.axhline(majority, color=_RULE, linewidth=0.8, linestyle=_DOTS)
    partial = False
    for group in section.groups:
        if group.order == order and group.last_stage:
            means = [group.score(stage + 1, column) for stage in range(group.last_stage)]
            partial |= _line(axes, means, looks[section.profile, group.label])
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    _number_stages(axes, len(order))
    axes.set_ylabel(_UNITS[column[1]])
    return partial


def _line(axes: Axes, means: Sequence[Mean], look: _Look, *, spreads: bool = True) -> bool:
    """Draw means of stages 1, 2, ...; return whether any is partial (its marker is hollow)."""
    marker, style, colour, aside = look
    values = [math.nan if mean.value is None else mean.value for mean in means]
    stages = [stage + aside for stage in range(1, len(means) + 1)]
    axes.plot(stages, values, linestyle=style, color=colour)
    partial = [mean.value is not None and mean.runs < mean.total for mean in means]
    for stage, mean, value, hollow in zip(stages, means, values, partial, strict=True):
        face = "white" if hollow else colour
        axes.plot([stage], [value], marker=marker, color=colour, markerfacecolor=face)
        if spreads and mean.value is not None and mean.spread is not None:
            axes.errorbar(stage, value, mean.spread, color=colour, linewidth=0.6, capsize=1.5)
    return any(partial)


def _number_stages(axes: Axes, count: int) -> None:
    axes.set_xlim(0.7, count + 0.3)
    axes.set_xticks(range(1, count + 1))


def _handles(looks: _Looks, partial: bool, names: Mapping[_Name, str]) -> list[Line2D]:
    """Return the legend's lines; `names` says what to call a method other than its label."""
    several = len({profile for profile, _ in looks}) > 1
    handles = []
    for key, (marker, style, colour, _) in looks.items():
        name = names.get(key) or key[1]
        name = f"{key[0]}: {name}" if several else name
        handles.append(Line2D([], [], marker=marker, linestyle=style, color=colour, label=name))
    if partial:
        hollow = Line2D([], [], marker="o", linestyle="", color=_RULE, markerfacecolor="white")
        hollow.set_label("hollow: some runs only")
        handles.append(hollow)
    return handles


def _finish(figure: Figure, inches: float, handles: Sequence[Line2D]) -> None:
    """Put the legend below the panels, which are so high together."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = 2 if longest <= _HALF_COLUMN else 1
    figure.set_figheight(inches + 0.145 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def _rule(name: str, style: Any) -> Line2D:
    return Line2D([], [], color=_RULE, linewidth=0.8, linestyle=style, label=name)


def _rc() -> Any:
    """Return our settings over matplotlib's own defaults, whatever the user's matplotlibrc says."""
    return {**mpl.rcParamsDefault, **_STYLE}


def _looks(sections: Sequence[Section]) -> _Looks:
    """Return marker, line style and colour by (profile, label).

    A method of the paper has the same look in every figure of every report; others take the looks
    that are left.
    """
    shown = [(s.profile, group) for s in sections for group in s.groups if group.last_stage]
    names = dict.fromkeys((profile, group.label) for profile, group in shown)
    fixed = dict(zip(paper_labels(), _LOOKS, strict=False))
    styles: dict[_Name, _Style] = {}
    for profile, label in names:
        if label in fixed and fixed[label] not in styles.values():
            styles[profile, label] = fixed[label]
    free = [style for style in _LOOKS if style not in fixed.values()]
    free += [style for style in fixed.values() if style not in styles.values()]
    left = itertools.cycle(free)
    step = min(0.06, 0.4 / len(names)) if names else 0.0
    return {
        name: (*(styles.get(name) or next(left)), step * (place - (len(names) - 1) / 2))
        for place, name in enumerate(names)
    }


def _picture(figure: Figure) -> Picture:
    """Render without a software version or date: the same numbers give the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(svg, metadata=nothing)
    return Picture(png.getvalue(), svg.getvalue(), figure.get_figwidth())
