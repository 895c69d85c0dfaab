"""Run folders on disk, filled with the paper's raw scores (`paper_scores.json`)."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mera_ds.config import (
    BackboneConfig,
    ComponentConfig,
    LoraConfig,
    ModalityConfig,
    PhaseConfig,
    PromptConfig,
    ReplayConfig,
    RunConfig,
    save_config,
)

TASKS = ("caption", "qa")


@pytest.fixture(scope="session")
def paper() -> dict[str, Any]:
    """Return the raw scores of the paper's Tables 9 and 10, and its Tables 2, 4 and 5."""
    path = Path(__file__).with_name("paper_scores.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def config() -> RunConfig:
    """Return a configuration with the four modalities of the paper."""
    part = ComponentConfig(kind="mlp")
    modality = ModalityConfig(
        data=("{run}/data",), encoder=part, connector=part, caption_prompt="Describe it."
    )
    phase = PhaseConfig(tasks=("caption", "qa"), batch_size=16, lr_connector=1e-3, lr_backbone=1e-4)
    order = ("image", "video", "audio", "pointcloud")
    return RunConfig(
        profile="pocket",
        limits="A test profile.",
        order=order,
        backbone=BackboneConfig(path="{cache}/backbone"),
        prompt=PromptConfig(),
        modalities=dict.fromkeys(order, modality),
        lora=LoraConfig(),
        align=phase,
        tune=phase,
        realign=phase,
    )


@pytest.fixture
def row() -> dict[str, Any]:
    """Return one valid line of results.jsonl as a mapping."""
    return {
        "schema": 1,
        "run": "mera",
        "method": "mera",
        "order": ["image", "video", "audio", "pointcloud"],
        "seed": 0,
        "stage": 2,
        "stage_modality": "video",
        "modality": "image",
        "task": "qa",
        "dataset": "image",
        "split": "test",
        "metric": "accuracy",
        "score": 0.358,
        "count": 1000,
        "missing": 0,
        "majority": 0.125,
        "judge": "offline-exact",
        "tokenizer": None,
        "references_sha256": "ab" * 32,
        "model": "cd" * 32,
        "profile": "pocket",
        "limits": "A test profile.",
    }


@pytest.fixture
def make_run(
    tmp_path: Path, config: RunConfig, row: dict[str, Any], paper: dict[str, Any]
) -> Callable[..., Path]:
    """Return a function that writes a run folder with the paper's scores of one method."""

    def make(
        name: str,
        method: str,
        source: str = "mera-10",
        order: str = "sequential",
        *,
        stages: int = 4,
        scale: float = 1.0,
        judge: str = "offline-exact",
        missing: int = 0,
        percent: float = 10.0,
        **changes: Any,
    ) -> Path:
        table = paper[order]
        expert = [{name: scores} for name, scores in table["experts"].items()]
        learnt = expert if method == "expert" else table["methods"][source]
        replay = ReplayConfig(percent=percent)
        settings = {"method": method, "order": tuple(table["order"]), "replay": replay, **changes}
        found = dataclasses.replace(config, **settings)
        save_config(found, tmp_path / name / "config.yaml")
        lines = []
        for stage, scores in enumerate(learnt[:stages], start=1):
            for modality, pair in scores.items():
                for task, score in zip(TASKS, pair, strict=True):
                    caption = task == "caption"
                    line = {
                        **row,
                        "run": name,
                        "method": method,
                        "order": table["order"],
                        "seed": found.seed,
                        "profile": found.profile,
                        "stage": stage,
                        "stage_modality": table["order"][stage - 1],
                        "modality": modality,
                        "task": task,
                        "dataset": modality,
                        "metric": "cider" if caption else "accuracy",
                        "score": score * scale,
                        "majority": None if caption else 0.125,
                        "judge": None if caption else judge,
                        "tokenizer": "ptb-python" if caption else None,
                        "count": row["count"] - missing,
                        "missing": missing,
                    }
                    lines.append(json.dumps(line) + "\n")
        (tmp_path / name / "results.jsonl").write_text("".join(lines), encoding="utf-8")
        return tmp_path / name

    return make
