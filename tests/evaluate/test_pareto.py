"""The Pareto front of a merge sweep."""

from mera_ds.evaluate.pareto import Point, choose, front
from mera_ds.report.pareto import pareto_figure


def point(name: str, *losses: float) -> Point:
    return Point(name, None, dict(zip(("image", "video", "audio"), losses, strict=True)))


POINTS = [
    point("old", 1.0, 1.2, 3.0),
    point("beaten", 1.4, 1.4, 2.5),
    point("balanced", 1.2, 1.2, 1.5),
    point("worst", 4.0, 4.0, 4.0),
    point("new", 2.0, 2.2, 1.0),
]


def test_old_is_the_mean_of_the_earlier_modalities() -> None:
    assert (POINTS[0].old, POINTS[0].new) == (1.1, 3.0)
    assert abs(POINTS[0].mean - 5.2 / 3) < 1e-12


def test_the_front_holds_what_no_other_beats() -> None:
    assert [entry.name for entry in front(POINTS)] == ["old", "balanced", "new"]


def test_equal_points_are_both_on_it() -> None:
    twin = point("twin", 1.2, 1.2, 1.5)
    assert {"balanced", "twin"} <= {entry.name for entry in front([*POINTS, twin])}


def test_every_modality_counts_the_same_in_the_choice() -> None:
    assert choose(POINTS).name == "balanced"


def test_the_figure_is_the_same_to_the_byte() -> None:
    figure = pareto_figure(POINTS, choose(POINTS), "a run")
    assert figure.startswith(b"\x89PNG\r\n\x1a\n")
    assert pareto_figure(POINTS, choose(POINTS), "a run") == figure
