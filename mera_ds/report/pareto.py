"""The figure of a merge sweep: loss of earlier modalities against loss of the newest."""

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mera_ds.evaluate.pareto import Point, front


def pareto_figure(points: Sequence[Point], chosen: Point, title: str) -> bytes:
    """Draw all points as PNG: those on the front joined, the chosen one ringed.

    Args:
        points: what was tried.
        chosen: one of them.
        title: e.g. the run and the stage.
    """
    best = front(points)
    newest = list(chosen.losses)[-1]
    with mpl.rc_context({**mpl.rcParamsDefault, "font.size": 7, "figure.dpi": 200}):
        figure = Figure(figsize=(5.0, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([p.old for p in best], [p.new for p in best], "-", color="#0072B2", linewidth=1)
        for point in points:
            on_front = point in best
            face = "#0072B2" if on_front else "white"
            axes.plot(point.old, point.new, "o", ms=4, color="#0072B2", markerfacecolor=face)
            axes.annotate(
                point.name, (point.old, point.new), (3, 3), textcoords="offset points", fontsize=6
            )
        axes.plot(chosen.old, chosen.new, "o", ms=9, color="#D55E00", markerfacecolor="none")
        axes.set_xlabel("mean loss of the earlier modalities (per token)")
        axes.set_ylabel(f"loss of {newest} (per token)")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.12)
        target = io.BytesIO()
        FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
    return target.getvalue()
