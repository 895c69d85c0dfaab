"""The table and the figure of `mera-ds diagnose`. Imports no torch."""

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mera_ds.evaluate.findings import Finding
from mera_ds.report.figures import COLUMN_INCHES
from mera_ds.report.render import Table


@dataclass(frozen=True)
class Scale:
    """What the figures of a diagnosis are."""

    file: str
    """Name of the files, without ending."""
    axis: str
    note: str
    digits: int


LOSSES = Scale("diagnosis", "loss per token", "Loss per supervised token on the test set.", 3)
SCORES = Scale(
    "diagnosis-scores",
    "score lost, %",
    "Share of the modality's score when learnt that is lost, in %: 100 - mean over its tests of "
    "S/S_learnt.",
    1,
)
_NOTES = (
    "(a) backbone of the stage, connector as learnt; (b) both of the stage; (c) both as learnt. "
    "Lost = a - c, misaligned = a - b, forgotten = b - c.",
    "Drift: change of the linear layers' weights since the modality was learnt, relative to their "
    "norm; cosine of the hidden states with those of (c). Means over the blocks.",
)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", "-", "--")


def diagnosis_table(findings: Sequence[Finding], title: str, scale: Scale = LOSSES) -> Table:
    """Return one row per stage and modality learnt until then."""
    header = ("Stage", "Modality", "(a)", "(b)", "(c)", "Lost", "Misaligned", "Forgotten")
    rows = [
        (
            str(entry.stage),
            entry.modality,
            *(f"{value:.{scale.digits}f}" for value in _measured(entry)),
            f"{entry.old_connector - entry.when_learnt:+.{scale.digits}f}",
            f"{entry.misalignment:+.{scale.digits}f}",
            f"{entry.forgetting:+.{scale.digits}f}",
            f"{100 * _mean(entry.weight_drift):.2f} %" if entry.weight_drift else "n/a",
            f"{_mean(entry.cosines):.3f}",
        )
        for entry in findings
    ]
    notes = (f"{scale.note} {_NOTES[0]}", *_NOTES[1:])
    return Table(title, (*header, "Drift", "Cosine"), tuple(rows), notes, labels=2)


def _measured(entry: Finding) -> tuple[float, float, float]:
    return entry.old_connector, entry.newest_connector, entry.when_learnt


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def diagnosis_figure(findings: Sequence[Finding], title: str, scale: Scale = LOSSES) -> bytes:
    """Draw as PNG what each old modality has lost by stage, and the drift block by block.

    One printed column wide.
    """
    last = max(entry.stage for entry in findings)
    newest = [entry for entry in findings if entry.stage == last and entry.learnt_at < last]
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 7, "figure.dpi": 300}):
        folded = all(entry.weight_drift for entry in newest)
        rows = 3 if folded else 2
        figure = Figure(figsize=(COLUMN_INCHES, 0.4 + 1.6 * rows), layout="constrained")
        lost, states, *others = figure.subplots(rows, 1)
        later = [entry for entry in findings if entry.learnt_at < entry.stage]
        _draw_lost(lost, later, scale.axis)
        cosines = {entry.modality: list(entry.cosines) for entry in newest}
        _draw_blocks(states, cosines, "cosine of\nhidden states")
        for weights in others:
            drifts = {e.modality: [100 * value for value in e.weight_drift] for e in newest}
            _draw_blocks(weights, drifts, "change of weights\nsince learnt, %")
        (states, *others)[-1].set_xlabel(f"block, at stage {last}")
        for axes in (lost, states):
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        for axes in (lost, states, *others):
            axes.spines[["top", "right"]].set_visible(False)
        figure.align_ylabels()
        figure.suptitle(title, x=0.01, ha="left", fontsize=7)
        target = io.BytesIO()
        FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
    return target.getvalue()


def _draw_lost(axes: Axes, findings: Sequence[Finding], label: str) -> None:
    """Draw two bars per old modality and stage, which add up to what it has lost."""
    names = [f"{entry.modality}\nstage {entry.stage}" for entry in findings]
    places = range(len(findings))
    for shift, part, colour, values in (
        (-0.2, "misaligned", "#B3B3B3", [entry.misalignment for entry in findings]),
        (0.2, "forgotten", "#404040", [entry.forgetting for entry in findings]),
    ):
        axes.bar([place + shift for place in places], values, 0.4, label=part, color=colour)
    axes.axhline(0, color="#555555", linewidth=0.6)
    crowded = len(names) * max((len(entry.modality) for entry in findings), default=0) > 48
    axes.set_xticks(list(places), names, rotation=90 if crowded else 0)
    axes.set_ylabel(label)


def _draw_blocks(axes: Axes, lines: Mapping[str, Sequence[float]], label: str) -> None:
    looks = itertools.cycle(zip(COLOURS, LINES, strict=True))
    for (name, values), (colour, line) in zip(lines.items(), looks, strict=False):
        places = range(1, len(values) + 1)
        axes.plot(places, values, line, color=colour, label=name, linewidth=1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
