"""What runs took, from logs written by hand."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mera_ds.config import RunConfig
from mera_ds.files import write_json
from mera_ds.manifest import SCHEMA
from mera_ds.methods.steps import learn
from mera_ds.plan import DataPart, FisherStep, Plan, load_plan, save_plan
from mera_ds.report import write_report
from mera_ds.report.costs import Cost, run_costs
from mera_ds.report.results import read_runs

MakeRun = Callable[..., Path]


def log(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def steps(name: str, times: list[float], memory: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"name": name, "step": step, "time": time, "memory_gb": memory + step / 100}
        for step, time in enumerate(times, start=1)
    ]


@pytest.fixture
def runs(make_run: MakeRun, config: RunConfig) -> list[Path]:
    """Return a run that trained on two ranks, and one that took over its products."""
    folders = [make_run("one", "finetune", "finetune"), make_run("two", "ewc", "ewc")]
    for folder in folders:
        plan = Plan(
            method="finetune", steps=learn(config, 1, "image", None, "stages/01-image/model")
        )
        save_plan(plan, folder / "plan.json")
        for step in plan.steps:
            facts = {"schema": SCHEMA, "key": f"key of {step.name}", "step": step.name}
            facts |= {"base_sha256": "b", "lineage": [], "connectors": {}, "provenance": {}}
            write_json(folder / step.output / "manifest.json", facts)
    process = {"commit": "c", "hardware": "a GPU", "ranks": 2}
    log(folders[0], "processes.jsonl", [{"time": 99.0, **process}])
    log(folders[0], "metrics.jsonl", steps("01-image/align", [100, 110, 120]))
    log(folders[0], "metrics.jsonl", steps("01-image/tune", [200, 210, 220, 230], 3.0))
    said = {"name": "generate/image-qa", "step": 1, "time": 300.0}
    figures = {"items": 50, "tokens": 400, "batch_size": 8, "seconds": 5.0, "memory_gb": 2.0}
    log(folders[0], "metrics.jsonl", [{**said, **figures}])
    return folders


def costs(folders: list[Path]) -> list[Cost]:
    found = run_costs(read_runs(folders))
    return [found[folder] for folder in folders]


def test_time_counts_every_rank_and_the_first_step(runs: list[Path]) -> None:
    one, _ = costs(runs)
    assert one.train_hours == pytest.approx(2 * (30 + 40) / 3600)
    assert one.train_memory_gb == pytest.approx(3.04)
    assert one.generate_seconds == pytest.approx(2 * 5 / 50)
    assert one.token_milliseconds == pytest.approx(1000 * 2 * 5 / 400)
    assert one.batch_sizes == (8,)
    assert (one.generate_memory_gb, one.hardware) == (2.0, ("a GPU",))


def test_a_product_taken_over_took_what_it_took_there(runs: list[Path]) -> None:
    one, two = costs(runs)
    assert (two.train_hours, two.train_memory_gb) == (one.train_hours, one.train_memory_gb)
    assert (two.generate_seconds, two.hardware) == (None, ("a GPU",))


def test_a_step_done_again_after_a_kill_counts_once(runs: list[Path]) -> None:
    log(runs[0], "metrics.jsonl", steps("01-image/tune", [0, 0, 900, 910], 3.0)[2:])
    assert costs(runs)[0].train_hours == pytest.approx(2 * (30 + 40) / 3600)


def test_the_time_between_two_processes_is_not_counted(runs: list[Path]) -> None:
    """Stopped behind its fourth step, resumed an hour later on one rank, in 20 s per step."""
    log(runs[0], "processes.jsonl", [{"time": 3800.0, "commit": "c", "hardware": "h", "ranks": 1}])
    rows = steps("01-image/tune", [0, 0, 0, 0, 3830, 3850], 3.0)[4:]
    log(runs[0], "metrics.jsonl", rows)
    assert costs(runs)[0].train_hours == pytest.approx((2 * 30 + 6 * 20) / 3600)


def test_what_is_not_recorded_is_not_guessed(runs: list[Path]) -> None:
    (runs[0] / "metrics.jsonl").unlink()
    assert costs(runs)[0] == Cost(None, None, None, None, (), None, (), {})


def test_measuring_importance_counts_where_it_was_recorded(
    runs: list[Path], config: RunConfig
) -> None:
    one, _ = costs(runs)
    plan = load_plan(runs[0] / "plan.json")
    fisher = FisherStep(
        name="02-video/fisher",
        stage=2,
        modality="video",
        start=plan.steps[-1].output,
        data=(DataPart(modality="image", percent=1.0),),
        previous=None,
        decay=1.0,
        output="stages/02-video/fisher",
    )
    save_plan(Plan(method="ewc", steps=(*plan.steps, fisher)), runs[0] / "plan.json")
    assert costs(runs)[0] == one
    for seconds in (3.0, 5.0):  # the first time its process was killed behind it
        row = {"name": fisher.name, "step": 2, "time": 240.0, "seconds": seconds}
        log(runs[0], "metrics.jsonl", [{**row, "samples": 10, "memory_gb": 7.0}])
    found, _ = costs(runs)
    assert found.train_hours == pytest.approx(2 * (30 + 40 + 5) / 3600)
    assert found.train_memory_gb == 7.0


def test_the_commit_that_trained_each_stage_is_said(runs: list[Path], tmp_path: Path) -> None:
    """Also where another run of the report trained it; of what no log tells, nothing."""
    found = costs(runs)
    assert [cost.commits for cost in found] == [{1: ("c",)}, {1: ("c",)}]
    write_report(runs, tmp_path / "out")
    rows = csv.DictReader((tmp_path / "out" / "provenance.csv").open(encoding="utf-8"))
    said = {row["stage"]: row["trained_by_commit"] for row in rows if row["run"] == "two"}
    assert said == {"1": "c", "2": "-", "3": "-", "4": "-"}
