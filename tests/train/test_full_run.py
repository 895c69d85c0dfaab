"""A whole run that tunes the backbone as a whole: stages, merges, sharing, export."""

import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from mera_ds.checkpoint import read_manifest
from mera_ds.cli import main
from mera_ds.config import load_config, load_profile
from mera_ds.errors import InputError
from mera_ds.files import FAILPOINT_VARIABLE, read_json
from mera_ds.model.build import build_encoders, build_model

from .processes import Ended, Ranks

pytestmark = pytest.mark.slow

SETTINGS = (
    "tuning=full",
    "order=[image,video,pointcloud]",
    *("align.max_steps=1", "tune.max_steps=2", "realign.max_steps=1", "tune.batch_size=4"),
    *("evaluate.limit=2", "evaluate.max_new_tokens=1"),
)
STAGES = ("stages/01-image", "stages/02-video", "stages/03-pointcloud")
Weights = dict[str, npt.NDArray[np.float32]]


def _command(*words: str) -> None:
    sys.exit(main([*words]))


def _run(*words: object, failpoint: str = "") -> Ended:
    environment = {FAILPOINT_VARIABLE: failpoint}
    return Ranks(_command, 1, *map(str, words), environment=environment).wait()[0]


@pytest.fixture(scope="module")
def finished(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run of three stages; its first merge was killed and went on."""
    run = make_tiny_run(*SETTINGS)
    killed = _run("run", run, failpoint="merge.before_publish")
    assert killed.exit_code == -signal.SIGKILL, killed.log
    ended = _run("run", run)
    assert ended.exit_code == 0, ended.log
    assert "02-video/tune: finished before" in ended.log
    return run


def _weights(product: Path) -> Weights:
    return {
        name: value
        for path in sorted((product / "backbone").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_a_merge_is_the_average_to_one_rounding(stage: int, finished: Path) -> None:
    folder = finished / STAGES[stage - 1]
    previous = _weights(finished / STAGES[stage - 2] / "model")
    tuned, merged = _weights(folder / "tuned"), _weights(folder / "merged")
    assert previous.keys() == tuned.keys() == merged.keys()
    for name, found in merged.items():
        old, new = previous[name].astype(np.float64), tuned[name].astype(np.float64)
        exact = (stage - 1) / stage * old + 1 / stage * new
        assert not np.array_equal(old, new), name
        assert (np.abs(found - exact) <= 0.501 * np.spacing(np.abs(found))).all(), name


def test_the_manifests_tell_how_it_came_about(finished: Path) -> None:
    previous = read_manifest(finished / STAGES[1] / "model")
    manifest = read_manifest(finished / STAGES[2] / "model")
    assert manifest.lineage == ()
    assert manifest.backbone is not None
    found = [(entry.modality, entry.coefficient) for entry in manifest.backbone.stages]
    assert found == [("image", "1"), ("video", "1/2"), ("pointcloud", "1/3")]
    assert manifest.backbone.stages[2].parent == previous.backbone_sha256
    assert read_manifest(finished / STAGES[2] / "merged").backbone == manifest.backbone
    assert Fraction(read_json(finished / STAGES[2] / "model/backbone/merge.json")["coefficient"])


def test_the_merged_weights_are_what_is_used(finished: Path) -> None:
    config = load_config(finished)
    encoders = build_encoders(config, finished, ["image"])
    product = finished / STAGES[2] / "model"
    model = build_model(config, finished, product, ["image"], encoders)
    merged = _weights(finished / STAGES[2] / "merged")
    used = dict(model.llm.named_parameters())
    assert merged.keys() == used.keys()
    for name, tensor in used.items():
        assert torch.equal(tensor, torch.from_numpy(merged[name])), name


def test_its_diagnosis_says_nothing_of_deltas_that_it_does_not_have(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "diagnosis"
    assert main(["diagnose", str(finished), "--samples", "2", "--out", str(out)]) == 0
    findings = read_json(out / "diagnosis.json")["findings"]
    assert {entry["stage"] for entry in findings} == {1, 2, 3}
    for entry in findings:
        assert entry["weight_drift"] == []
        assert len(entry["cosines"]) == 4


def test_an_export_holds_the_merged_weights(finished: Path, tmp_path: Path) -> None:
    assert main(["lineage", "export", str(finished), "--out", str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out/model.safetensors")
    merged = _weights(finished / STAGES[2] / "merged")
    assert exported.keys() == merged.keys()
    assert all(np.array_equal(exported[name], value) for name, value in merged.items())
    assert not (tmp_path / "out/merge.json").exists()


def test_another_run_takes_the_products_over(
    finished: Path, make_tiny_run: Callable[..., Path]
) -> None:
    other = make_tiny_run(*SETTINGS)
    ended = _run("run", finished, other, "--until", "02-video/merge")
    assert ended.exit_code == 0, ended.log
    assert ended.log.count("taken from there") == 5
    file = f"{STAGES[1]}/merged/backbone/model.safetensors"
    assert (other / file).samefile(finished / file)


def test_only_deltas_can_be_weighed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["reweight", str(finished), "image=1"],
        ["undo", str(finished)],
        ["export", str(finished), "--adapter", "--out", str(tmp_path / "out")],
    ):
        assert main(["lineage", *words]) == InputError.exit_code
        assert "was tuned as a whole (tuning: full)" in capsys.readouterr().err
    assert main(["lineage", "show", str(finished)]) == 0
    assert "stage 3 (pointcloud): tuned from " in capsys.readouterr().out


def test_a_changed_backbone_is_refused(finished: Path, make_tiny_run: Callable[..., Path]) -> None:
    run = make_tiny_run(*SETTINGS)
    ended = _run("run", finished, run, "--until", "01-image/tune")
    assert ended.exit_code == 0, ended.log
    path = next((run / STAGES[0] / "model/backbone").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # it is shared
    path.write_bytes(content)
    refused = _run("run", run, "--until", "02-video/align")
    assert refused.exit_code == 3
    assert f"{path} is missing, or was changed or damaged; restore it" in refused.log


def test_methods_on_deltas_need_deltas() -> None:
    with pytest.raises(InputError, match=r"merge\.method=ties works on LoRA's deltas"):
        load_profile("tiny", ["tuning=full", "merge.method=ties"])
