"""Confidence intervals: of the scores that are reported, paired, and the same every time."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mera_ds.files import write_json
from mera_ds.report import bootstrap, write_report
from mera_ds.report.bootstrap import interval, resample
from mera_ds.report.intervals import Intervals
from mera_ds.report.results import read_runs
from mera_ds.report.summary import Section, summarise

MakeRun = Callable[..., Path]


def store_items(folder: Path) -> None:
    """Write for every score items whose mean it is; hard ones are hard for every model."""
    (run,) = read_runs([folder])
    for stage in {score.stage for score in run.scores.values()}:
        items: dict[str, dict[str, float]] = {}
        for (at, modality, task), score in run.scores.items():
            generator = random.Random(f"{modality} {task}")
            weights = [generator.random() for _ in range(score.count)]
            mean = sum(weights) / len(weights)
            if at == stage:
                named = {f"{n}": score.score * weight / mean for n, weight in enumerate(weights)}
                items[f"{modality}/{task}"] = named
        name = next(s.stage_modality for s in run.scores.values() if s.stage == stage)
        path = folder / "stages" / f"{stage:02d}-{name}" / "evaluation" / "per_item.json"
        write_json(path, {"schema": 1, "key": "", "items": items})


@pytest.fixture
def folders(make_run: MakeRun) -> list[Path]:
    folders = [make_run("experts", "expert"), make_run("mera", "mera")]
    for folder in folders:
        store_items(folder)
    return folders


@pytest.fixture
def section(folders: list[Path]) -> Section:
    (section,) = summarise(read_runs(folders))
    return section


def test_scores_lie_inside_and_are_spread_as_theory_says(section: Section) -> None:
    (group,) = section.groups
    (run,) = group.runs
    values = resample([run]).scores[str(run.folder), (2, "image", "qa")]
    score = run.scores[2, "image", "qa"].score
    found = interval(values)
    assert found.low < score < found.high
    deviation = score / 3**0.5 / 1000**0.5  # of items between 0 and twice the mean
    assert np.std(values) == pytest.approx(deviation, rel=0.1)


def test_what_is_hard_for_all_cancels_in_a_gain(section: Section) -> None:
    """The items here are in one proportion for expert and method, so the gain does not move."""
    (group,) = section.groups
    intervals = Intervals(section)
    for gain in ("backward", "forward"):
        expected = group.progress(gain)
        for stage, mean in enumerate(expected.stages, start=1):
            found = intervals.gain([group], gain, stage)
            assert found is not None
            assert (found.low, found.high) == pytest.approx((mean.value, mean.value), rel=1e-4)
        whole = intervals.mean_gain([group], gain, 4)
        assert whole is not None
        assert whole.low == pytest.approx(expected.mean.value, rel=1e-4)


def test_the_interval_of_a_mean_is_that_of_the_runs_that_got_furthest(
    folders: list[Path], make_run: MakeRun
) -> None:
    """Also over orders: one that has not got so far is in neither."""
    folders.append(make_run("weak", "mera", seed=1, scale=0.5, stages=2))
    folders.append(make_run("reverse", "mera", order="reverse", stages=3))
    for folder in folders[-2:]:
        store_items(folder)
    (section,) = summarise(read_runs(folders))
    whole = section.gains("backward")[-1]
    assert whole.order is None
    found = Intervals(section).mean_gain(whole.groups, "backward", whole.progress.finished)
    assert found is not None
    assert found.low == pytest.approx(whole.progress.mean.value, rel=1e-4)


def test_every_seed_is_divided_by_its_expert(folders: list[Path], make_run: MakeRun) -> None:
    folders.append(make_run("experts-1", "expert", seed=1, scale=0.8))
    folders.append(make_run("mera-1", "mera", seed=1, scale=0.4))
    for folder in folders[-2:]:
        store_items(folder)
    (section,) = summarise(read_runs(folders))
    (group,) = section.groups
    found = Intervals(section).gain([group], "backward", 4)
    assert found is not None
    assert found.low == pytest.approx(0.75 * 102.17, abs=0.01)
    assert group.progress("backward").stages[3].value == pytest.approx(found.low, rel=1e-4)


def test_missing_items_count_for_nothing() -> None:
    draws = np.array([[2, 0, 1], [0, 1, 2]], dtype=np.float32)
    assert bootstrap._means(draws, [1.0, 0.0, None]).tolist() == [1.0, 0.0]


def test_the_report_shows_them_and_is_the_same_every_time(
    folders: list[Path], tmp_path: Path
) -> None:
    one, two = (write_report(folders, tmp_path / name) for name in ("one", "two"))
    assert one.text == two.text
    assert "101.00  101.00 to 101.00" in one.text
    assert "95.86 [95.9, 95.9]" in one.text
    lines = (tmp_path / "one" / "tables.csv").read_text(encoding="utf-8").splitlines()
    place = lines[0].split(",").index("low95")
    scores = [line.split(",") for line in lines if line.startswith("score,")]
    assert all(float(cells[place]) < float(cells[place + 1]) for cells in scores)
