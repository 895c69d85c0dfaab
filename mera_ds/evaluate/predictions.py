"""Predictions on disk: one JSON line per item, apart from scores so that scoring can be repeated.

Imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError
from mera_ds.files import read_json, write_bytes

SCORES = "scores.json"
PER_ITEM = "per_item.json"
"""What each test item scored, for confidence intervals."""
WITHOUT_MEDIA = "without-media.json"
"""File of a run: what the bare backbone scores on each test without media."""
SPEED_AND_MONEY = (
    *("judge_concurrency", "judge_requests_per_minute", "judge_tokens_per_minute"),
    *("judge_max_dollars", "judge_prices"),
)
"""Settings of an evaluation that change no score."""


@dataclass(frozen=True)
class Prediction:
    """What the model said about one test item."""

    id: str
    question: str
    references: tuple[str, ...]
    prediction: str


def save_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as JSON lines, atomically."""
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in predictions]
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def load_predictions(path: Path) -> list[Prediction]:
    """Read stored predictions.

    Raises:
        DataError: the file is gone, or naming the line that is not a prediction.
    """
    found = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; delete its evaluation's {SCORES} and run that again"
        ) from None
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            value = json.loads(line)
            found.append(Prediction(**{**value, "references": tuple(value["references"])}))
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}:{number} is no prediction; delete the file") from None
    return found


@dataclass(frozen=True)
class ScoredTest:
    """One test that was scored after one stage, and the file of what the model said."""

    row: Mapping[str, Any]
    """Its line of `results.jsonl`."""
    predictions: Path


def predictions_name(key: str) -> str:
    """Return the folder's name in an evaluation's `predictions`; `key`: the evaluation's.

    Evaluations that only score otherwise have the same one.
    """
    return key[:16]


def scored_tests(run: Path) -> list[ScoredTest]:
    """Return every test of a run's finished evaluations, stage by stage."""
    found = []
    for path in sorted(run.glob(f"stages/*/evaluation/{SCORES}")):
        scores = read_json(path)
        folder = path.parent / "predictions" / predictions_name(scores["key"])
        for row in scores["rows"]:
            found.append(ScoredTest(row, folder / f"{row['dataset']}-{row['task']}.jsonl"))
    return found
