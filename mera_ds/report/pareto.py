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
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot([p.old for p in best], [p.new for p in best], "-", color="#0072B2", linewidth=1)
        for number, (place, names) in enumerate(_places(points).items(), start=1):
            on_front = place in {(point.old, point.new) for point in best}
            face = "#0072B2" if on_front else "white"
            label = f"{number}  {', '.join(names)}"
            axes.plot(*place, "o", ms=4, color="#0072B2", markerfacecolor=face, label=label)
            axes.annotate(str(number), place, (4, 3), textcoords="offset points", fontsize=6)
        axes.plot(chosen.old, chosen.new, "o", ms=9, color="#D55E00", markerfacecolor="none")
        axes.set_xlabel("mean loss of the earlier modalities (per token)")
        axes.set_ylabel(f"loss of {newest} (per token)")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.08)
        figure.legend(loc="outside right center", frameon=False, handlelength=0.8)
        target = io.BytesIO()
        FigureCanvasAgg(figure).print_png(target, metadata={"Software": None})
    return target.getvalue()


def _places(points: Sequence[Point]) -> dict[tuple[float, float], list[str]]:
    """Return the names of the points at each place, by rising loss of the earlier modalities."""
    found: dict[tuple[float, float], list[str]] = {}
    for point in sorted(points, key=lambda point: (point.old, point.new)):
        found.setdefault((point.old, point.new), []).append(point.name)
    return found
