"""The paper's Tables 2, 4 and 5 out of run folders that hold its raw scores."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mera_ds.config import PathWeaveConfig
from mera_ds.report import write_report
from mera_ds.report.costs import run_costs
from mera_ds.report.intervals import Intervals
from mera_ds.report.paper import paper_tables
from mera_ds.report.render import Table, to_html, to_latex, to_markdown, to_text
from mera_ds.report.results import read_runs
from mera_ds.report.summary import summarise

MakeRun = Callable[..., Path]
METHODS: Mapping[str, tuple[str, float, str]] = {
    "finetune": ("finetune", 10, "Fine-Tuning"),
    "replay-1": ("replay", 1, "Replay(1%)"),
    "replay-10": ("replay", 10, "Replay(10%)"),
    "ewc": ("ewc", 10, "EWC"),
    "pathweave": ("pathweave", 10, "PathWeave"),
    "mera-1": ("mera", 1, "MERA(1%)"),
    "mera-10": ("mera", 10, "MERA(10%)"),
}


@pytest.fixture
def tables(make_run: MakeRun) -> dict[str, Table]:
    """Return the paper's tables of all its methods in both orders, by number."""
    folders = [make_run("experts", "expert")]
    for order in ("sequential", "reverse"):
        for source, (method, percent, _) in METHODS.items():
            name = f"{source}-{order}"
            folders.append(make_run(name, method, source, order, percent=percent))
        # Stand-ins with known scores: the paper prints no raw scores of realigned methods.
        folders.append(make_run(f"merge-{order}", "merge", "ewc", order))
        folders.append(make_run(f"realign-{order}", "realign", "pathweave", order))
    runs = read_runs(folders)
    (section,) = summarise(runs)
    return {table.paper: table for table in paper_tables(section, run_costs(runs))}


def row(table: Table, label: str) -> tuple[str, ...]:
    (found,) = [cells[1:] for cells in table.rows if cells[0] == label]
    return found


def test_table_2(tables: dict[str, Table], paper: dict[str, Any]) -> None:
    for source, (_, _, label) in METHODS.items():
        expected = [f"{value:.2f}" for value in paper["table_2"][source]]
        assert list(row(tables["Table 2"], label)) == expected
    best = {tables["Table 2"].rows[place][0] for place, _ in tables["Table 2"].best}
    assert best == {"MERA(10%)"}
    assert len(tables["Table 2"].best) == 4
    second = {tables["Table 2"].rows[place][0] for place, _ in tables["Table 2"].second}
    assert second == {"MERA(1%)"}


def test_table_4_has_the_rows_of_the_ablation(tables: dict[str, Table]) -> None:
    labels = [cells[0] for cells in tables["Table 4"].rows]
    assert labels == [
        *("Fine-Tuning", "Merging", "Fine-Tuning + Realign"),
        *("MERA(1%)", "MERA(10%)"),
    ]


def test_table_5_says_what_realigning_adds(tables: dict[str, Table], paper: dict[str, Any]) -> None:
    plain, better = paper["table_2"]["finetune"], paper["table_2"]["pathweave"]
    change = row(tables["Table 5"], "+ Realigning: Fine-Tuning + Realign")
    differences = [two - one for one, two in zip(plain, better, strict=True)]
    assert [float(cell) for cell in change] == pytest.approx(differences, abs=0.011)
    assert all(cell[0] in "+-" for cell in change)
    assert row(tables["Table 5"], "Fine-Tuning") == row(tables["Table 2"], "Fine-Tuning")
    assert tables["Table 5"].rows[0][0] == "Fine-Tuning"
    assert {(1, column) for column in range(1, 5)} <= tables["Table 5"].best
    assert not {(0, column) for column in range(1, 5)} & tables["Table 5"].best
    assert row(tables["Table 5"], "Merging") == row(tables["Table 2"], "Merging")


def test_tables_2_and_5_say_what_is_not_measured_yet(make_run: MakeRun) -> None:
    folders = [make_run("experts", "expert"), make_run("seed-0", "finetune", "finetune")]
    folders.append(make_run("seed-1", "finetune", "finetune", seed=1, stages=2))
    folders.append(make_run("realign", "realign", "pathweave", stages=3))
    runs = read_runs(folders)
    (section,) = summarise(runs)
    tables = {table.paper: table for table in paper_tables(section, run_costs(runs))}
    assert row(tables["Table 2"], "Fine-Tuning")[0] == "59.76 (1/2)"
    assert row(tables["Table 2"], "Fine-Tuning + Realign")[0].endswith(" (3 of 4 stages)")
    assert any(note.startswith("(1/2): ") for note in tables["Table 2"].notes)
    assert row(tables["Table 5"], "+ Realigning: Fine-Tuning + Realign") == ("n/a", "n/a")
    assert any("not measured over the same stages" in note for note in tables["Table 5"].notes)


def test_table_5_compares_equal_seeds(make_run: MakeRun) -> None:
    folders = [make_run("experts", "expert"), make_run("seed-0", "finetune", "finetune")]
    folders.append(make_run("seed-1", "finetune", "finetune", seed=1, scale=0.5))
    folders.append(make_run("realign", "realign", "pathweave"))
    runs = read_runs(folders)
    (section,) = summarise(runs)
    tables = {table.paper: table for table in paper_tables(section, run_costs(runs))}
    change = row(tables["Table 5"], "+ Realigning: Fine-Tuning + Realign")
    assert float(change[0]) == pytest.approx(86.85 - 59.76, abs=0.011)
    assert any("over the seeds that" in note for note in tables["Table 5"].notes)
    assert any("(0, 1)" in text and "(seed 0 only)" in text for text in section.warnings())


def test_table_5_takes_the_likest_of_a_methods_variants(make_run: MakeRun) -> None:
    identity = PathWeaveConfig(inner="identity")
    folders = [make_run("experts", "expert"), make_run("random", "pathweave", "finetune")]
    folders.append(make_run("identity", "pathweave", "pathweave", pathweave=identity))
    folders.append(make_run("realign", "pathweave+realign", "mera-10", percent=1.0))
    (section,) = summarise(runs := read_runs(folders))
    tables = {table.paper: table for table in paper_tables(section, run_costs(runs))}
    before, change = tables["Table 5"].rows
    assert before[0] == "PathWeave [inner=random]"
    assert change[0] == "+ Realigning: PathWeave + Realign"
    assert float(change[1]) == pytest.approx(101.0 - 59.76, abs=0.011)


def test_a_method_that_the_paper_has_not_keeps_its_name(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("experts", "expert"), make_run("own", "my-method")]
    text = write_report(runs, tmp_path / "out").text
    assert "my-method" in text
    assert "Table 4" not in text


HOSTILE = Table("A & B", ("Name", "x_1\n%"), (("<b>", "50 % ~ \\"),), ("note # 1",), 1, frozenset())


def test_latex_and_html_show_every_sign_as_it_is() -> None:
    latex = to_latex(HOSTILE)
    assert r"Name & \begin{tabular}[b]{@{}r@{}}x\_1 \\ \%\end{tabular} \\" in latex
    assert r"$<$b$>$ & 50 \% \textasciitilde{} \textbackslash{} \\" in latex
    assert r"\caption{A \& B. note \# 1.}" in latex
    page = to_html(HOSTILE)
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_the_best_is_bold_in_latex_and_html(tables: dict[str, Table]) -> None:
    latex = to_latex(tables["Table 2"])
    assert r"\textbf{101.00}" in latex
    assert "(the paper's Table 2)." in latex
    assert "Table 2:" not in latex, "LaTeX puts its own number there"
    assert "<td class=best>101.00</td>" in to_html(tables["Table 2"])
    assert r"\underline{97.90}" in to_latex(tables["Table 2"])
    assert "<td class=second>97.90</td>" in to_html(tables["Table 2"])
    assert "<ins>97.90</ins>" in to_markdown(tables["Table 2"])
    for render in (to_latex, to_html, to_markdown):
        assert "second best underlined" in render(tables["Table 2"])
    assert "underlined" not in to_text(tables["Table 2"])


def test_without_stored_items_there_are_no_intervals(make_run: MakeRun) -> None:
    runs = read_runs([make_run("experts", "expert"), make_run("mera", "mera")])
    (section,) = summarise(runs)
    intervals = Intervals(section)
    assert intervals.mean_gain(section.groups, "backward", 4) is None
    assert intervals.score(section.groups[0], 1, ("image", "qa")) is None
