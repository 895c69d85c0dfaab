"""Carrying out an evaluation step: model → predictions → scores → results.jsonl.

Predictions of a task are stored when the task is complete; a killed evaluation goes on with the
next task. `results.jsonl` of a run is put together anew from the scores of all its stages.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mera_ds.checkpoint import Manifest, read_manifest
from mera_ds.config import RunConfig, resolve_path
from mera_ds.data.dataset import TEST
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World, main_rank_first
from mera_ds.evaluate.generate import (
    Prediction,
    load_predictions,
    predict,
    save_predictions,
    test_items,
)
from mera_ds.evaluate.score import score_captions, score_questions
from mera_ds.features import open_data
from mera_ds.files import read_json, sha256_json, write_bytes, write_json
from mera_ds.identity import data_folders
from mera_ds.log import Metrics, logger
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders, build_model, move_to
from mera_ds.plan import EvaluateStep
from mera_ds.settings import dump
from mera_ds.shards.format import TASKS, read_index

SCORES = "scores.json"


def evaluation_key(run: Path, config: RunConfig, step: EvaluateStep) -> str:
    """Return the hash of everything that determines an evaluation's scores."""
    manifest = read_manifest(run / step.start)
    data = {
        modality: [
            read_index(folder / TEST).fingerprint for folder in data_folders(config, run, modality)
        ]
        for modality in step.modalities
    }
    return sha256_json(
        [manifest.key, manifest.model_sha256, dump(config.evaluate), dump(config.prompt), data]
    )


def evaluation_is_finished(run: Path, config: RunConfig, step: EvaluateStep) -> bool:
    """Return whether the scores exist and belong to the model and settings of now."""
    path = run / step.output / SCORES
    if not path.exists() or not (run / step.start / "manifest.json").exists():
        return False
    return bool(read_json(path)["key"] == evaluation_key(run, config, step))


def predictions_folder(run: Path, config: RunConfig, step: EvaluateStep) -> Path:
    """Return where an evaluation's predictions are kept; equal names, equal predictions."""
    return run / step.output / "predictions" / evaluation_key(run, config, step)[:16]


def run_evaluate_step(run: Path, config: RunConfig, step: EvaluateStep, world: World) -> None:
    """Evaluate a stage's model on its modalities; only rank 0 works, the others wait.

    Raises:
        InputError: if the model is not finished or test shards are missing.
    """
    with main_rank_first(world) as mine:
        if not mine:
            return
        if evaluation_is_finished(run, config, step):
            logger.info("%s is finished", step.name)
            return
        alone = World(rank=0, size=1, local_rank=world.local_rank)
        key = evaluation_key(run, config, step)
        manifest = read_manifest(run / step.start)
        predictions = _predictions(run, config, step, alone)
        rows = [
            _row(config, run, step, manifest, dataset, modality, task, found)
            for (dataset, modality, task), found in predictions.items()
        ]
        write_json(run / step.output / SCORES, {"schema": 1, "key": key, "rows": rows})
        _collect_results(run)
        _log(run, step, rows)


TaskName = tuple[str, str, str]
"""Dataset, modality, task."""


def _predictions(
    run: Path, config: RunConfig, step: EvaluateStep, world: World
) -> dict[TaskName, list[Prediction]]:
    """Return the predictions of all tasks, generating those that are not stored."""
    encoders = build_encoders(config, run, step.modalities)
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
    prompts = PromptBuilder(config.prompt, tokenizer)
    folder = predictions_folder(run, config, step)
    model = None
    found: dict[TaskName, list[Prediction]] = {}
    for modality in step.modalities:
        data, reader = open_data(config, run, modality, TEST, encoders[modality], prompts, world)
        for dataset, task in sorted({(data.dataset(u), data.task(u)) for u in data.units(TASKS)}):
            path = folder / f"{dataset}-{task}.jsonl"
            if not path.exists():
                if model is None:
                    model = build_model(config, run, run / step.start, step.modalities, encoders)
                    move_to(model, encoders, world.device)
                    model.eval()
                items = test_items(data, dataset, task, config.evaluate.limit)
                said = predict(
                    *(model, tokenizer, data, reader, items, config.evaluate),
                    *(prompts.end_ids, config.execution.decode),
                )
                save_predictions(path, said)
            found[(dataset, modality, task)] = load_predictions(path)
    return found


def _row(
    config: RunConfig,
    run: Path,
    step: EvaluateStep,
    manifest: Manifest,
    dataset: str,
    modality: str,
    task: str,
    predictions: Sequence[Prediction],
) -> dict[str, Any]:
    """Return one line of `results.jsonl`."""
    score = score_captions if task == "caption" else score_questions
    return {
        "schema": 1,
        "run": run.resolve().name,
        "method": config.method,
        "order": list(config.order),
        "seed": config.seed,
        "stage": step.stage,
        "stage_modality": step.modality,
        "modality": modality,
        "task": task,
        "dataset": dataset,
        "split": TEST,
        **score(predictions, config.evaluate),
        "majority": _majority(predictions) if task == "qa" else None,
        "model": manifest.model_sha256,
        "profile": config.profile,
        "limits": config.limits,
    }


def _majority(predictions: Sequence[Prediction]) -> float:
    """Share of the most frequent answer: what always saying the same would score."""
    counts = Counter(entry.references[0] for entry in predictions)
    return counts.most_common(1)[0][1] / len(predictions)


def _collect_results(run: Path) -> None:
    rows = [
        row
        for path in sorted(run.glob(f"stages/*/evaluation/{SCORES}"))
        for row in read_json(path)["rows"]
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_bytes(run / "results.jsonl", ("\n".join(lines) + "\n").encode())


def _log(run: Path, step: EvaluateStep, rows: Sequence[dict[str, Any]]) -> None:
    with Metrics(run, enabled=True) as metrics:
        for row in rows:
            name = f"evaluate/{row['dataset']}-{row['task']}"
            metrics.write(name, step.stage, {row["metric"]: row["score"]})
            logger.info(
                "%s  %s %s: %s %.4g (%d items)",
                *(step.name, row["dataset"], row["task"], row["metric"], row["score"]),
                row["count"],
            )
