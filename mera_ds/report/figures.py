"""The figures of a report: gains over the stages (paper: Figures 2 and 3) and scores.

Readable at the width of one printed column and in grey: every method has its own marker and line.
"""

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mera_ds.report.gains import Mean
from mera_ds.report.results import METRICS
from mera_ds.report.summary import GAINS, Column, Section

COLUMN_INCHES = 3.5
PAGE_INCHES = 7.0


@dataclass(frozen=True)
class Picture:
    """A figure, drawn."""

    png: bytes
    svg: bytes
    inches: float
    """Width."""


_LONG: Any = (0, (6, 1))
_MIXED: Any = (0, (4, 1, 1, 1, 1, 1))
_Look = tuple[str, Any, str]
"""Marker, line style, colour."""
_Looks = dict[tuple[str, str], _Look]
_LOOKS: tuple[_Look, ...] = (
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
_UNITS = {"caption": "CIDEr × 100", "qa": "Accuracy (0 to 1)"}


def gains_figure(sections: Sequence[Section]) -> Picture:
    """Draw Backward (left) and Forward (right) Relative Gain by stage, averaged over orders.

    A hollow marker is a mean over some of the runs only: the others have no value there. Bars are
    the sample standard deviation over orders, or over seeds where there is one order.
    """
    looks = _looks(sections)
    partial = False
    with mpl.rc_context(_rc()):
        figure = Figure(figsize=(COLUMN_INCHES, 2.3 + 0.13 * len(looks)), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, gain in zip(panels, GAINS, strict=True):
            axes.axhline(100, color=_RULE, linewidth=0.8, linestyle=_DOTS)
            for section in sections:
                rows = section.gains(gain) if section.experts else []
                for label, progress in {row.label: row.progress for row in rows}.items():
                    look = looks[section.profile, label]
                    partial |= _line(axes, progress.stages, look)
                    _spreads(axes, progress.stages, look)
            _number_stages(axes, max(len(order) for s in sections for order in s.orders))
            axes.set_xlabel("Stage")
            axes.set_title(f"{gain.capitalize()} Relative Gain", loc="left")
        panels[0].set_ylabel("% of the expert")
        figure.legend(
            handles=[*_handles(looks, partial), _rule("expert (100 %)", _DOTS)],
            loc="outside lower center",
            ncols=2,
        )
        return _picture(figure)


def scores_figure(sections: Sequence[Section]) -> Picture:
    """Draw each test set's score over the stages: a column a modality, a row a task and order.

    Bars are the sample standard deviation over runs, where a method has several (seeds).
    """
    looks = _looks(sections)
    partial = False
    grid = [
        (section, order, task)
        for section in sections
        for order in section.orders
        for task in METRICS
        if any(name == task for _, name in section.columns(order))
    ]
    width = max(order.index(s.columns(order)[-1][0]) + 1 for s, order, _ in grid)
    with mpl.rc_context(_rc()):
        inches = min(PAGE_INCHES, max(COLUMN_INCHES, PAGE_INCHES / 4 * width))
        size = (inches, 0.7 + 1.3 * len(grid) + 0.13 * (len(looks) // 4))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(grid), width, squeeze=False)
        for row, (section, order, task) in zip(panels, grid, strict=True):
            for axes, modality in itertools.zip_longest(row, order[:width]):
                axes.set_visible((modality, task) in section.columns(order))
                if axes.get_visible():
                    partial |= _draw_scores(axes, section, order, (modality, task), looks)
            which = f"{section.profile}, " if len(sections) > 1 else ""
            several = len(section.orders) > 1
            which += f"order {section.orders.index(order) + 1}\n" if several else ""
            row[0].set_ylabel(f"{which}{_UNITS[task]}")
        for axes in panels[-1]:
            axes.set_xlabel("Stage")
        handles = _handles(looks, partial)
        handles += [_rule("expert", "-")] if any(s.experts for s in sections) else []
        handles.append(_rule("majority class", _DOTS))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * width))
        return _picture(figure)


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
        if group.order == order:
            means = [group.score(stage + 1, column) for stage in range(group.last_stage)]
            look = looks[section.profile, group.label]
            partial |= _line(axes, means, look)
            _spreads(axes, means, look)
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    _number_stages(axes, len(order))
    axes.set_title(column[0], loc="left")
    return partial


def _line(axes: Axes, means: Sequence[Mean], look: _Look) -> bool:
    """Draw means of stages 1, 2, ...; return whether any is partial (its marker is hollow)."""
    marker, style, colour = look
    values = [math.nan if mean.value is None else mean.value for mean in means]
    stages = range(1, len(means) + 1)
    axes.plot(stages, values, linestyle=style, color=colour)
    partial = [mean.value is not None and mean.runs < mean.total for mean in means]
    for stage, value, hollow in zip(stages, values, partial, strict=True):
        face = "white" if hollow else colour
        axes.plot([stage], [value], marker=marker, color=colour, markerfacecolor=face)
    return any(partial)


def _spreads(axes: Axes, means: Sequence[Mean], look: _Look) -> None:
    """Draw the standard deviation of what was averaged (seeds, orders) as bars, if it is known."""
    for stage, mean in enumerate(means, start=1):
        if mean.value is not None and mean.spread is not None:
            axes.errorbar(stage, mean.value, mean.spread, color=look[2], linewidth=0.6, capsize=1.5)


def _number_stages(axes: Axes, count: int) -> None:
    axes.set_xlim(0.7, count + 0.3)
    axes.set_xticks(range(1, count + 1))


def _handles(looks: _Looks, partial: bool) -> list[Line2D]:
    several = len({profile for profile, _ in looks}) > 1
    handles = []
    for (profile, label), (marker, style, colour) in looks.items():
        name = f"{profile}: {label}" if several else label
        handles.append(Line2D([], [], marker=marker, linestyle=style, color=colour, label=name))
    if partial:
        hollow = Line2D([], [], marker="o", linestyle="", color=_RULE, markerfacecolor="white")
        hollow.set_label("hollow: some runs only")
        handles.append(hollow)
    return handles


def _rule(name: str, style: Any) -> Line2D:
    return Line2D([], [], color=_RULE, linewidth=0.8, linestyle=style, label=name)


def _rc() -> Any:
    """Return our settings over matplotlib's own defaults, whatever the user's matplotlibrc says."""
    return {**mpl.rcParamsDefault, **_STYLE}


def _looks(sections: Sequence[Section]) -> _Looks:
    """Return marker, line style and colour by (profile, label), the same in both figures."""
    names = dict.fromkeys((s.profile, group.label) for s in sections for group in s.groups)
    return {name: _LOOKS[number % len(_LOOKS)] for number, name in enumerate(names)}


def _picture(figure: Figure) -> Picture:
    """Render without a software version or date: the same numbers give the same bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(svg, metadata=nothing)
    return Picture(png.getvalue(), svg.getvalue(), figure.get_figwidth())
