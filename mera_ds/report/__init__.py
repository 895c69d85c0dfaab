"""Tables and figures of the paper for any set of run folders. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mera_ds.files import write_bytes
from mera_ds.report.figures import gains_figure, scores_figure
from mera_ds.report.results import read_runs
from mera_ds.report.summary import Section, summarise
from mera_ds.report.tables import section_tables, to_csv, to_markdown, to_text, wrap

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """Where a report lies, and its text for the terminal."""

    markdown: Path
    csv: Path
    gains: Path | None
    """None without an expert: nothing to divide by."""
    scores: Path
    text: str


def write_report(runs: Sequence[Path], out: Path) -> Report:
    """Write `report.md`, `tables.csv`, `scores.png` and `gains.png` to the folder `out`.

    Runs that differ only in their seed are averaged, then orders; runs of different profiles are
    never compared. An unfinished run is shown as far as it has got.

    Raises:
        InputError: if a folder is no run, is given twice, or no run has a result yet.
        DataError: if a `results.jsonl` is not what `evaluate` writes.
    """
    sections = summarise(read_runs(runs))
    comparable = any(section.groups and section.experts for section in sections)
    scores = out / "scores.png"
    gains = out / "gains.png" if comparable else None
    write_bytes(scores, scores_figure(sections))
    if gains:
        write_bytes(gains, gains_figure(sections))
    else:
        (out / "gains.png").unlink(missing_ok=True)
    write_bytes(out / "tables.csv", to_csv(sections).encode())
    write_bytes(out / "report.md", _markdown(sections, gains is not None).encode())
    text = "\n".join(_section_text(section) for section in sections)
    return Report(out / "report.md", out / "tables.csv", gains, scores, text)


def _section_text(section: Section) -> str:
    tables = "\n".join(to_text(table) for table in section_tables(section))
    remarks = [f"Warning: {warning}" for warning in section.warnings()] + _hints(section)
    return tables + "".join(f"\n{wrap(remark)}\n" for remark in remarks)


def _markdown(sections: Sequence[Section], gains: bool) -> str:
    parts = ["# Report"]
    for section in sections:
        parts.append(f"## Profile {section.profile}\n\nLimits: {_limits(section)}")
        remarks = [f"- **Warning:** {warning}" for warning in section.warnings()]
        remarks += [f"- {hint}" for hint in _hints(section)]
        parts += ["\n".join(remarks)] if remarks else []
        parts += [to_markdown(table) for table in section_tables(section)]
    parts.append("## Figures")
    if gains:
        parts.append("![Backward and Forward Relative Gain by stage](gains.png)")
    parts.append("![Score of every task by stage](scores.png)")
    return "\n\n".join(parts) + "\n"


def _limits(section: Section) -> str:
    return section.limits or "the profile states none"


def _hints(section: Section) -> list[str]:
    if section.experts:
        return []
    return [
        "Relative gains need an expert run of the same profile: "
        f"'mera-ds init runs/experts --profile {section.profile} --method expert', then "
        "'mera-ds run runs/experts', then name runs/experts in this report as well."
    ]
