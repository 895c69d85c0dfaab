"""From predictions to the figures of a results line: CIDEr for captions, accuracy for answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.config import EvaluateConfig, cache_folder
from mera_ds.errors import DataError
from mera_ds.evaluate.cider import cider
from mera_ds.evaluate.judge import Judge, JudgeItem, OfflineJudge, accuracy
from mera_ds.evaluate.predictions import Prediction
from mera_ds.files import sha256_json


@dataclass(frozen=True)
class Scored:
    """The score of one test."""

    figures: Mapping[str, Any]
    """The score and how it was computed, as a line of `results.jsonl` has it."""
    per_item: Mapping[str, float | None]
    """What each item scored; their mean is the score. None: missing."""


def score_test(task: str, predictions: Sequence[Prediction], config: EvaluateConfig) -> Scored:
    """Score captions by CIDEr and answers by the judge."""
    return (score_captions if task == "caption" else score_questions)(predictions, config)


def score_captions(predictions: Sequence[Prediction], config: EvaluateConfig) -> Scored:
    """Return CIDEr × 100 and how it was computed."""
    result = cider(
        {entry.id: entry.prediction for entry in predictions},
        {entry.id: list(entry.references) for entry in predictions},
        config.tokenizer,
    )
    figures = {
        "metric": "cider",
        "score": result.score,
        "count": len(predictions),
        "missing": 0,
        "judge": None,
        "tokenizer": result.tokenizer,
        "references_sha256": result.references_sha256,
    }
    return Scored(figures, result.per_id)


def score_questions(predictions: Sequence[Prediction], config: EvaluateConfig) -> Scored:
    """Return the judge's accuracy, 0 to 1.

    Raises:
        DataError: if too many judgements are missing for the accuracy to stand.
    """
    judge = make_judge(config, cache_folder() / "judgements.jsonl")
    items = judge_items(predictions)
    judgements = judge.judge(items)
    result = accuracy(judgements)
    if result.withheld or result.score is None:
        reasons = Counter(j.detail for j in judgements if j.verdict not in ("yes", "no"))
        raise DataError(
            f"{result.missing} of {len(items)} judgements by {judge.name} are missing, so there is "
            "no final score; run the same command again, it asks only for those (most often: "
            f"{reasons.most_common(1)[0][0]})"
        )
    figures = {
        "metric": "accuracy",
        "score": result.score,
        "count": result.count,
        "missing": result.missing,
        "judge": judge.name,
        "tokenizer": None,
        "references_sha256": sha256_json({item.id: item.answers for item in items}),
    }
    values = {"yes": 1.0, "no": 0.0}
    found = {i.id: values.get(j.verdict) for i, j in zip(items, judgements, strict=True)}
    return Scored(figures, found)


def judge_items(predictions: Sequence[Prediction]) -> list[JudgeItem]:
    """Return predictions as a judge takes them."""
    return [
        JudgeItem(entry.id, entry.question, entry.references, entry.prediction)
        for entry in predictions
    ]


def make_judge(config: EvaluateConfig, cache: Path) -> Judge:
    """Return the configured judge."""
    if config.judge != "openai":
        return OfflineJudge(config.judge)
    from mera_ds.evaluate.openai_judge import OpenAIJudge, Prices

    return OpenAIJudge(
        cache,
        model=config.judge_model,
        base_url=config.judge_base_url,
        prices=Prices(*config.judge_prices) if config.judge_prices else None,
        max_dollars=config.judge_max_dollars,
        concurrency=config.judge_concurrency,
        requests_per_minute=config.judge_requests_per_minute,
        tokens_per_minute=config.judge_tokens_per_minute,
    )
