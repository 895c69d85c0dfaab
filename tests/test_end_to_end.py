"""The whole path with real processes: three methods learn four modalities of the profile `tiny`.

The runs, and the report that compares them, are made with the commands that the README prints.
"""

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from cli.commands import Ended, finish, readme_block, start, succeed, wait_for

from mera_ds.checkpoint import Manifest, read_manifest
from mera_ds.cli import main
from mera_ds.files import sha256_file

pytestmark = pytest.mark.slow

ORDER = ("image", "video", "audio", "pointcloud")
METHODS = ("expert", "finetune", "mera")
RUNS = " ".join(f"runs/tiny/{method}" for method in METHODS)
PNG = b"\x89PNG\r\n\x1a\n"
KILLS = 4


@pytest.fixture(scope="module")
def place(finished_runs: Path) -> Path:
    return finished_runs


@pytest.fixture(scope="module")
def runs(place: Path) -> Mapping[str, Path]:
    return {method: place / "runs/tiny" / method for method in METHODS}


def product(run: Path, stage: int, name: str = "model") -> Path:
    return run / f"stages/{stage:02d}-{ORDER[stage - 1]}/{name}"


def model(run: Path, stage: int, name: str = "model") -> Manifest:
    return read_manifest(product(run, stage, name))


def coefficients(manifest: Manifest) -> list[tuple[str, str]]:
    return [(entry.modality, entry.coefficient) for entry in manifest.lineage]


def results(run: Path) -> list[dict[str, Any]]:
    lines = (run / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def replayed(run: Path, stage: int) -> dict[str, list[str]]:
    path = product(run, stage, "realign") / "replay.json"
    ids: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))["ids"]
    return ids


def everything(folder: Path) -> dict[str, tuple[int, str]]:
    """Return the time of change and the hash of every file but the locks."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and "launch" not in path.parts
    }


class TestModels:
    def test_merging_makes_a_cumulative_moving_average(self, runs: Mapping[str, Path]) -> None:
        for stage in (1, 2, 3, 4):
            expected = [(name, f"1/{i}" if i > 1 else "1") for i, name in enumerate(ORDER, 1)]
            assert coefficients(model(runs["mera"], stage)) == expected[:stage]

    def test_fine_tuning_adds_all_deltas(self, runs: Mapping[str, Path]) -> None:
        for stage in (1, 2, 3, 4):
            expected = [(name, "1") for name in ORDER[:stage]]
            assert coefficients(model(runs["finetune"], stage)) == expected

    def test_experts_know_one_modality(self, runs: Mapping[str, Path]) -> None:
        for stage, name in enumerate(ORDER, 1):
            manifest = model(runs["expert"], stage)
            assert coefficients(manifest) == [(name, "1")]
            assert list(manifest.connectors) == [name]

    def test_realigning_leaves_the_backbone(self, runs: Mapping[str, Path]) -> None:
        for stage in (2, 3, 4):
            before, after = model(runs["mera"], stage, "merged"), model(runs["mera"], stage)
            assert after.lineage == before.lineage
            assert after.backbone_sha256 == before.backbone_sha256
            assert after.connectors.keys() == before.connectors.keys() == set(ORDER[:stage])
            for name, entry in after.connectors.items():
                assert entry.sha256 != before.connectors[name].sha256

    def test_every_delta_was_trained_on_the_stage_before(self, runs: Mapping[str, Path]) -> None:
        for method in ("finetune", "mera"):
            for stage in (2, 3, 4):
                parent = model(runs[method], stage).lineage[-1].parent
                assert parent == model(runs[method], stage - 1).backbone_sha256

    def test_files_are_those_of_their_manifests(self, runs: Mapping[str, Path]) -> None:
        checked = 0
        for folder in runs.values():
            for path in folder.glob("stages/*/*/manifest.json"):
                manifest = read_manifest(path.parent)
                for entry in (*manifest.lineage, *manifest.connectors.values()):
                    assert sha256_file(path.parent / entry.file) == entry.sha256
                    checked += 1
        assert checked > 100

    def test_nothing_unfinished_is_left(self, place: Path) -> None:
        assert not list(place.rglob("*.partial-*"))
        assert not list(place.rglob("step-??????"))


class TestSharing:
    @pytest.mark.parametrize(
        ("name", "owners"),
        [
            ("01-image/aligned/connectors/image", METHODS),
            ("01-image/model/deltas/01-image", METHODS),
            ("02-video/aligned/connectors/video", ("finetune", "mera")),
        ],
    )
    def test_equal_products_are_the_same_files(
        self, name: str, owners: tuple[str, ...], runs: Mapping[str, Path]
    ) -> None:
        files = {runs[method] / f"stages/{name}.safetensors" for method in owners}
        assert len({path.stat().st_ino for path in files}) == 1

    def test_also_under_another_name(self, runs: Mapping[str, Path]) -> None:
        """Fine-tuning's second model is what MERA merges."""
        delta = "deltas/02-video.safetensors"
        tuned = product(runs["finetune"], 2) / delta
        assert tuned.samefile(product(runs["mera"], 2, "tuned") / delta)

    def test_an_equal_model_is_asked_once(self, runs: Mapping[str, Path]) -> None:
        files = [path for run in runs.values() for path in run.glob("stages/01-*/**/*-qa.jsonl")]
        assert len(files) == len(METHODS)
        assert len({path.stat().st_ino for path in files}) == 1

    def test_experts_share_nothing_later(self, runs: Mapping[str, Path]) -> None:
        expert, mera = (product(runs[method], 2, "aligned") for method in ("expert", "mera"))
        assert read_manifest(expert).key != read_manifest(mera).key


class TestResults:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_stage_is_scored_on_what_it_has_learned(
        self, method: str, runs: Mapping[str, Path]
    ) -> None:
        rows = results(runs[method])
        found = [(row["stage"], row["modality"], row["task"]) for row in rows]
        stages = enumerate(ORDER, 1)
        learned = {
            stage: [name] if method == "expert" else list(ORDER[:stage]) for stage, name in stages
        }
        assert sorted(found) == sorted(
            (stage, name, task)
            for stage, names in learned.items()
            for name in names
            for task in ("caption", "qa")
        )

    def test_rows_say_what_they_belong_to(self, runs: Mapping[str, Path]) -> None:
        for method, folder in runs.items():
            for row in results(folder):
                assert (row["schema"], row["run"], row["method"]) == (1, method, method)
                assert row["model"] == model(folder, row["stage"]).model_sha256
                assert row["stage_modality"] == ORDER[row["stage"] - 1]
                assert (row["order"], row["seed"], row["profile"]) == (list(ORDER), 0, "tiny")
                assert (row["dataset"], row["split"]) == (row["modality"], "test")
                assert (row["count"], row["missing"]) == (16, 0)
                caption = row["task"] == "caption"
                assert row["metric"] == ("cider" if caption else "accuracy")
                assert (row["judge"] is None) == caption
                assert (row["majority"] is None) == caption
                assert (row["tokenizer"] is None) != caption
                assert row["limits"]

    def test_shared_models_have_the_same_scores(self, runs: Mapping[str, Path]) -> None:
        scores = {
            method: [(row["task"], row["score"]) for row in results(folder) if row["stage"] == 1]
            for method, folder in runs.items()
        }
        assert scores["expert"] == scores["finetune"] == scores["mera"]
        assert len(scores["mera"]) == 2


class TestReplay:
    @pytest.fixture(scope="class")
    def more(self, place: Path, runs: Mapping[str, Path]) -> Path:
        """Return a run that replays 50 % instead of 25 % and shares all that comes before."""
        succeed("mera-ds init runs/tiny/more --profile tiny replay.percent=50", place)
        command = "mera-ds run runs/tiny/mera runs/tiny/more --until 02-video/realign"
        ended = succeed(command, place)
        taken = [line for line in ended.errors.splitlines() if "taken from there" in line]
        assert len(taken) == 5
        return place / "runs/tiny/more"

    def test_lists_are_nested(self, more: Path, runs: Mapping[str, Path]) -> None:
        few, many = replayed(runs["mera"], 2), replayed(more, 2)
        assert few.keys() == many.keys() == {"image", "video"}
        for name, ids in few.items():
            assert len(ids) == 24
            assert len(many[name]) == 48
            assert set(ids) < set(many[name])

    def test_later_stages_replay_the_same(self, runs: Mapping[str, Path]) -> None:
        stages = {stage: replayed(runs["mera"], stage) for stage in (2, 3, 4)}
        assert list(stages[4]) == list(ORDER)
        for stage, lists in stages.items():
            assert lists == {name: stages[4][name] for name in ORDER[:stage]}

    def test_tasks_keep_their_shares(self, runs: Mapping[str, Path]) -> None:
        for ids in replayed(runs["mera"], 4).values():
            tasks = [unit.partition("#")[2] for unit in ids]
            assert tasks.count("0") == tasks.count("1") == 12

    def test_another_share_gives_another_model(self, more: Path, runs: Mapping[str, Path]) -> None:
        assert model(more, 2).backbone_sha256 == model(runs["mera"], 2).backbone_sha256
        assert model(more, 2).model_sha256 != model(runs["mera"], 2).model_sha256


class TestReport:
    def test_tables_and_figures(self, place: Path, runs: Mapping[str, Path]) -> None:
        *_, command = readme_block("mera-ds init runs/tiny/expert")
        text = succeed(f"{command} runs/tiny/finetune", place).output
        assert "scores after every stage, profile tiny" in text
        assert "Backward" in text
        assert "Forward" in text
        for method in METHODS:
            assert str(Path("runs/tiny") / method) in text
        out = place / "runs/tiny/report"
        names = {"report.md", "report.html", "tables.csv", "tables.tex", "provenance.csv"}
        names |= {f"{name}.{kind}" for name in ("scores", "gains") for kind in ("png", "svg")}
        assert {path.name for path in out.iterdir() if path.is_file()} == names
        for figure in ("scores.png", "gains.png"):
            assert (out / figure).read_bytes().startswith(PNG)
        for name in names:
            assert str(Path("runs/tiny/report") / name) in text

    def test_as_printed(self, place: Path, runs: Mapping[str, Path]) -> None:
        *_, command = readme_block("mera-ds init runs/tiny/expert")
        succeed(command, place)


class TestJudges:
    def test_as_printed(self, place: Path, runs: Mapping[str, Path]) -> None:
        (command,) = readme_block("mera-ds judge-agreement")
        said = succeed(command, place).output
        assert "kappa" in said
        assert "accuracy by offline-containment" in said


class TestDiagnosisByScores:
    def diagnose(self, run: Path) -> list[dict[str, Any]]:
        assert main(["diagnose", str(run), "--samples", "4", "--scores"]) == 0
        assert (run / "report/diagnosis-scores.png").read_bytes().startswith(PNG)
        found = json.loads((run / "report/diagnosis-scores.json").read_text())
        assert found["measure"] == "score lost, %"
        return list(found["findings"])

    def test_with_the_newest_connectors_it_is_what_the_evaluations_found(
        self, runs: Mapping[str, Path], tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(runs["mera"], tmp_path / "mera"))
        rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
        scores = {(row["stage"], row["modality"], row["task"]): row["score"] for row in rows}
        found = self.diagnose(run)
        assert len(found) == 10
        for row in found:
            kept = [
                scores[row["stage"], row["modality"], task] / first
                for task in ("caption", "qa")
                if (first := scores[row["learnt_at"], row["modality"], task]) > 0
            ]
            assert row["newest_connector"] == pytest.approx(100 - 100 * fmean(kept))
            assert row["when_learnt"] == 0
        predictions = list((run / "diagnosis").rglob("*.jsonl"))
        assert len(predictions) == 2 * 6  # of each old modality, with its old connector
        assert any(row["misalignment"] for row in found)
        times = [path.stat().st_mtime_ns for path in predictions]
        assert self.diagnose(run) == found
        assert [path.stat().st_mtime_ns for path in predictions] == times

    def test_without_realigning_nothing_is_generated(
        self, runs: Mapping[str, Path], tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(runs["finetune"], tmp_path / "finetune"))
        found = self.diagnose(run)
        assert not (run / "diagnosis").exists()
        assert not any(row["misalignment"] for row in found)
        assert any(row["forgetting"] for row in found)
        path = run / "stages/01-image/evaluation/scores.json"
        scores = json.loads(path.read_text())
        rows = [row | {"score": 0.0} for row in scores["rows"]]
        path.write_text(json.dumps(scores | {"rows": rows}))
        ended = finish(start(f"mera-ds diagnose {run} --scores", run))
        assert ended.status == 2
        assert "image scored 0 on all its tests when it was learnt" in ended.errors

    def test_scores_of_another_judge_are_not_compared_with_those_of_now(
        self, runs: Mapping[str, Path], tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(runs["finetune"], tmp_path / "finetune"))
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("tokenizer: auto", "tokenizer: raw"))
        before = self.diagnose(run)
        assert main(["run", str(run)]) == 0
        assert self.diagnose(run) == before


class TestRunningAgain:
    def test_finished_runs_are_left_alone(self, place: Path, runs: Mapping[str, Path]) -> None:
        *_, command, _ = readme_block("mera-ds init runs/tiny/expert")
        assert command == "mera-ds run runs/tiny/expert runs/tiny/mera"
        before = everything(place)
        ended = succeed(command, place)
        lines = ended.errors.splitlines()
        assert [line for line in lines if not line.endswith(": finished before")] == []
        assert len(lines) == 4 * 3 + 18
        assert everything(place) == before


class TestStopping:
    """Stages that were stopped again and again end as those that nothing has disturbed."""

    def assert_undisturbed(self, folder: Path, mera: Path, stages: int) -> None:
        for stage in range(1, stages + 1):
            assert model(folder, stage).model_sha256 == model(mera, stage).model_sha256
        expected = [row for row in results(mera) if row["stage"] <= stages]
        assert [{**row, "run": "mera"} for row in results(folder)] == expected
        assert not list(folder.rglob("*.partial-*"))

    def test_kill_at_random_times(self, runs: Mapping[str, Path], tmp_path: Path) -> None:
        succeed("mera-ds init killed --profile tiny", tmp_path)
        random_times = random.Random(2)
        kills = 0
        for attempt in range(KILLS):
            log = tmp_path / f"{attempt}.log"
            if not kill_in_work(tmp_path, log, random_times.uniform(0.0, 4.0)):
                break
            kills += 1
        command = "mera-ds run killed --until video execution.save_every=3"
        ended = succeed(command, tmp_path, MERA_CACHE=str(tmp_path / "cache"))
        assert kills >= 3, ended
        killed, mera = tmp_path / "killed", runs["mera"]
        self.assert_undisturbed(killed, mera, stages=2)
        assert model(killed, 2, "merged").key == model(mera, 2, "merged").key
        assert replayed(killed, 2) == replayed(mera, 2)

    def test_stop_signals(self, runs: Mapping[str, Path], tmp_path: Path) -> None:
        """In training the state is saved first; at other times there is nothing to save."""
        succeed("mera-ds init stopped --profile tiny", tmp_path)
        folder = tmp_path / "stopped"
        command = "mera-ds run stopped --until image execution.save_every=1"
        step = folder / "stages/01-image/tune/step-000004"
        ended = self.stop(command, tmp_path, signal.SIGTERM, step)
        assert "stopping at the end of this step" in ended.errors
        assert ended.message.startswith("01-image/tune: stopped at step ")
        assert ended.message.endswith(" of 30, saved; run the same command to continue")
        predictions = folder / "stages/01-image/evaluation/predictions"
        ended = self.stop(command, tmp_path, signal.SIGINT, predictions)
        assert "continuing from stopped/stages/01-image/tune/step-0000" in ended.errors
        assert ended.message == "stopped; run the same command to continue"
        succeed(command, tmp_path)
        self.assert_undisturbed(folder, runs["mera"], stages=1)

    def stop(self, command: str, place: Path, number: signal.Signals, at: Path) -> Ended:
        """Start a command, send it a signal when a file is there, and return how it ended."""
        process = start(command, place)
        wait_for(at.exists, process)
        process.send_signal(number)
        ended = finish(process, command)
        assert ended.status == 143, ended
        return ended


def kill_in_work(place: Path, log: Path, seconds: float) -> bool:
    """Kill a run some time after it has begun to work; return False if it ended before."""
    command = f"mera-ds run killed --until video execution.save_every=3 2> {log}"
    process = start(command, place, {"MERA_CACHE": str(place / "cache")})

    def at_work_or_done() -> bool:
        return process.poll() is not None or "── killed" in log.read_text(encoding="utf-8")

    wait_for(log.exists, process)
    wait_for(at_work_or_done, process)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL
