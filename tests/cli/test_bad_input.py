"""Bad input, given to real commands: one clear error with its exit status, and nothing is written.

Exit status: 2 bad input, 3 damaged data, 5 disk full, 6 run in use (`mera_ds.errors`).
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from mera_ds.checkpoint import read_manifest
from mera_ds.config import PROFILES
from mera_ds.shards.reader import ShardReader

from .commands import REPOSITORY, finish, listing, run, start, succeed, wait_for

Refused = Callable[..., str]


def change(path: Path, position: int, content: bytes) -> None:
    """Overwrite some bytes of a file in place."""
    with path.open("r+b") as file:
        file.seek(position)
        assert file.read(len(content)) != content
        file.seek(position)
        file.write(content)


def edit_config(run: Path, keys: str, value: object) -> None:
    """Set one value of a run's configuration."""
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    *sections, last = keys.split(".")
    target = config
    for section in sections:
        target = target[section]
    target[last] = value
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


class TestWeights:
    def test_no_backbone(self, fresh: Path, refused: Refused) -> None:
        shutil.rmtree(fresh / "backbone")
        message = refused(f"mera-ds run {fresh}", 2, fresh)
        assert message.startswith(f"backbone.path: {fresh}/backbone holds no HF checkpoint")
        assert "mera-ds pocket fetch" in message

    def test_no_encoder_weights(self, fresh: Path, refused: Refused) -> None:
        edit_config(fresh, "modalities.image.encoder.kind", "efficientnet-lite0")
        edit_config(fresh, "modalities.image.encoder.weights", "{run}/nowhere.safetensors")
        command = f"python launch/stage.py --run {fresh} --modality image"
        message = refused(command, 2, fresh)
        assert f"{fresh}/nowhere.safetensors" in message
        assert "'efficientnet-lite0' are missing" in message
        assert "mera-ds pocket fetch" in message


class TestOrderOfWork:
    def test_unknown_modality(self, fresh: Path, refused: Refused) -> None:
        command = f"python launch/stage.py --run {fresh} --modality smell"
        message = refused(command, 2, fresh)
        assert message.startswith("--modality smell: this run learns image → video")

    def test_no_modality(self, fresh: Path, refused: Refused) -> None:
        message = refused(f"python launch/stage.py --run {fresh}", 2, fresh)
        assert message == "--modality is missing; this run learns image, video"

    @pytest.mark.parametrize(
        ("script", "missing"),
        [
            ("stage.py", "01-image/tune"),
            ("merge.py", "02-video/tune"),
            ("realign.py", "02-video/merge"),
            ("score.py", "02-video/realign"),
        ],
    )
    def test_before_its_predecessor(
        self, script: str, missing: str, fresh: Path, refused: Refused
    ) -> None:
        message = refused(f"python launch/{script} --run {fresh} --modality video", 2, fresh)
        assert f"{missing}, which is not finished" in message
        assert f"run 'mera-ds run {fresh} --until {missing}' first" in message

    def test_nothing_to_score(self, fresh: Path, refused: Refused) -> None:
        message = refused(f"python launch/score.py --run {fresh}", 2, fresh)
        assert "has no finished stage yet; run 'mera-ds run' first" in message

    def test_no_such_evaluation(self, fresh: Path, refused: Refused) -> None:
        where = f"--run {fresh} --modality video --step 02-video/fisher"
        message = refused(f"python launch/score.py {where}", 2, fresh)
        assert message == "the stage of video has no evaluation 02-video/fisher"

    def test_nothing_to_report(self, fresh: Path, refused: Refused) -> None:
        message = refused(f"mera-ds report {fresh}", 2, fresh)
        assert (
            message == f"{fresh} has no results yet; 'mera-ds run {fresh}' trains and evaluates it"
        )

    def test_unknown_end(self, fresh: Path, refused: Refused) -> None:
        message = refused(f"mera-ds run {fresh} --until nonsense", 2, fresh)
        assert message.startswith("--until nonsense names no step; steps: 01-image/align, ")


class TestRuns:
    @pytest.mark.parametrize(
        "command", ["mera-ds run", "mera-ds report", "python launch/stage.py --modality audio"]
    )
    def test_no_run(self, command: str, tmp_path: Path, refused: Refused) -> None:
        message = refused(command, 2, tmp_path)
        assert message.startswith("there is no run at runs/default; make one with 'mera-ds init")

    def test_a_run_is_there_already(self, fresh: Path, refused: Refused) -> None:
        message = refused(f"mera-ds init {fresh} --profile tiny", 2, fresh)
        assert message == f"{fresh} is a run already; choose another name or delete it"

    def test_made_with_another_profile(self, fresh: Path, refused: Refused) -> None:
        command = f"python launch/stage.py --run {fresh} --modality image --profile pocket"
        message = refused(command, 2, fresh)
        assert "was made with the profile 'tiny', not 'pocket'" in message
        assert "make another run with 'mera-ds init'" in message

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("config.yaml", "order: [image", "is not valid YAML"),
            ("config.yaml", "profile: tiny", "missing key 'order'; add it"),
            ("plan.json", '{"schema": 1', "is not valid JSON"),
            ("plan.json", "{}", "missing key"),
        ],
    )
    def test_damaged_run(
        self, name: str, content: str, expected: str, fresh: Path, refused: Refused
    ) -> None:
        (fresh / name).write_text(content, encoding="utf-8")
        message = refused(f"mera-ds plan {fresh}", 2, fresh)
        assert f"{fresh / name}" in message
        assert expected in message

    @pytest.mark.slow
    def test_a_second_process(self, fresh: Path, refused: Refused) -> None:
        """It ends at once, and the first one doesn't notice."""
        first = start(f"mera-ds run {fresh} --until 01-image/align", fresh)
        wait_for((fresh / "stages").exists, first)
        os.kill(first.pid, signal.SIGSTOP)
        for command in (
            f"mera-ds run {fresh}",
            f"python launch/merge.py --run {fresh} --modality video",
        ):
            message = refused(command, 6, fresh)
            assert message == f"{fresh} is in use by process {first.pid}; wait for it or stop it"
        os.kill(first.pid, signal.SIGCONT)
        ended = finish(first)
        assert ended.status == 0, ended


class TestSettings:
    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            (
                "tune.batchsize=3",
                "tiny.yaml.tune: key 'batchsize' is unknown; did you mean 'batch_size'?",
            ),
            ("tune.batch_size=many", "tiny.yaml.tune.batch_size is 'many'; expected int"),
            ("tune.batch_size=0", "batch_size is 0; it must be at least 1"),
            ("execution.zero=4", "zero is 4; valid: 0, 1, 2, 3"),
            ("replay.percent=0", "replay.percent is 0.0; it must be in (0, 100]"),
            ("order=[image,vidio]", "modality 'vidio' is unknown; did you mean 'video'?"),
            ("order=[image,image]", "order names a modality twice"),
            ("method=merra", "method 'merra' is unknown; did you mean 'mera'?"),
            ("modalities.image.encoder.kind=tiny-imag", "did you mean 'tiny-image'?"),
            ("modalities.audio.connector.options.querries=1", "did you mean 'num_queries'?"),
        ],
    )
    def test_when_a_run_is_made(
        self, setting: str, expected: str, tmp_path: Path, refused: Refused
    ) -> None:
        assert expected in refused(f"mera-ds init --profile tiny {setting}", 2, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_in_a_profile_file(self, tmp_path: Path, refused: Refused) -> None:
        text = (PROFILES / "tiny.yaml").read_text(encoding="utf-8")
        (tmp_path / "mine.yaml").write_text(text.replace("replay:", "repaly:"), encoding="utf-8")
        message = refused("mera-ds init --profile mine.yaml", 2, tmp_path)
        assert message == "mine.yaml: key 'repaly' is unknown; did you mean 'replay'?"

    def test_unknown_profile(self, tmp_path: Path, refused: Refused) -> None:
        message = refused("mera-ds init --profile tinny", 2, tmp_path)
        assert message == "profile 'tinny' is unknown; did you mean 'tiny'?"

    @pytest.mark.parametrize(
        "command",
        ["mera-ds run {1} {0}", "python launch/score.py --run {0} {1}"],
    )
    def test_in_an_existing_run(self, command: str, fresh: Path, refused: Refused) -> None:
        message = refused(command.format(fresh, "tune.batch_size=8"), 2, fresh)
        assert message == (
            "'tune.batch_size=8' can't change in an existing run (only execution.* can); make a "
            "new run with 'mera-ds init'"
        )

    def test_unknown_execution_setting(self, fresh: Path, refused: Refused) -> None:
        message = refused(f"mera-ds run {fresh} execution.zeero=3", 2, fresh)
        assert message.endswith("key 'zeero' is unknown; did you mean 'zero'?")

    def test_a_command_without_settings(self, fresh: Path, tmp_path: Path) -> None:
        ended = run(f"mera-ds plan {fresh} execution.zero=3", tmp_path)
        assert ended.status == 2
        assert "this command changes no settings: execution.zero=3" in ended.errors


@pytest.mark.slow
class TestData:
    def test_truncated_tar(self, fresh: Path, refused: Refused) -> None:
        tar = fresh / "data/image/train/00000.tar"
        size = tar.stat().st_size
        os.truncate(tar, size - 512)
        message = refused(f"python launch/stage.py --run {fresh} --modality image", 3, fresh)
        assert f"{tar} has {size - 512} bytes, its index says {size}" in message
        assert "rebuild the folder with `mera-ds shards build`, or copy it again" in message

    @pytest.mark.parametrize("features", ["online", "cached"])
    def test_broken_image(
        self, features: str, fresh: Path, tmp_path: Path, refused: Refused
    ) -> None:
        reader = ShardReader(fresh / "data/image/train")
        sample = reader.samples[5]
        middle = sample.media_offset + sample.media_size // 2
        change(fresh / "data/image/train/00000.tar", middle, bytes(sample.media_size // 2))
        # An image that was broken before its tar was written: no hash can tell.
        settings = f"execution.features={features} execution.verify_shards=false"
        message = refused(
            f"python launch/stage.py --run {fresh} --modality image {settings}",
            3,
            fresh,
            MERA_CACHE=str(tmp_path / "cache"),
        )
        assert message.startswith(f"{fresh}/data/image/train: {sample.key}.png: ")
        assert not list(tmp_path.glob("cache/features/**/*.safetensors"))

    def test_changed_bytes(self, fresh: Path, tmp_path: Path, refused: Refused) -> None:
        tar = fresh / "data/image/train/00000.tar"
        change(tar, ShardReader(tar.parent).samples[5].media_offset, b"x")
        command = f"python launch/stage.py --run {fresh} --modality image"
        message = refused(command, 3, fresh, MERA_CACHE=str(tmp_path / "cache"))
        assert message.startswith(
            f"{tar}: its bytes 0 to {tar.stat().st_size} don't have the sha256"
        )
        assert "mera-ds shards build" in message

    def test_other_data_under_a_finished_step(self, merged: Path, refused: Refused) -> None:
        shutil.rmtree(merged / "data/image/train")
        shutil.copytree(merged / "data/image/test", merged / "data/image/train")
        message = refused(f"mera-ds run {merged}", 2, merged)
        assert f"{merged}/stages/01-image/aligned was made from other data" in message
        assert "delete that folder to make it again, or make a new run" in message

    def test_other_data_under_a_checkpoint(self, fresh: Path, refused: Refused) -> None:
        command = f"python launch/stage.py --run {fresh} --modality image"
        killed = f"{REPOSITORY}/launch/stage.py --run {fresh} --modality image"
        assert run(f"python {killed}", fresh, MERA_FAILPOINT="train.step:5").status < 0
        index = fresh / "data/image/train/index.json"
        index.write_text(
            index.read_text(encoding="utf-8").replace('"licence":"', '"licence":"not ')
        )
        message = refused(command, 2, fresh)
        assert f"{fresh}/stages/01-image/align/step-000003 was made with other data" in message
        assert f"delete {fresh}/stages/01-image/align to start this phase anew" in message


@pytest.mark.slow
class TestProducts:
    def test_damaged_delta(self, merged: Path, refused: Refused) -> None:
        shutil.rmtree(merged / "stages/02-video")
        delta = merged / "stages/01-image/model/deltas/01-image.safetensors"
        change(delta, delta.stat().st_size - 8, b"damaged!")
        message = refused(f"python launch/stage.py --run {merged} --modality video", 3, merged)
        assert message.startswith(f"{delta} was changed or damaged")

    def test_damaged_connector(self, merged: Path, refused: Refused) -> None:
        connector = merged / "stages/02-video/merged/connectors/image.safetensors"
        change(connector, connector.stat().st_size - 8, b"damaged!")
        message = refused(f"python launch/realign.py --run {merged} --modality video", 3, merged)
        assert message.startswith(f"{connector} was changed or damaged")

    def test_checkpoints_that_differ(self, fresh: Path, tmp_path: Path, refused: Refused) -> None:
        """All differences are listed, before anything is written."""
        from safetensors.torch import load_file, save_file

        for name in "AB":
            shutil.copytree(fresh / "backbone", tmp_path / name)
        weights = load_file(tmp_path / "B/model.safetensors")
        layer = "model.layers.1.mlp.up_proj.weight"
        weights["model.layers.9.extra.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
        weights[layer] = weights[layer][1:].clone()
        save_file(weights, tmp_path / "B/model.safetensors", {"format": "pt"})
        config = json.loads((tmp_path / "B/config.json").read_text(encoding="utf-8"))
        (tmp_path / "B/config.json").write_text(json.dumps(config | {"vocab_size": 7}))
        command = "python launch/merge.py --previous A --tuned B --stage 2 --out C"
        message = refused(command, 2, tmp_path)
        assert "'model.layers.0.mlp.up_proj.weight' is only in A" in message
        assert "'model.layers.9.extra.weight' is only in B" in message
        assert f"'{layer}' is (" in message
        assert f"config.json: vocab_size is {config['vocab_size']} in A and 7 in B" in message

    def test_merge_without_all_arguments(self, tmp_path: Path, refused: Refused) -> None:
        message = refused("python launch/merge.py --previous A --tuned B --out C", 2, tmp_path)
        assert message == "--stage is missing; give --previous, --tuned, --stage and --out"

    def test_merge_in_a_run_by_another_method(self, tmp_path: Path, refused: Refused) -> None:
        message = refused("python launch/merge.py --run r --method ties", 2, tmp_path)
        assert message.startswith("--method and --base are for two folders")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=400", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_space(disk: Path) -> None:
    """Leave no byte."""
    free = os.statvfs(disk)
    (disk / "filler").mkdir()
    with (disk / "filler/0").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)


def fill_names(disk: Path) -> None:
    """Leave space, but no name for another file: checks of the free space pass, writing fails."""
    (disk / "filler").mkdir()
    for number in range(os.statvfs(disk).f_favail):
        (disk / f"filler/{number}").touch()


@pytest.mark.slow
class TestFullDisk:
    @pytest.mark.parametrize(
        ("fill", "save_every", "saving"),
        [
            (fill_space, 3, "background"),
            (fill_names, 3, "blocking"),
            (fill_names, 1000, "blocking"),
        ],
    )
    def test_earlier_checkpoints_stay_and_training_continues(
        self,
        fill: Callable[[Path], None],
        save_every: int,
        saving: str,
        fresh: Path,
        merged_template: Path,
        disk: Path,
        refused: Refused,
    ) -> None:
        """Saved every 3 steps, the next checkpoint can't be written; otherwise the product."""
        folder = Path(shutil.copytree(fresh, disk / "run"))
        step = f"launch/stage.py --run {folder} --modality image --step 01-image/align"
        killed = run(f"python {REPOSITORY}/{step}", disk, MERA_FAILPOINT="train.step:8")
        assert killed.status == -signal.SIGKILL
        phase = folder / "stages/01-image/align"
        assert sorted(path.name for path in phase.iterdir()) == ["step-000003", "step-000006"]
        fill(disk)
        settings = f"execution.save_every={save_every} execution.saving={saving}"
        message = refused(f"python {step} {settings}", 5, folder / "stages")
        assert str(phase.parent) in message
        assert "free some space" in message
        shutil.rmtree(disk / "filler")
        ended = succeed(f"python {REPOSITORY}/{step}", disk)
        assert f"continuing from {phase}/step-000006" in ended.errors
        product = "stages/01-image/aligned"
        expected = read_manifest(merged_template / product).model_sha256
        assert read_manifest(folder / product).model_sha256 == expected
        assert not list(folder.rglob("*.partial-*"))

    def test_nothing_can_be_begun(self, fresh: Path, disk: Path, refused: Refused) -> None:
        folder = Path(shutil.copytree(fresh, disk / "run"))
        (folder / ".lock").unlink(missing_ok=True)
        fill_names(disk)
        message = refused(f"mera-ds run {folder}", 5, folder)
        assert f"{folder}/.lock was not written; free some space" in message

    def test_a_merge_keeps_its_finished_files(
        self, fresh: Path, tmp_path: Path, disk: Path
    ) -> None:
        """Names for the folder, its state and some of the seven files."""
        shutil.copytree(fresh / "backbone", tmp_path / "A")
        shutil.copytree(fresh / "backbone", tmp_path / "B")
        command = (
            f"python {REPOSITORY}/launch/merge.py --previous A --tuned B --stage 2 "
            f"--shard-size 100KB --workers 1 --out"
        )
        succeed(f"{command} {tmp_path}/expected", tmp_path)
        fill_names(disk)
        for number in range(6):
            (disk / f"filler/{number}").unlink()
        ended = run(f"{command} {disk}/C", tmp_path)
        assert ended.status == 5, ended
        assert "the disk is full" in ended.message
        assert "continues from the last finished file" in ended.message
        done = json.loads((disk / "C.partial/state.json").read_text(encoding="utf-8"))["done"]
        left = {path.name for path in (disk / "C.partial").iterdir()}
        assert left == {*done, "state.json"}
        assert done
        shutil.rmtree(disk / "filler")
        succeed(f"{command} {disk}/C", tmp_path)
        assert listing(disk / "C") == listing(tmp_path / "expected")
