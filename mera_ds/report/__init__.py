"""Tables and figures of the paper for any set of run folders. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mera_ds.errors import InputError
from mera_ds.files import write_bytes
from mera_ds.report.board import write_board
from mera_ds.report.costs import run_costs
from mera_ds.report.figures import Picture, gains_figure, scores_figure
from mera_ds.report.intervals import Intervals
from mera_ds.report.page import page_html
from mera_ds.report.paper import paper_tables
from mera_ds.report.provenance import provenance_csv, provenance_table
from mera_ds.report.render import Table, to_latex, to_markdown, to_text, wrap
from mera_ds.report.results import read_runs
from mera_ds.report.summary import Section, summarise
from mera_ds.report.tables import section_tables, to_csv

__all__ = ["Report", "write_report"]

GAINS, SCORES = "gains", "scores"
_CAPTIONS = {
    GAINS: "Figures 2 and 3: Backward and Forward Relative Gain by stage, in % of the expert: "
    "means over orders and seeds (bars: standard deviation over seeds, where there is one order)",
    SCORES: "Score of every task by stage: means over seeds (bars: their standard deviation)",
}


@dataclass(frozen=True)
class Report:
    """Where a report lies, and its text for the terminal."""

    folder: Path
    files: tuple[str, ...]
    """Names of the files in it."""
    text: str


@dataclass(frozen=True)
class _Part:
    """One profile's runs, arranged."""

    section: Section
    tables: tuple[Table, ...]
    intervals: Intervals
    provenance: Table

    @property
    def warnings(self) -> list[str]:
        return self.section.warnings()

    @property
    def limits(self) -> str:
        return self.section.limits or "the profile states none"


def write_report(runs: Sequence[Path], out: Path) -> Report:
    """Write the report of some runs to the folder `out`.

    It holds `report.md`, `report.html` (one page that needs no other file), `tables.tex`,
    `tables.csv`, `provenance.csv`, the figures `scores` and `gains` as PNG and SVG, and the gains
    for TensorBoard; gains only with an expert, there is nothing to divide by otherwise.

    Runs that differ only in their seed are averaged, then orders; runs of different profiles are
    never compared. An unfinished run is shown as far as it has got.

    Raises:
        InputError: if a folder is no run, is given twice, or no run has a result yet; if `out` is
            the folder of a run.
        DataError: if a `results.jsonl` is not what `evaluate` writes.
    """
    if (out / "config.yaml").exists():
        raise InputError(f"{out} is a run, whose TensorBoard would be lost; give another --out")
    found = read_runs(runs)
    sections = summarise(found)
    costs = run_costs(found)
    parts = []
    for section in sections:
        intervals = Intervals(section)
        tables = (*paper_tables(section, costs), *section_tables(section, intervals))
        parts.append(_Part(section, tables, intervals, provenance_table(section, costs)))
    figures = _figures(sections)
    files = {
        "report.md": _markdown(parts, list(figures)).encode(),
        "report.html": _page(parts, figures).encode(),
        "tables.tex": _latex(parts).encode(),
        "tables.csv": to_csv([(part.section, part.intervals) for part in parts]).encode(),
        "provenance.csv": provenance_csv(sections, costs).encode(),
        **{f"{name}.png": picture.png for name, picture in figures.items()},
        **{f"{name}.svg": picture.svg for name, picture in figures.items()},
    }
    for name in {f"{GAINS}.png", f"{GAINS}.svg"} - files.keys():
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_bytes(out / name, content)
    write_board(out / "tensorboard", sections)
    return Report(out, tuple(files), "\n".join(map(_text, parts)))


def _figures(sections: Sequence[Section]) -> dict[str, Picture]:
    comparable = any(section.groups and section.experts for section in sections)
    gains = {GAINS: gains_figure(sections)} if comparable else {}
    return {**gains, SCORES: scores_figure(sections)}


def _text(part: _Part) -> str:
    tables = "\n".join(to_text(table) for table in part.tables)
    remarks = [f"Warning: {warning}" for warning in part.warnings] + _hints(part.section)
    return tables + "".join(f"\n{wrap(remark)}\n" for remark in remarks)


def _markdown(parts: Sequence[_Part], figures: Sequence[str]) -> str:
    text = ["# Report"]
    for part in parts:
        text.append(f"## Profile {part.section.profile}\n\nLimits: {part.limits}")
        remarks = [f"- **Warning:** {warning}" for warning in part.warnings]
        remarks += [f"- {hint}" for hint in _hints(part.section)]
        text += ["\n".join(remarks)] if remarks else []
        text += [to_markdown(table) for table in part.tables]
    text.append("## Figures")
    text += [f"![{_CAPTIONS[name]}]({name}.png)" for name in figures]
    return "\n\n".join(text) + "\n"


def _latex(parts: Sequence[_Part]) -> str:
    head = "% Needs \\usepackage{booktabs,graphicx}.\n\n"
    return head + "\n\n".join(to_latex(table) for part in parts for table in part.tables) + "\n"


def _page(parts: Sequence[_Part], figures: dict[str, Picture]) -> str:
    shown = []
    for part in parts:
        remarks = [*(f"Warning: {warning}" for warning in part.warnings), *_hints(part.section)]
        shown.append((part.section, part.tables, remarks, part.provenance))
    return page_html(
        shown,
        [(_CAPTIONS[name], picture) for name, picture in figures.items()],
    )


def _hints(section: Section) -> list[str]:
    if section.experts:
        return []
    return [
        "Relative gains need an expert run of the same profile: "
        f"'mera-ds init runs/experts --profile {section.profile} --method expert', then "
        "'mera-ds run runs/experts', then name runs/experts in this report as well."
    ]
