"""Carrying out an evaluation step: model → predictions → scores → results.jsonl.

A killed evaluation goes on behind the last part of a task that it has stored. `results.jsonl` of a
run is put together anew from the scores of all its stages.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mera_ds.checkpoint import Manifest, read_manifest
from mera_ds.config import RunConfig, resolve_path
from mera_ds.data.dataset import TEST
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World, main_rank_alone, main_rank_first, share
from mera_ds.evaluate.generate import predict_test, prediction_settings
from mera_ds.evaluate.items import test_tasks
from mera_ds.evaluate.parts import Generated
from mera_ds.evaluate.predictions import (
    PER_ITEM,
    SCORES,
    SPEED_AND_MONEY,
    Prediction,
    load_predictions,
    predictions_name,
)
from mera_ds.evaluate.score import score_test
from mera_ds.features import open_data
from mera_ds.files import read_json, sha256_json, write_bytes, write_json
from mera_ds.identity import data_folders
from mera_ds.log import Metrics, logger
from mera_ds.machine import commit, hardware
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders, build_model, memory_gb, move_to
from mera_ds.plan import EvaluateStep
from mera_ds.settings import dump
from mera_ds.shards.format import read_index

RESULTS = "results.jsonl"
SHOWN = 8
"""Predictions of a test that TensorBoard shows."""


def evaluation_key(run: Path, config: RunConfig, step: EvaluateStep) -> str:
    """Return the hash of everything that determines an evaluation's scores.

    Its beginning, `predictions_name`, depends only on what determines the predictions.
    """
    manifest = read_manifest(run / step.start)
    data = {
        modality: [
            read_index(folder / TEST).fingerprint for folder in data_folders(config, run, modality)
        ]
        for modality in step.modalities
    }
    model = [manifest.key, manifest.model_sha256]
    said = sha256_json([model, prediction_settings(config.evaluate), dump(config.prompt), data])
    settings = dump(config.evaluate)
    scoring = {name: value for name, value in settings.items() if name not in SPEED_AND_MONEY}
    name = predictions_name(said)
    return name + sha256_json([said, scoring])[len(name) :]


def evaluation_is_finished(run: Path, config: RunConfig, step: EvaluateStep) -> bool:
    """Return whether nothing is left to do: the scores are those of now, and all that follows."""
    path = run / step.output / SCORES
    if not (run / step.output / PER_ITEM).exists() or not has_scores_of_now(run, config, step):
        return False
    # A process may have been killed before it put them together.
    return path not in _collected(run) or _has_results(run, _lines([path]))


def has_scores_of_now(run: Path, config: RunConfig, step: EvaluateStep) -> bool:
    """Return whether the scores exist and belong to the model and settings of now."""
    path = run / step.output / SCORES
    if not path.exists() or not (run / step.start / "manifest.json").exists():
        return False
    return bool(read_json(path)["key"] == evaluation_key(run, config, step))


def predictions_folder(run: Path, config: RunConfig, step: EvaluateStep) -> Path:
    """Return where an evaluation's predictions are kept; equal names, equal predictions."""
    return run / step.output / "predictions" / predictions_name(evaluation_key(run, config, step))


def run_evaluate_step(run: Path, config: RunConfig, step: EvaluateStep, world: World) -> None:
    """Evaluate a stage's model on its modalities: the ranks share generation, rank 0 scores.

    Each rank holds the whole model, so none needs another to generate. Every rank must call it.

    Raises:
        InputError: if the model is not finished or test shards are missing.
    """
    with main_rank_first(world) as mine:
        finished = mine and evaluation_is_finished(run, config, step)
    if share(finished):
        logger.info("%s is finished", step.name)
        return
    with Metrics(run, enabled=world.is_main) as metrics:
        tests = _generate(run, config, step, world, metrics)
        with main_rank_alone(world) as mine:  # a judge may take hours
            if mine:
                _score(run, config, step, tests, metrics)


@dataclass(frozen=True)
class _Test:
    """One test set and the file of what the model said about it."""

    dataset: str
    modality: str
    task: str
    file: Path
    fingerprints: tuple[str, ...]
    """Of the modality's test shards."""

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.task}"


def _generate(
    run: Path, config: RunConfig, step: EvaluateStep, world: World, metrics: Metrics
) -> list[_Test]:
    """Generate the predictions that are not stored; return all tests of the step."""
    encoders = build_encoders(config, run, step.modalities)
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
    prompts = PromptBuilder(config.prompt, tokenizer)
    folder = predictions_folder(run, config, step)
    model = None
    tests = []
    for modality in step.modalities:
        data, reader = open_data(config, run, modality, TEST, encoders[modality], prompts, world)
        for dataset, task in test_tasks(data):
            file = folder / f"{dataset}-{task}.jsonl"
            test = _Test(dataset, modality, task, file, tuple(data.fingerprint))
            tests.append(test)
            if share(file.exists()):
                continue
            if model is None:
                model = build_model(config, run, run / step.start, step.modalities, encoders)
                move_to(model, encoders, world.device)
                model.eval()
            generated = predict_test(
                *(file, config, model, tokenizer, prompts.end_ids, reader, data),
                *((dataset, task), world),
            )
            if generated.texts:
                figures = _figures(generated, tokenizer, config.evaluate.batch_size)
                metrics.write(f"generate/{test.name}", step.stage, figures)
            logger.info("%s: %d predictions", test.name, generated.items)
    return tests


def _figures(generated: Generated, tokenizer: Any, batch_size: int) -> dict[str, float]:
    """Return what generation took; an end token counts for every text."""
    ids = tokenizer(list(generated.texts), add_special_tokens=False)["input_ids"]
    return {
        "items": len(generated.texts),
        "tokens": sum(map(len, ids)) + len(ids),
        "batch_size": batch_size,
        "seconds": generated.seconds,
        "memory_gb": memory_gb(),
    }


def _score(
    run: Path, config: RunConfig, step: EvaluateStep, tests: Sequence[_Test], metrics: Metrics
) -> None:
    """Score the predictions; write the rows, what each item scored, and the run's results."""
    key = evaluation_key(run, config, step)
    manifest = read_manifest(run / step.start)
    rows, per_item = [], {}
    for test in tests:
        predictions = load_predictions(test.file)
        scored = score_test(test.task, predictions, config.evaluate)
        rows.append(_row(config, run, step, manifest, test, scored.figures, predictions))
        per_item[f"{test.modality}/{test.task}"] = scored.per_item
        _log(step, rows[-1], predictions, metrics)
    write_json(run / step.output / PER_ITEM, {"schema": 1, "key": key, "items": per_item})
    write_json(run / step.output / SCORES, {"schema": 1, "key": key, "rows": rows})
    _collect_results(run)


def _row(
    config: RunConfig,
    run: Path,
    step: EvaluateStep,
    manifest: Manifest,
    test: _Test,
    figures: Mapping[str, Any],
    predictions: Sequence[Prediction],
) -> dict[str, Any]:
    """Return one line of `results.jsonl`."""
    return {
        "schema": 1,
        "run": run.resolve().name,
        "method": config.method,
        "order": list(config.order),
        "seed": config.seed,
        "stage": step.stage,
        "stage_modality": step.modality,
        "modality": test.modality,
        "task": test.task,
        "dataset": test.dataset,
        "split": TEST,
        **figures,
        "majority": _majority(predictions) if test.task == "qa" else None,
        "model": manifest.model_sha256,
        "profile": config.profile,
        "limits": config.limits,
        "provenance": {
            "commit": commit(),
            "hardware": hardware(),
            "dtype": config.backbone.dtype,
            "test_data": list(test.fingerprints),
            "step": step.name,
        },
    }


def _majority(predictions: Sequence[Prediction]) -> float:
    """Share of the most frequent answer: what always saying the same would score."""
    counts = Counter(entry.references[0] for entry in predictions)
    return counts.most_common(1)[0][1] / len(predictions)


def _collected(run: Path) -> list[Path]:
    """Return the files of scores that the run's results are put together from."""
    return sorted(run.glob(f"stages/*/evaluation/{SCORES}"))


def _collect_results(run: Path) -> None:
    content = "\n".join(_lines(_collected(run))) + "\n"
    write_bytes(run / RESULTS, content.encode())


def _lines(files: Sequence[Path]) -> list[str]:
    return [
        json.dumps(row, ensure_ascii=False) for path in files for row in read_json(path)["rows"]
    ]


def _has_results(run: Path, lines: Sequence[str]) -> bool:
    path = run / RESULTS
    there = path.read_bytes().split(b"\n") if path.exists() else []
    return {line.encode() for line in lines} <= set(there)


def _log(
    step: EvaluateStep, row: Mapping[str, Any], said: Sequence[Prediction], metrics: Metrics
) -> None:
    """Send a score to the console, and with some of the texts to TensorBoard."""
    name = f"evaluate/{row['dataset']}-{row['task']}"
    metrics.write(name, step.stage, {row["metric"]: row["score"]})
    metrics.write_text(name, step.stage, _samples(said))
    logger.info(
        "%s  %s %s: %s %.4g (%d items)",
        *(step.name, row["dataset"], row["task"], row["metric"], row["score"]),
        row["count"],
    )


def _samples(predictions: Sequence[Prediction]) -> str:
    """Return a Markdown table of a few predictions, evenly spread over the test."""
    chosen = predictions[:: -(-len(predictions) // SHOWN) or 1]
    rows = [
        (entry.id, entry.question, entry.prediction, " / ".join(entry.references[:3]))
        for entry in chosen
    ]
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    table = [("item", "question", "prediction", "references"), ["---"] * 4, *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)
