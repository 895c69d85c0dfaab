"""Reads run folders: what each run is (`config.yaml`) and its scores so far (`results.jsonl`)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mera_ds.config import RunConfig, load_config
from mera_ds.errors import DataError, InputError
from mera_ds.evaluate.predictions import SPEED_AND_MONEY, WITHOUT_MEDIA
from mera_ds.files import read_json
from mera_ds.settings import dump, parse

EXPERT = "expert"
"""The method whose stage k is modality k trained alone from the base model: the upper bound."""

METRICS = {"caption": "cider", "qa": "accuracy"}
_DESCRIPTIVE = {
    *("profile", "description", "limits", "method", "order", "seed", "build", "plugins"),
    "execution",
}
"""Settings that name a run or don't change what it computes."""
_NO_MATTER = {f"evaluate.{name}" for name in SPEED_AND_MONEY}


@dataclass(frozen=True)
class Score:
    """One line of `results.jsonl`: one task of one modality, measured after one stage."""

    schema: Literal[1]
    run: str
    method: str
    order: tuple[str, ...]
    seed: int
    stage: int
    stage_modality: str
    modality: str
    task: Literal["caption", "qa"]
    dataset: str
    split: str
    metric: Literal["cider", "accuracy"]
    score: float
    """`cider`: CIDEr x 100; `accuracy`: 0 to 1."""
    count: int
    """Test items that were scored."""
    missing: int
    """Items without a prediction or a judgement."""
    majority: float | None
    """Share of the most frequent answer in the test set; only for `qa`."""
    judge: str | None
    tokenizer: str | None
    references_sha256: str
    model: str
    profile: str
    limits: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Commit, hardware, dtype, hashes of the test shards and the step; older rows have none."""

    @property
    def yardstick(self) -> dict[str, object]:
        """Return everything that two scores must share to be comparable."""
        names = ("dataset", "split", "metric", "judge", "tokenizer", "references_sha256")
        items = self.count + self.missing  # a few missing judgements make no other test of it
        return {**{name: getattr(self, name) for name in names}, "test items": items}


@dataclass(frozen=True)
class Run:
    """One run folder. An unfinished run has the scores of the stages it has finished."""

    folder: Path
    config: RunConfig
    scores: Mapping[tuple[int, str, str], Score]
    """By (stage, modality, task); stages count from 1."""
    without_media: Sequence[Mapping[str, Any]] = ()
    """What the bare backbone scores without media, if that was measured: a row per test."""
    others: frozenset[tuple[str, str, str]] = frozenset()
    """Tests beside those in `scores`, where a modality has several of a task: modality, task,
    dataset. The last one in `results.jsonl` speaks."""

    @property
    def last_stage(self) -> int:
        """Return the last stage with a score; 0 if there is none."""
        return max((stage for stage, _, _ in self.scores), default=0)

    @property
    def stages_measured(self) -> int:
        """Return how many stages have a score."""
        return len({stage for stage, _, _ in self.scores})

    @property
    def settings(self) -> dict[str, str]:
        """Return the settings that change what the run computes, by dotted key."""
        plain = {key: value for key, value in dump(self.config).items() if key not in _DESCRIPTIVE}
        return {key: value for key, value in _flatten(plain, "") if key not in _NO_MATTER}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders in the given order.

    Raises:
        InputError: if a folder is no run, is given twice, or no run has any score yet.
        DataError: if a line of a `results.jsonl` is not what `evaluate` writes.
    """
    if not folders:
        raise InputError("no run given; name one or more run folders")
    resolved = [folder.resolve() for folder in folders]
    for position, folder in enumerate(folders):
        if resolved[position] in resolved[:position]:
            raise InputError(f"{folder} is given twice; name each run once")
    runs = [_read_run(folder) for folder in folders]
    if not any(run.scores for run in runs):
        raise InputError(
            f"{folders[0]} has no results yet; 'mera-ds run {folders[0]}' trains and evaluates it"
        )
    return runs


def _read_run(folder: Path) -> Run:
    config = load_config(folder)
    path = folder / "results.jsonl"
    scores: dict[tuple[int, str, str], Score] = {}
    others = set()
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); evaluate the run again") from None
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        score = read_score(line, f"{path}:{number}")
        for name in ("method", "order", "seed", "profile"):
            found, expected = getattr(score, name), getattr(config, name)
            if name == "order":  # a stage of before 'mera-ds add' knows the shorter one
                expected = expected[: len(found)]
            if found != expected:
                raise DataError(
                    f"{path}:{number}: {name} is {found!r}, but config.yaml says {expected!r}; "
                    "the results belong to another run"
                )
        key = (score.stage, score.modality, score.task)
        if key in scores and scores[key].dataset != score.dataset:
            others.add((score.modality, score.task, scores[key].dataset))
        scores[key] = score
    floor = folder / WITHOUT_MEDIA
    rows = read_json(floor)["rows"] if floor.exists() else ()
    return Run(folder, config, scores, rows, frozenset(others))


def read_score(line: str, where: str) -> Score:
    """Read one line, strictly.

    Raises:
        DataError: on an unknown or missing key or an impossible value; it starts with `where`.
    """
    try:
        score = parse(Score, json.loads(line), where)
        problem = _contradiction(score)
    except ValueError as error:
        problem = f"not valid JSON ({error})"
    except InputError as error:
        problem = str(error).removeprefix(f"{where}: ").removeprefix(f"{where}.")
    if problem:
        raise DataError(f"{where}: {problem}; remove the line and evaluate that stage again")
    return score


def _contradiction(score: Score) -> str:
    """Return which value is impossible, alone or beside the others; nothing if none is."""
    order, stage = score.order, score.stage
    if not 1 <= stage <= len(order) or score.stage_modality != order[stage - 1]:
        return f"stage {stage} ({score.stage_modality}) is not in the order {', '.join(order)}"
    learnt = (score.stage_modality,) if score.method == EXPERT else order[:stage]
    if score.modality not in learnt:
        return f"modality {score.modality} is not learnt at stage {stage} ({', '.join(learnt)})"
    if score.metric != METRICS[score.task]:
        return f"metric is {score.metric}, but {score.task} is measured by {METRICS[score.task]}"
    highest = 1 if score.metric == "accuracy" else math.inf
    if not (math.isfinite(score.score) and 0 <= score.score <= highest):
        return f"score is {score.score}, which no {score.metric} can be"
    if not 0 <= score.missing <= score.count or score.count == 0:
        return f"missing is {score.missing} of count {score.count}"
    if score.majority is not None and not 0 <= score.majority <= 1:
        return f"majority is {score.majority}, which no share can be"
    return ""


def _flatten(value: Any, key: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        prefix = f"{key}." if key else ""
        return [pair for name in value for pair in _flatten(value[name], f"{prefix}{name}")]
    return [(key, json.dumps(value).removesuffix(".0"))]
