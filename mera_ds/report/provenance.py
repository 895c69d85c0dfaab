"""Where each number comes from: run, model, commit, hardware, data, judge and tokenizer."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from mera_ds.manifest import MANIFEST, read_manifest
from mera_ds.plan import stage_folder
from mera_ds.report.costs import Cost
from mera_ds.report.render import Table
from mera_ds.report.results import Run, Score
from mera_ds.report.summary import Section

_HEADER = (
    *("Method", "Run", "Seed", "Order", "Stage", "Test", "Score", "Items", "Judge or tokenizer"),
    *("References", "Test data", "Training data", "Model", "dtype", "Trained by commit", "Commit"),
    "Hardware",
)
_HASH = 12
"""Hex digits of a hash that are shown; the CSV has all."""


def provenance_table(section: Section, costs: Mapping[Path, Cost]) -> Table:
    """Return a row for every score of a section."""
    rows = []
    for row in _rows(section, costs):
        cells = list(row)
        for place in (9, 10, 11, 12):
            cells[place] = " ".join(part[:_HASH] for part in row[place].split())
        rows.append(tuple(cells))
    notes = (
        f"Hashes: SHA-256, the first {_HASH} digits; provenance.csv has all.",
        "Training data and the commit that trained are those of the stage; -: not recorded. "
        "Commit: that of the evaluation.",
    )
    return Table(f"Provenance, profile {section.profile}", _HEADER, tuple(rows), notes, 2)


def provenance_csv(sections: Sequence[Section], costs: Mapping[Path, Cost]) -> str:
    """Return the same rows as CSV, with whole hashes, after the profile."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(["profile", *(name.lower().replace(" ", "_") for name in _HEADER)])
    for section in sections:
        writer.writerows([section.profile, *row] for row in _rows(section, costs))
    return target.getvalue()


def _rows(section: Section, costs: Mapping[Path, Cost]) -> list[tuple[str, ...]]:
    return [
        _row(label, run, score, costs[run.folder].commits.get(score.stage, ()))
        for label, runs in section.members
        for run in runs
        for score in run.scores.values()
    ]


def _row(label: str, run: Run, score: Score, trained: Sequence[str]) -> tuple[str, ...]:
    facts = score.provenance
    return (
        label,
        run.folder.name,
        str(score.seed),
        " > ".join(score.order),
        str(score.stage),
        f"{score.dataset} {score.task}",
        f"{score.score:.4f}",
        str(score.count) + (f" ({score.missing} missing)" if score.missing else ""),
        score.judge or score.tokenizer or "-",
        score.references_sha256,
        " ".join(facts.get("test_data", ["-"])),
        _training_data(run.folder, score),
        score.model,
        str(facts.get("dtype", run.config.backbone.dtype)),
        " ".join(trained) or "-",
        str(facts.get("commit", "not recorded")),
        str(facts.get("hardware", "not recorded")),
    )


def _training_data(folder: Path, score: Score) -> str:
    """Return the hashes of the shard sets that the stage's last step learned from."""
    product = folder / stage_folder(score.stage, score.stage_modality) / "model"
    if not (product / MANIFEST).exists():
        return "-"
    data = read_manifest(product).provenance.get("data", {})
    return " ".join(dict.fromkeys(entry for entries in data.values() for entry in entries)) or "-"
