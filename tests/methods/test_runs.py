"""Three stages of the methods that train otherwise, in real runs made by `mera-ds study`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from cli.commands import finish, start, succeed

from mera_ds.checkpoint import load_delta, load_part
from mera_ds.config import load_config
from mera_ds.manifest import Manifest, read_manifest
from mera_ds.train.penalty import load_importance

pytestmark = pytest.mark.slow

ORDER = ("image", "pointcloud", "video")
GRID = f"""
profile: tiny
settings:
  align.max_steps: 2
  tune.max_steps: 3
  realign.max_steps: 2
  evaluate.limit: 2
  evaluate.max_new_tokens: 2
  replay.percent: 10
  ewc.percent: 5
orders: {{short: [{", ".join(ORDER)}]}}
seeds: [0]
runs:
  replay: {{method: replay}}
  ewc: {{method: ewc}}
  pathweave: {{method: pathweave+realign}}
"""


@pytest.fixture(scope="module")
def place(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished study."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "grid.yaml").write_text(GRID)
    ended = succeed("mera-ds study grid.yaml --out runs", folder)
    assert "run 3 of 3: runs/pathweave-short-s0" in ended.errors
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> Mapping[str, Path]:
    return {name: place / f"runs/{name}-short-s0" for name in ("replay", "ewc", "pathweave")}


def product(run: Path, stage: int, name: str = "model") -> Path:
    return run / f"stages/{stage:02d}-{ORDER[stage - 1]}/{name}"


def model(run: Path, stage: int, name: str = "model") -> Manifest:
    return read_manifest(product(run, stage, name))


class TestSharing:
    def test_the_first_stage_is_trained_once(self, runs: Mapping[str, Path]) -> None:
        delta = "deltas/01-image.safetensors"
        files = {(product(run, 1) / delta).stat().st_ino for run in runs.values()}
        assert len(files) == 1

    def test_a_run_that_was_made_otherwise_is_refused(self, place: Path) -> None:
        command = "mera-ds study grid.yaml --out runs tune.max_steps=4"
        ended = finish(start(command, place), command)
        assert "runs/replay-short-s0 was made with other settings than the grid" in ended.message


class TestReplay:
    def test_old_connectors_are_tuned_and_lora_is_folded(self, runs: Mapping[str, Path]) -> None:
        for stage in (2, 3):
            before, after = model(runs["replay"], stage - 1), model(runs["replay"], stage)
            assert [entry.coefficient for entry in after.lineage] == ["1"] * stage
            for name in ORDER[: stage - 1]:
                assert after.connectors[name].sha256 != before.connectors[name].sha256

    def test_its_list_names_old_units_in_part_and_new_ones_all(
        self, runs: Mapping[str, Path]
    ) -> None:
        path = product(runs["replay"], 3, "tune") / "replay.json"
        ids = json.loads(path.read_text())["ids"]
        assert {name: len(entry) for name, entry in ids.items()} == {
            "image": 10,
            "pointcloud": 10,
            "video": 96,
        }


class TestEwc:
    def test_one_pair_is_carried_through_all_stages(self, runs: Mapping[str, Path]) -> None:
        for stage in (1, 2, 3):
            manifest = model(runs["ewc"], stage)
            (entry,) = manifest.lineage
            assert (entry.stage, entry.modality) == (stage, ORDER[stage - 1])
            assert set(manifest.connectors) == set(ORDER[:stage])

    def test_it_goes_on_from_where_it_was(self, runs: Mapping[str, Path]) -> None:
        """Three steps of at most 3e-3 each; fresh factors would differ by more."""
        old, new = (
            load_delta(product(runs["ewc"], stage), model(runs["ewc"], stage).lineage[-1])
            for stage in (1, 2)
        )
        assert all(float((new[name] - old[name]).abs().max()) <= 0.0091 for name in old)
        assert any(float(old[name].abs().max()) > 0.1 for name in old)

    def test_importances_add_up(self, runs: Mapping[str, Path]) -> None:
        first, second = (load_importance(product(runs["ewc"], s, "fisher")) for s in (2, 3))
        assert all(bool((second[name] >= first[name]).all()) for name in first)
        assert any(bool((second[name] > first[name]).any()) for name in first)
        assert all(bool((entry >= 0).all()) for entry in first.values())

    def test_what_measuring_takes_is_recorded(self, runs: Mapping[str, Path]) -> None:
        lines = (runs["ewc"] / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["name"].endswith("/fisher")]
        assert [row["name"] for row in rows] == ["02-pointcloud/fisher", "03-video/fisher"]
        assert all(row["samples"] > 0 and row["seconds"] > 0 for row in rows)

    def test_two_launched_ranks_measure_the_same(
        self, place: Path, runs: Mapping[str, Path]
    ) -> None:
        copy = place / "launched"
        shutil.copytree(runs["ewc"], copy)
        shutil.rmtree(product(copy, 2, "fisher"))
        until = "--until 02-pointcloud/fisher"
        execution = "execution.launcher=torchrun execution.processes=2"
        succeed(f"mera-ds run launched {until} {execution}", place)
        found, expected = (
            load_importance(product(run, 2, "fisher")) for run in (copy, runs["ewc"])
        )
        for name, entry in expected.items():
            assert torch.allclose(found[name], entry, rtol=1e-4), name

    def test_undoing_names_the_model_before(self, place: Path, runs: Mapping[str, Path]) -> None:
        command = f"mera-ds lineage undo {runs['ewc']}"
        ended = finish(start(command, place), command)
        assert ended.status == 2
        assert f"the model before it is {product(runs['ewc'], 2)}" in ended.message

    def test_it_is_not_what_fine_tuning_learns(self, runs: Mapping[str, Path]) -> None:
        assert (
            model(runs["ewc"], 2).lineage[-1].sha256 != model(runs["replay"], 2).lineage[-1].sha256
        )


class TestPathWeave:
    def test_pairs_are_kept_and_gated(self, runs: Mapping[str, Path]) -> None:
        assert model(runs["pathweave"], 1).weave is None
        for stage in (2, 3):
            manifest = model(runs["pathweave"], stage)
            assert [entry.stage for entry in manifest.lineage] == list(range(1, stage + 1))
            assert manifest.weave is not None
            tensors = load_part(product(runs["pathweave"], stage), manifest.weave)
            gates = [entry for name, entry in tensors.items() if name.endswith(".gate")]
            assert gates
            assert all(gate.shape[:2] == (2, stage) and bool(gate.any()) for gate in gates)

    def test_old_pairs_do_not_change(self, runs: Mapping[str, Path]) -> None:
        first, last = model(runs["pathweave"], 1), model(runs["pathweave"], 3)
        assert last.lineage[0].sha256 == first.lineage[0].sha256

    def test_realigning_leaves_the_backbone_woven(self, runs: Mapping[str, Path]) -> None:
        tuned, realigned = model(runs["pathweave"], 2, "tuned"), model(runs["pathweave"], 2)
        assert realigned.backbone_sha256 == tuned.backbone_sha256
        assert realigned.backbone_sha256 != model(runs["ewc"], 2).backbone_sha256
        for name in ORDER[:2]:
            assert realigned.connectors[name].sha256 != tuned.connectors[name].sha256

    def test_what_needs_a_sum_of_deltas_refuses_it(self, runs: Mapping[str, Path]) -> None:
        command = f"mera-ds lineage export {runs['pathweave']} --out hf"
        ended = finish(start(command, runs["pathweave"]), command)
        assert "its adapters are gated token by token" in ended.message
        assert not (runs["pathweave"] / "hf").exists()


def test_killed_in_stage_3_they_end_as_if_they_had_not_been(
    runs: Mapping[str, Path], tmp_path: Path
) -> None:
    """First EWC is killed behind two of three steps, then PathWeave behind one."""
    for name in ("ewc", "pathweave"):
        shutil.copytree(runs[name], tmp_path / name)
        for folder in ("model", "tuned", "evaluation"):
            shutil.rmtree(product(tmp_path / name, 3, folder), ignore_errors=True)
    command = "mera-ds run ewc pathweave --until 03-video/tune execution.save_every=1"
    kill = {"MERA_FAILPOINT": "train.step:3"}
    states = []
    for _ in range(2):
        assert finish(start(command, tmp_path, kill)).status == -9
        states.append({path.parts[-5] for path in tmp_path.glob("*/stages/03-*/tune/step-*")})
    assert states == [{"ewc"}, {"pathweave"}]
    succeed(command, tmp_path)
    for name, made in (("ewc", "model"), ("pathweave", "tuned")):
        expected, found = model(runs[name], 3, made), model(tmp_path / name, 3, made)
        assert found.model_sha256 == expected.model_sha256


class TestDiagnosis:
    @pytest.fixture(scope="class")
    def findings(self, runs: Mapping[str, Path]) -> Mapping[str, list[dict[str, float]]]:
        found = {}
        for name in ("ewc", "pathweave"):
            ended = succeed(f"mera-ds diagnose {runs[name]} --samples 4", runs[name])
            assert "Misaligned" in ended.output
            report = runs[name] / "report"
            assert (report / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
            found[name] = json.loads((report / "diagnosis.json").read_text())["findings"]
        return found

    def test_nothing_is_lost_when_a_modality_was_just_learnt(
        self, findings: Mapping[str, list[dict[str, float]]]
    ) -> None:
        rows = [row for entry in findings.values() for row in entry]
        just = [row for row in rows if row["stage"] == row["learnt_at"]]
        assert len(just) == 6
        for row in just:
            assert row["old_connector"] == row["newest_connector"] == row["when_learnt"]
            assert min(row["cosines"]) == pytest.approx(1.0, abs=1e-5)
            assert not any(row["weight_drift"])

    def test_without_realigning_all_that_is_lost_is_forgotten(
        self, findings: Mapping[str, list[dict[str, float]]]
    ) -> None:
        for row in findings["ewc"]:
            assert row["misalignment"] == 0
            if row["stage"] > row["learnt_at"]:
                assert row["forgetting"] != 0
                assert min(row["weight_drift"]) > 0
                assert max(row["cosines"]) < 1

    def test_realigning_shows_what_was_misaligned(
        self, findings: Mapping[str, list[dict[str, float]]]
    ) -> None:
        later = [row for row in findings["pathweave"] if row["stage"] > row["learnt_at"]]
        assert len(later) == 3
        for row in later:
            assert row["misalignment"] != 0
            total = row["old_connector"] - row["when_learnt"]
            assert row["misalignment"] + row["forgetting"] == pytest.approx(total)
            assert row["weight_drift"] == []


def test_the_settings_of_the_methods_are_in_the_configuration(runs: Mapping[str, Path]) -> None:
    config = load_config(runs["ewc"])
    assert (config.method, config.ewc.percent, config.ewc.strength) == ("ewc", 5.0, 1.0)
