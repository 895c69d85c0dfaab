"""What the models said about some test items, beside the media themselves."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mera_ds.errors import DataError, InputError
from mera_ds.evaluate.predictions import Prediction, load_predictions, scored_tests
from mera_ds.plan import stage_folder
from mera_ds.report.results import Run
from mera_ds.report.summary import Column, Section
from mera_ds.shards.preview import medium_html
from mera_ds.shards.reader import ShardReader
from mera_ds.shards.remote import data_folder

SHOWN = 3
"""Items of each test."""


@dataclass(frozen=True)
class _Said:
    """What one run's model said after its last stage."""

    label: str
    stage: int
    items: Mapping[str, Prediction]
    scores: Mapping[str, float | None]


def samples_html(section: Section) -> str:
    """Return some items of every test: medium, question, references and all predictions.

    Of each method the run that got furthest speaks, after its last stage; a medium that can't be
    read is named.
    """
    parts = []
    for column in section.all_columns:
        said = _all_said(section, column)
        if not said:
            continue
        ids = list(dict.fromkeys(name for entry in said for name in entry.items))
        chosen = [ids[number * len(ids) // SHOWN] for number in range(min(SHOWN, len(ids)))]
        cards = "".join(_card(section, column, name, said) for name in dict.fromkeys(chosen))
        parts.append(f"<h4>{' · '.join(map(html.escape, column))}</h4>{_CARDS.format(cards)}")
    return "".join(parts)


_CARDS = '<div class="cards">{}</div>'


def _all_said(section: Section, column: Column) -> list[_Said]:
    runs: dict[str, list[Run]] = {}
    for label, members in section.members:
        runs.setdefault(label, []).extend(members)
    furthest = {
        label: max(members, key=lambda run: run.last_stage)
        for label, members in runs.items()
        if members
    }
    found = [_said(label, run, column) for label, run in furthest.items()]
    return [entry for entry in found if entry is not None]


def _said(label: str, run: Run, column: Column) -> _Said | None:
    tests = [
        test
        for test in scored_tests(run.folder)
        if (test.row["modality"], test.row["task"]) == column and test.predictions.exists()
    ]
    if not tests:
        return None
    last = max(tests, key=lambda test: test.row["stage"])
    items = {entry.id: entry for entry in load_predictions(last.predictions)}
    folder = run.folder / stage_folder(last.row["stage"], last.row["stage_modality"])
    path = folder / "evaluation" / "per_item.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["items"] if path.exists() else {}
    return _Said(label, last.row["stage"], items, stored.get("/".join(column), {}))


def _card(section: Section, column: Column, name: str, said: Sequence[_Said]) -> str:
    item = next(entry.items[name] for entry in said if name in entry.items)
    rows = "".join(_row(column, entry, name) for entry in said if name in entry.items)
    question = f'<p class="question">{html.escape(item.question)}</p>' if item.question else ""
    references = html.escape(" · ".join(item.references[:5]))
    more = len(item.references) - 5
    references += f" (and {more} more)" if more > 0 else ""
    medium = _medium(section, column[0], name, html.escape(item.references[0]))
    return (
        f'<article>{medium}<p class="key">{html.escape(name)}</p>{question}'
        f"<dl>{rows}<dt>references</dt><dd>{references}</dd></dl></article>"
    )


def _row(column: Column, entry: _Said, name: str) -> str:
    score = entry.scores.get(name)
    mark = ""
    if score is not None:
        mark = f"CIDEr {score:.0f}" if column[1] == "caption" else ("right" if score else "wrong")
    label = html.escape(entry.label)
    text = html.escape(entry.items[name].prediction) or "<em>nothing</em>"
    return (
        f"<dt class=speaker>{label}, stage {entry.stage} <span class=mark>{mark}</span></dt>"
        f"<dd class=said>{text}</dd>"
    )


def _medium(section: Section, modality: str, name: str, label: str) -> str:
    """Return the medium of an item (`dataset/key#text`), or why it is not shown."""
    dataset, _, rest = name.partition("/")
    key = rest.rpartition("#")[0]
    problem = "its shards are not here"
    for folder in _folders(section, modality):
        try:
            with ShardReader(folder) as reader:
                if reader.index.dataset != dataset:
                    continue
                position = next(n for n, k in enumerate(reader.samples.keys()) if k == key)
                return medium_html(reader, position, label)
        except (InputError, DataError, OSError, StopIteration) as error:
            problem = str(error) or "no such sample"
    return f'<p class="none">{html.escape(problem)}</p>'


def _folders(section: Section, modality: str) -> list[Path]:
    """Return the test shard folders of a modality, of all runs."""
    return list(
        dict.fromkeys(
            data_folder(text, run.folder) / "test"
            for run in section.runs
            if modality in run.config.modalities
            for text in run.config.modalities[modality].data
        )
    )
