"""`write_report` from run folders to files: tables, figures, and runs that don't fit together."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mera_ds.config import EvaluateConfig
from mera_ds.errors import InputError
from mera_ds.evaluate.predictions import WITHOUT_MEDIA
from mera_ds.report import write_report
from mera_ds.report.render import WIDTH, Table, to_text
from mera_ds.report.results import read_runs
from mera_ds.report.summary import summarise

MakeRun = Callable[..., Path]
SCORES = "Tables 9 and 10: scores after every stage, profile pocket, order 1"


def line_of(text: str, *words: str) -> list[str]:
    """Return the cells of the only line that starts with these words."""
    (line,) = [each for each in text.splitlines() if each.split()[: len(words)] == list(words)]
    return line.split()


def table_of(text: str, title: str) -> str:
    """Return the part of a report from a title to the next empty line."""
    return text[text.index(title) :].split("\n\n")[0]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a report's CSV."""
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_the_report_gives_the_paper_s_numbers(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert")]
    runs += [make_run(f"mera-{order}", "mera", order=order) for order in ("sequential", "reverse")]
    runs += [make_run("finetune", "finetune", "finetune")]
    report = write_report(runs, tmp_path / "out")
    scores = table_of(
        report.text, "Tables 9 and 10: scores after every stage, profile pocket, order 1"
    )
    assert line_of(scores, "Expert")[2:4] == ["100.76", "0.358"]
    assert line_of(scores, "Majority")[2:4] == ["-", "0.125"]
    assert line_of(scores, "Test")[2:4] == ["1000", "1000"]
    stage = line_of(scores, "MERA(10%)", "2")
    assert stage[4:] == ["98.30", "0.340", "152.20*", "0.579*", "-", "-", "-", "-"]
    gains = table_of(report.text, "Backward Relative Gain by")
    assert line_of(gains, "MERA(10%)", "1")[4:] == (
        ["100.00", "96.27", "105.57", "102.17", "101.00", "-", "3.90", "-"]
    )
    assert line_of(gains, "MERA(10%)", "mean")[4:8] == ["100.00", "92.15", "96.85", "99.84"]
    assert line_of(gains, "Fine-Tuning", "1")[8:] == ["59.76", "-", "27.23", "-"]


def test_every_table_says_how_it_was_measured(make_run: MakeRun, tmp_path: Path) -> None:
    report = write_report([make_run("experts", "expert"), make_run("mera", "mera")], tmp_path / "o")
    blocks = report.text.split("\n\n")
    for title in ("Tables 9 and", "Backward Relative Gain by", "Forward Relative Gain by"):
        (position,) = [i for i, block in enumerate(blocks) if block.strip().startswith(title)]
        notes = blocks[position + 1]
        for fact in ("CIDEr x 100", "ptb-python", "offline-exact", "1000 test items", "A test pro"):
            assert fact in notes
    assert max(map(len, report.text.splitlines())) <= WIDTH


def test_files_are_complete_and_the_same_every_time(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert"), make_run("mera", "mera")]
    first, second = (write_report(runs, tmp_path / name) for name in ("one", "two"))
    names = sorted(path.name for path in (tmp_path / "one").iterdir() if path.is_file())
    assert names == sorted(first.files)
    assert {"gains.svg", "report.html", "report.md", "scores.png", "tables.tex"} <= set(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert first.text == second.text
    with Image.open(first.folder / "gains.png") as image:
        assert image.width == 1050
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    markdown = (first.folder / "report.md").read_text(encoding="utf-8")
    assert "](gains.png)" in markdown
    assert "| MERA(10%) | 4 pointcloud | 1 | 98.05+ | 0.338 |" in markdown


def test_tensorboard_shows_the_gains(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert"), make_run("mera", "mera")]
    for _ in range(2):  # the second replaces the first
        write_report(runs, tmp_path / "o")
    (folder,) = (tmp_path / "o" / "tensorboard").iterdir()
    assert folder.name == "pocket, MERA(10%), order 1"
    board = EventAccumulator(str(folder))
    board.Reload()
    events = board.Scalars("backward_relative_gain/percent")
    assert [(event.step, round(event.value, 2)) for event in events] == [
        *((1, 100.0), (2, 96.27), (3, 105.57), (4, 102.17)),
    ]


def test_a_run_is_no_place_for_a_report(make_run: MakeRun) -> None:
    run = make_run("mera", "mera")
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "losses").write_text("kept")
    with pytest.raises(InputError, match="is a run, whose TensorBoard would be lost"):
        write_report([run], run)
    assert (run / "tensorboard" / "losses").read_text() == "kept"


def test_csv_holds_unrounded_values(make_run: MakeRun, tmp_path: Path) -> None:
    report = write_report([make_run("experts", "expert"), make_run("mera", "mera")], tmp_path / "o")
    rows = read_csv(report.folder / "tables.csv")
    gains = {row["stage"]: row for row in rows if row["table"] == "backward_gain"}
    assert float(gains["mean"]["value"]) == pytest.approx(101.00099, abs=1e-4)
    assert gains["4"]["judge"] == "offline-exact"
    scores = [row for row in rows if row["table"] == "score"]
    assert len(scores) == 20
    assert {row["test_items"] for row in scores} == {"1000"}


def test_without_experts_only_absolute_scores(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = make_run("mera", "mera")
    assert "gains.png" in write_report([make_run("experts", "expert"), run], out).files
    report = write_report([run], out)
    assert "gains.png" not in report.files
    assert not (out / "gains.png").exists()
    text = " ".join(report.text.split())
    assert "'mera-ds init runs/experts --profile pocket --method expert'" in text
    assert "'mera-ds run runs/experts'" in text
    assert "Backward Relative Gain" not in text
    assert "gains.png" not in (report.folder / "report.md").read_text(encoding="utf-8")


def test_experts_alone_are_shown(make_run: MakeRun, tmp_path: Path) -> None:
    report = write_report([make_run("experts", "expert")], tmp_path / "out")
    scores = table_of(report.text, "Tables 9 and 10")
    assert line_of(scores, "Expert")[2:4] == ["100.76", "0.358"]


def test_unfinished_runs_are_shown_as_far_as_they_are(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert"), make_run("mera", "mera", stages=2)]
    empty = make_run("finetune", "finetune", "finetune")
    (empty / "results.jsonl").unlink()
    report = write_report([*runs, empty], tmp_path / "out")
    gains = table_of(report.text, "Backward Relative Gain by")
    assert line_of(gains, "MERA(10%)")[3:] == [
        "2/4",
        "100.00",
        "96.27",
        "-",
        "-",
        "98.13",
        "-",
        "2.64",
    ]
    assert line_of(gains, "Fine-Tuning")[3:] == ["0/4", *"-------"]
    assert "no results yet" in report.text


def test_seeds_are_averaged_and_counted(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert")]
    runs += [make_run("mera-0", "mera"), make_run("mera-1", "mera", seed=1, scale=0.6, stages=2)]
    report = write_report(runs, tmp_path / "out")
    scores = table_of(report.text, SCORES)
    assert line_of(scores, "MERA(10%)", "1")[3:6] == ["2", "80.61±28.50*", "0.286±0.101*"]
    assert line_of(scores, "MERA(10%)", "4")[3:7] == ["2", "98.05", "(1/2)+", "0.338"]
    gains = table_of(report.text, "Backward Relative Gain by")
    assert line_of(gains, "MERA(10%)")[2:6] == ["2", "4/4", "100.00", "77.01"]
    assert line_of(gains, "MERA(10%)")[6:10] == ["105.57", "(1/2)", "102.17", "(1/2)"]
    assert "stage 1 counts as 100 %" in " ".join(report.text.split())


def test_a_run_is_measured_by_the_expert_of_its_seed(make_run: MakeRun, tmp_path: Path) -> None:
    """A second seed, weaker in everything, changes no gain: not of those without it either."""
    runs = [make_run("experts-0", "expert"), make_run("experts-1", "expert", seed=1, scale=0.8)]
    runs += [make_run("mera-0", "mera"), make_run("mera-1", "mera", seed=1, scale=0.8)]
    runs.append(make_run("tune", "finetune", "finetune"))
    report = write_report(runs, tmp_path / "out")
    table = table_of(report.text, "Table 2")
    assert line_of(table, "MERA(10%)")[1:] == ["101.00", "±", "0.00", "3.90"]
    assert line_of(table, "Fine-Tuning")[1:] == ["59.76", "27.23"]
    text = " ".join(report.text.split())
    assert "Stage 1 counts as 100 %, as in" not in text
    assert "expert of audio/caption (60.14) is weaker than 2 model(s)" in text


def test_what_is_missing_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert"), make_run("mera", "mera", stages=2)]
    runs += [make_run(f"tune-{o}", "finetune", order=o) for o in ("sequential", "reverse")]
    empty = make_run("ewc", "ewc", "ewc")
    (empty / "results.jsonl").unlink()
    report = write_report([*runs, empty], tmp_path / "out")
    text = " ".join(report.text.split())
    assert "are not over the same ones: EWC (order 1 only); MERA(10%) (order 1 only)." in text
    assert "measured so far: ewc (EWC) 0 of 4; mera (MERA(10%)) 2 of 4." in text
    drawn = (report.folder / "gains.svg").read_text(encoding="utf-8")
    assert "MERA(10%) (order 1)" in drawn
    assert "EWC" not in drawn


def test_a_method_looks_the_same_in_every_report(make_run: MakeRun, tmp_path: Path) -> None:
    experts, tune = make_run("experts", "expert"), make_run("tune", "finetune", "finetune")
    few, many = make_run("one", "mera", "mera-1", percent=1.0), make_run("ten", "mera")
    first = write_report([experts, many, few, tune], tmp_path / "a")
    second = write_report([experts, tune, few, many], tmp_path / "b")
    for name in first.files:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert "#56b4e9" in (first.folder / "gains.svg").read_text(encoding="utf-8")
    alone = write_report([experts, few], tmp_path / "c")
    for name in ("gains.svg", "scores.svg"):
        drawn = (alone.folder / name).read_text(encoding="utf-8")
        assert "#56b4e9" in drawn
        assert "#0072b2" not in drawn


def test_long_names_fit_into_the_legend(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert"), make_run("other", "mera", profile="tiny")]
    runs += [make_run(f"own-{n}", "my-own-method", percent=float(n)) for n in (4, 5)]
    report = write_report(runs, tmp_path / "out")
    for name in ("gains.png", "scores.png"):
        with Image.open(report.folder / name) as image:
            for column in (0, image.width - 1):
                edge = image.convert("L").crop((column, 0, column + 1, image.height))
                assert edge.getextrema() == (255, 255)


def test_stage_1_is_compared_with_its_expert_over_all_seeds(
    make_run: MakeRun, tmp_path: Path
) -> None:
    runs = [make_run("experts", "expert")]
    runs += [make_run("mera-0", "mera", scale=0.9), make_run("mera-1", "mera", seed=1, scale=1.1)]
    assert "Stage 1 counts as 100 %, as in" not in write_report(runs, tmp_path / "two").text
    assert "expert it is: MERA(10%), order 1: 90.00 %." in " ".join(
        write_report(runs[:2], tmp_path / "one").text.split()
    )


def test_runs_with_different_settings_are_never_averaged(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("one", "mera", "mera-1", percent=1.0), make_run("ten", "mera", percent=10.0)]
    report = write_report(runs, tmp_path / "out")
    assert line_of(report.text, "MERA(1%)", "4", "pointcloud")[3:5] == ["1", "95.18+"]
    assert line_of(report.text, "MERA(10%)", "4", "pointcloud")[3:5] == ["1", "98.05+"]
    assert "mera differs in replay.percent: MERA(1%) 1, MERA(10%) 10." in report.text


def test_what_judging_may_cost_makes_no_other_runs(make_run: MakeRun, tmp_path: Path) -> None:
    paid = EvaluateConfig(judge_max_dollars=50.0, judge_concurrency=1)
    runs = [make_run("one", "mera"), make_run("two", "mera", seed=1, evaluate=paid)]
    report = write_report(runs, tmp_path / "out")
    assert "differs in" not in report.text


def test_profiles_are_never_compared(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert", profile="tiny"), make_run("mera", "mera")]
    report = write_report(runs, tmp_path / "out")
    assert "gains.png" not in report.files
    assert "--profile pocket --method expert" in " ".join(report.text.split())


def test_scores_by_another_judge_give_no_gain(make_run: MakeRun, tmp_path: Path) -> None:
    experts = make_run("experts", "expert", judge="gpt-4o-mini-2024-07-18")
    report = write_report([experts, make_run("mera", "mera")], tmp_path / "out")
    gains = table_of(report.text, "Backward Relative Gain by")
    assert line_of(gains, "MERA(10%)")[4:] == ["100.00", "n/a", "n/a", "n/a", "n/a", "-", "n/a"]
    text = " ".join(report.text.split())
    assert "the expert was scored with judge gpt-4o-mini-2024-07-18, not offline-exact" in text
    assert "image/qa was scored in different ways (judge)" in text


def test_missing_judgements_are_a_warning(make_run: MakeRun, tmp_path: Path) -> None:
    report = write_report([make_run("mera", "mera", missing=3)], tmp_path / "out")
    assert "Warning: image/caption: 12 prediction(s) or judgement(s) are missing" in report.text


def test_a_few_missing_judgements_leave_the_gains(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert"), make_run("mera", "mera", missing=3)]
    report = write_report(runs, tmp_path / "out")
    gains = table_of(report.text, "Backward Relative Gain by")
    assert "n/a" not in line_of(gains, "MERA(10%)")
    assert "was scored in different ways" not in report.text


@pytest.mark.parametrize("judge", ["offline-exact", "offline-containment"])
def test_the_backbone_without_media_is_a_row_if_it_was_measured_the_same(
    judge: str, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("experts", "expert")
    scores = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    rows = [{**row, "score": 0.875, "judge": judge} for row in scores if row["task"] == "qa"]
    (run / WITHOUT_MEDIA).write_text(json.dumps({"schema": 1, "rows": rows}))
    report = write_report([run], tmp_path / "out")
    floor = "pointcloud/qa (0.568) is not above the backbone without media (0.875)"
    shown = judge == "offline-exact"
    assert ("Backbone, no media" in report.text) == shown
    assert (floor in " ".join(report.text.split())) == shown
    values = read_csv(tmp_path / "out/tables.csv")
    assert [row["value"] for row in values if row["table"] == "without media"] == ["0.875"] * (
        4 if shown else 0
    )


def test_the_same_seed_twice_is_a_warning(make_run: MakeRun, tmp_path: Path) -> None:
    (section,) = summarise(read_runs([make_run("a", "mera"), make_run("b", "mera")]))
    assert section.warnings() == ["MERA(10%): 2 runs, but only 1 different seed(s)."]


def test_a_wide_table_is_split_and_keeps_its_labels() -> None:
    header = ("Method", *(f"column {number}\nunit" for number in range(30)))
    rows = (("mera", *(f"{number}.00" for number in range(30))),)
    text = to_text(Table("Title", header, rows, ("note " * 60,), labels=1))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert sum(line.startswith("mera") for line in text.splitlines()) > 1
    cells = [cell for line in text.splitlines() if line.startswith("mera") for cell in line.split()]
    assert [cell for cell in cells if cell != "mera"] == list(rows[0][1:])


def test_the_report_imports_no_torch() -> None:
    code = "import sys, mera_ds.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stage_under_evaluation_does_not_hide_the_stages_before(
    make_run: MakeRun, tmp_path: Path, row: dict[str, Any]
) -> None:
    folder = make_run("mera", "mera", stages=3)
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    report = write_report([make_run("experts", "expert"), folder], tmp_path / "out")
    forward = table_of(report.text, "Forward Relative Gain by")
    assert line_of(forward, "MERA(10%)")[3:7] == ["2/4", "100.00", "117.92", "n/a"]
    assert "stage 3: there is no score of audio/qa" in " ".join(report.text.split())
