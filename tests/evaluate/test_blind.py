"""The bare backbone without media: what it says, what that scores, and where it is shown."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train.conftest import _process_server as _process_server
from train.processes import run_ranks

from mera_ds.cli import main
from mera_ds.config import load_config, resolve_path
from mera_ds.data.dataset import TEST, ModalityData
from mera_ds.data.prompts import PromptBuilder
from mera_ds.evaluate.predictions import WITHOUT_MEDIA, load_predictions
from mera_ds.identity import backbone_folder, data_folders
from mera_ds.model.backbone import load_backbone, load_tokenizer


@pytest.fixture(scope="module")
def run(make_tiny_run: Callable[..., Path]) -> Path:
    run = make_tiny_run("order=[image, audio]")
    assert main(["without-media", str(run)]) == 0
    return run


def test_every_test_of_the_run_is_scored(run: Path) -> None:
    rows = json.loads((run / WITHOUT_MEDIA).read_text())["rows"]
    found = {(row["modality"], row["task"]) for row in rows}
    assert found == {(name, task) for name in ("image", "audio") for task in ("caption", "qa")}
    for row in rows:
        assert 0 <= row["score"] < 1
        assert row["count"] > 0
    assert {row["judge"] for row in rows if row["task"] == "qa"} == {"offline-exact"}


def test_it_says_what_transformers_says_to_the_text_alone(run: Path) -> None:
    config = load_config(run)
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
    llm = load_backbone(config.backbone, backbone_folder(config, run, None)).eval()
    data = ModalityData("image", data_folders(config, run, "image"), TEST)
    prompts = PromptBuilder(config.prompt, tokenizer)
    units = {data.unit_id(unit): unit for unit in data.units(["caption", "qa"])}
    files = sorted((run / "without-media").rglob("*image*-qa.jsonl"))
    predictions = [entry for file in files for entry in load_predictions(file)]
    assert len(predictions) >= 8
    for entry in predictions[:8]:
        unit = units[entry.id]
        pieces = prompts.build_text(data.text(unit), "", entry.id, supervised=False)
        ids = torch.tensor([[*pieces.prefix, *pieces.suffix]])
        said = llm.generate(
            ids, max_new_tokens=config.evaluate.max_new_tokens, do_sample=False, pad_token_id=0
        )
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert entry.prediction == text.strip()


def test_a_second_call_generates_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.stat().st_mtime_ns for path in (run / "without-media").rglob("*.jsonl")}
    assert main(["without-media", str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert "mera-ds report" in capsys.readouterr().out


def test_ranks_share_the_work_and_one_of_them_writes(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "without-media")
    (copy / WITHOUT_MEDIA).unlink()
    assert run_ranks(main, 2, ["without-media", str(copy)]) == [0, 0]
    rows = [json.loads((folder / WITHOUT_MEDIA).read_text())["rows"] for folder in (run, copy)]
    assert rows[0] == rows[1]
