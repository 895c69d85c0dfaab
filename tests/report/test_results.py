"""Reading run folders: what is accepted, replaced and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mera_ds.errors import DataError, InputError
from mera_ds.report.results import read_runs, read_score
from mera_ds.report.summary import summarise


def test_a_valid_line_is_read(row: dict[str, Any]) -> None:
    score = read_score(json.dumps(row), "results.jsonl:1")
    assert score.order == ("image", "video", "audio", "pointcloud")
    assert (score.stage, score.modality, score.task, score.score) == (2, "image", "qa", 0.358)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"extra": 1}, "extra"),
        ({"schema": 2}, "schema is 2"),
        ({"schema": True}, "schema is True"),
        ({"score": "0.3"}, "score is '0.3'"),
        ({"score": None}, "score is None"),
        ({"score": float("nan")}, "score is nan"),
        ({"score": 1.01}, "score is 1.01"),
        ({"score": -0.1}, "score is -0.1"),
        ({"count": 0}, "count 0"),
        ({"missing": 1001}, "missing is 1001"),
        ({"majority": 1.5}, "majority is 1.5"),
        ({"stage": 5}, "stage 5"),
        ({"stage": 0}, "stage 0"),
        ({"stage_modality": "audio"}, "stage 2"),
        ({"modality": "audio"}, "audio is not learnt at stage 2"),
        ({"method": "expert"}, "image is not learnt at stage 2"),
        ({"metric": "cider"}, "qa is measured by accuracy"),
        ({"metric": "bleu"}, "bleu"),
        ({"task": "vqa"}, "vqa"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(
    row: dict[str, Any], changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError) as error:
        read_score(json.dumps({**row, **changes}), "runs/mera/results.jsonl:7")
    message = str(error.value)
    assert message.startswith("runs/mera/results.jsonl:7: ")
    assert complaint in message


@pytest.mark.parametrize("line", ["", "{", "[]", "7", '{"schema": 1}'])
def test_a_broken_line_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(DataError, match=r"^results\.jsonl:3: "):
        read_score(line, "results.jsonl:3")


@pytest.mark.parametrize("key", ["score", "judge", "limits", "majority"])
def test_a_missing_key_is_refused_by_name(row: dict[str, Any], key: str) -> None:
    del row[key]
    with pytest.raises(DataError, match=f"missing key '{key}'"):
        read_score(json.dumps(row), "results.jsonl:1")


def test_a_later_line_replaces_an_earlier_one(make_run: Callable[..., Path]) -> None:
    folder = make_run("mera", "mera")
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    again = {**json.loads(lines[0]), "score": 12.5}
    path.write_text("\n".join([*lines, json.dumps(again)]) + "\n", encoding="utf-8")
    (run,) = read_runs([folder])
    assert run.scores[1, "image", "caption"].score == 12.5
    assert len(run.scores) == 20


def test_several_datasets_of_a_task_do_not_pass_unnoticed(make_run: Callable[..., Path]) -> None:
    folder = make_run("mera", "mera")
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    earlier = [{**line, "dataset": "coco", "score": 1.0} for line in lines if line["stage"] == 1]
    text = "".join(json.dumps(line) + "\n" for line in [*earlier, *lines])
    path.write_text(text, encoding="utf-8")
    (run,) = read_runs([folder])
    assert run.scores[1, "image", "caption"].dataset == "image"
    assert run.others == {("image", "caption", "coco"), ("image", "qa", "coco")}
    (section,) = summarise([run])
    (warning,) = [text for text in section.warnings() if text.startswith("image/qa was also")]
    assert "tested on coco" in warning


def test_results_of_another_run_are_refused(make_run: Callable[..., Path]) -> None:
    folder = make_run("mera", "mera")
    other = make_run("finetune", "finetune", "finetune")
    (folder / "results.jsonl").write_bytes((other / "results.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"results\.jsonl:1: method is 'finetune'"):
        read_runs([folder])


def test_folders_that_cannot_be_reported(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run given"):
        read_runs([])
    with pytest.raises(InputError, match="there is no run at"):
        read_runs([tmp_path / "absent"])
    folder = make_run("mera", "mera")
    with pytest.raises(InputError, match="given twice"):
        read_runs([folder, tmp_path / "." / "mera"])
    (folder / "results.jsonl").unlink()
    with pytest.raises(InputError, match="has no results yet; 'mera-ds run"):
        read_runs([folder])


def test_stages_of_before_an_addition_know_a_shorter_order(make_run: Callable[..., Path]) -> None:
    folder = make_run("mera", "mera")
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["modalities"]["imu"] = config["modalities"]["image"]
    config["order"].append("imu")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    (run,) = read_runs([folder])
    assert run.last_stage == 4
    config["order"].remove("video")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(DataError, match=r"results\.jsonl:1: order is"):
        read_runs([folder])
