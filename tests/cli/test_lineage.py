"""Changing one's mind about a run: the lineage commands and the merge sweep."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mera_ds.checkpoint import read_manifest
from mera_ds.cli import main
from mera_ds.errors import InputError
from mera_ds.merge.state_dicts import prepare_merge

from .commands import listing, succeed

STAGE = "stages/02-video"
PNG = b"\x89PNG\r\n\x1a\n"
Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Return a function that gives a command, which must end with a status, and what it says."""

    def give(*words: object, status: int = 0) -> str:
        ended = main([str(word) for word in words])
        said = capsys.readouterr()
        assert ended == status, said
        return said.err if status else said.out

    return give


@pytest.mark.slow
class TestLineage:
    def test_show(self, merged: Path, say: Say) -> None:
        output = say("lineage", "show", merged, "--modality", "video", "--model", "merged")
        manifest = read_manifest(merged / STAGE / "merged")
        assert f"backbone {manifest.backbone_sha256[:12]}" in output
        rows = [line.split() for line in output.splitlines() if line.split()[0] in ("1", "2")]
        assert [row[1:5] for row in rows] == [["image", "1", "2", "8"], ["video", "1/2", "2", "8"]]
        assert rows[1][-1] == manifest.lineage[1].parent[:12]
        assert "stages/01-image/model: model" in say("lineage", "show", merged)

    def test_reweight_leaves_everything_as_it_was(self, merged: Path, say: Say) -> None:
        before = listing(merged)
        words = ("lineage", "reweight", merged, "--stage", 2, "--model", "merged")
        say(*words, "image=1/2", "video=0.75", "--as", "mine")
        manifest = read_manifest(merged / STAGE / "reweighted-mine")
        assert [entry.coefficient for entry in manifest.lineage] == ["1/2", "3/4"]
        after = listing(merged)
        assert {name: after[name] for name in before} == before
        assert "is finished" in say(*words, "image=1/2", "video=0.75", "--as", "mine")
        message = say(*words, "image=1", "--as", "mine", status=2)
        assert "delete that folder" in message

    def test_reweight_by_a_method(self, merged: Path, say: Say) -> None:
        words = ("lineage", "reweight", merged, "--stage", 2, "--model", "merged", "--method")
        say(*words, "scale", "rule=constant", "value=0.3", "--as", "a")
        lineage = read_manifest(merged / STAGE / "reweighted-a").lineage
        assert [float(entry.coefficient) for entry in lineage] == [1.0, 0.3]
        output = say(*words, "ties", "--as", "b")
        assert "warning: TIES on LoRA deltas" in output
        assert "its factors miss" in output
        # The tune step has kept what Adam knew of the gradients.
        say(*words, "fisher", "--as", "c")
        weight = float(read_manifest(merged / STAGE / "reweighted-c").lineage[1].coefficient)
        assert 0 < weight < 1

    def test_undo(self, merged: Path, say: Say) -> None:
        say("lineage", "undo", merged, "--stage", 2, "--model", "merged")
        undone = read_manifest(merged / STAGE / "undone")
        before = read_manifest(merged / "stages/01-image/model")
        assert undone.model_sha256 == before.model_sha256

    def test_export(self, merged: Path, say: Say, tmp_path: Path) -> None:
        words = ("lineage", "export", merged, "--stage", 2, "--model", "merged", "--out")
        assert "28 tensors changed" in say(*words, tmp_path / "hf", "--dtype", "fp16")
        assert "PEFT adapter of rank 16" in say(*words, tmp_path / "peft", "--adapter")
        prepare_merge(merged / "backbone", tmp_path / "peft", 1, tmp_path / "again")
        with pytest.raises(InputError, match=r"peft is a lineage on the base \w{12} \(export"):
            prepare_merge(tmp_path / "hf", tmp_path / "peft", 1, tmp_path / "again")
        output = say(*words, tmp_path / "small", "--adapter", "--rank", 4)
        record = json.loads((tmp_path / "small/export.json").read_text())
        assert f"{100 * record['relative_error']:.3g} %" in output

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("show RUN --modality audio", "--modality 'audio' is unknown; valid: image, video"),
            ("show RUN --stage 3", "--stage is 3; this run has 2"),
            ("show RUN --stage 2", "has no finished model 'model'; finished: aligned, merged, tun"),
            ("reweight RUN", "nothing to change: give MODALITY=COEFFICIENT (image) or --method"),
            ("reweight RUN imagee=1", "modality 'imagee' is unknown; did you mean 'image'?"),
            ("reweight RUN image=x", "'x' is no number"),
            ("reweight RUN image=1 --as a/b", "--as a/b: use letters"),
            ("reweight RUN --method opcm", "has 1 stage; merging needs two"),
            ("undo RUN", "has one stage only"),
            ("export RUN --out x --rank 3", "--rank is the adapter's"),
            ("export RUN --out x --adapter --method ties", "--adapter holds the lineage"),
        ],
    )
    def test_bad_input(self, words: str, message: str, merged: Path, say: Say) -> None:
        before = listing(merged)
        assert message in say("lineage", *words.replace("RUN", str(merged)).split(), status=2)
        assert listing(merged) == before

    def test_another_backbone_is_refused(self, merged: Path, say: Say, tmp_path: Path) -> None:
        path = merged / "backbone/config.json"
        path.write_text(path.read_text() + "\n")
        message = say("lineage", "export", merged, "--out", tmp_path / "x", status=2)
        assert "was trained on the backbone" in message
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_reweighted_model_is_evaluated_apart(merged: Path, say: Say, tmp_path: Path) -> None:
    words = ("lineage", "reweight", merged, "--stage", 2, "--model", "merged", "--as", "mine")
    say(*words, "video=1/4")
    results = (merged / "results.jsonl").read_bytes()
    script = Path(__file__).parents[2] / "launch/score.py"
    succeed(f"python {script} --run {merged} --modality video --model reweighted-mine", tmp_path)
    scores = json.loads((merged / STAGE / "evaluation-reweighted-mine/scores.json").read_text())
    model = read_manifest(merged / STAGE / "reweighted-mine").model_sha256
    assert {row["model"] for row in scores["rows"]} == {model}
    assert len(scores["rows"]) == 4
    assert (merged / "results.jsonl").read_bytes() == results


@pytest.mark.slow
def test_sweep(merged: Path, say: Say, tmp_path: Path) -> None:
    models = listing(merged / STAGE / "merged")
    picture = tmp_path / "pareto.png"
    words = ("merge-sweep", merged, "--stage", 2, "--model", "merged", "--samples", 16)
    output = say(*words, "--out", picture)
    assert picture.read_bytes().startswith(PNG)
    points = json.loads(picture.with_suffix(".json").read_text())["points"]
    losses = {point["name"]: point["losses"] for point in points}
    # The merge stands at 1/2; the same coefficient by hand is the same model.
    assert losses["as it stands"] == losses["video=1/2"]
    # The connector of video was tuned with the whole delta, that of image without.
    assert losses["video=1"]["video"] < losses["video=0"]["video"]
    assert "apply it: mera-ds lineage reweight" in output
    assert "no test set" in output
    assert listing(merged / STAGE / "merged") == models
    (command,) = (line for line in output.splitlines() if line.startswith("apply it: "))
    say(*command.removeprefix("apply it: mera-ds ").split())
