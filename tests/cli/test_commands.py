"""What the commands do with processes: launchers, signals, locks; and the shard commands."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mera_ds.checkpoint import read_manifest
from mera_ds.config import load_config
from mera_ds.features import FILE

from .commands import finish, run, start, succeed, wait_for

STEPS = 40
LONG = ("order=[image,video]", f"align.max_steps={STEPS}")
"""Settings of a run whose first step takes long enough to be stopped."""


@pytest.fixture
def long(make_tiny_run: Callable[..., Path]) -> Path:
    return make_tiny_run(*LONG)


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("stages/01-image/align/step-??????"))


@pytest.mark.slow
class TestLaunchedSteps:
    @pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
    def test_they_stop_with_the_command_and_continue(self, launcher: str, long: Path) -> None:
        command = (
            f"mera-ds run {long} --until 01-image/align execution.launcher={launcher} "
            "execution.processes=2 execution.save_every=1"
        )
        process = start(command, long)
        wait_for((long / "stages/01-image/align/step-000002").exists, process)
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        ended = finish(process, command)
        assert ended.status == 143, ended
        assert "01-image/align was stopped; run the same command to continue" in ended.errors
        assert psutil.wait_procs(started, timeout=10)[1] == []
        before_last, last = saved(long)
        # Saved at every step: the settings of this call have reached the ranks.
        assert int(last[-6:]) == int(before_last[-6:]) + 1
        ended = succeed(command, long)
        assert f"continuing from {long}/stages/01-image/align/{last}" in ended.errors
        assert f"step {STEPS}/{STEPS}" in ended.errors
        assert read_manifest(long / "stages/01-image/aligned").step == "01-image/align"
        assert saved(long) == []

    def test_ranks_that_live_longer_keep_the_run_and_save(self, long: Path) -> None:
        """Killed with torchrun, the command leaves the ranks, which have sessions of their own.

        When they see that they have no launcher, they save and end.
        """
        command = f"mera-ds run {long} --until 01-image/align execution.launcher=torchrun"
        process = start(f"{command} execution.processes=2 execution.save_every=1", long)
        wait_for((long / "stages/01-image/align/step-000002").exists, process)
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "launch/stage.py" in " ".join(child.cmdline()) and "-m" not in child.cmdline()
        ]
        assert len(ranks) == 2
        for rank in ranks:
            rank.suspend()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        first = (long / ".lock").read_text(encoding="utf-8")
        ended = run(f"mera-ds run {long}", long)
        for rank in ranks:
            rank.resume()
        alive = psutil.wait_procs(ranks, timeout=60)[1]
        for rank in alive:
            rank.kill()
        assert ended.status == 6, ended
        assert ended.message == f"{long} is in use by process {first}; wait for it or stop it"
        assert int(first) in [rank.pid for rank in ranks]
        assert alive == []
        assert len(saved(long)) == 2


@pytest.mark.slow
def test_two_runs_at_once_share_an_empty_cache(
    make_tiny_run: Callable[..., Path], tmp_path: Path
) -> None:
    variables = {"MERA_CACHE": str(tmp_path / "cache")}
    folders = [make_tiny_run("order=[image]", "align.max_steps=2") for _ in range(2)]
    commands = [f"mera-ds run {folder} --until 01-image/align" for folder in folders]
    processes = [start(command, tmp_path, variables) for command in commands]
    for process, command in zip(processes, commands, strict=True):
        ended = finish(process, command)
        assert ended.status == 0, ended
    hashes = {read_manifest(folder / "stages/01-image/aligned").model_sha256 for folder in folders}
    assert len(hashes) == 1
    assert len(list(tmp_path.rglob(FILE))) == 1
    assert not list(tmp_path.rglob("*.partial-*"))


@pytest.mark.slow
def test_a_profile_of_ones_own(merged_template: Path, tmp_path: Path) -> None:
    """The configuration of a run is a profile, too; settings may stand anywhere."""
    text = (merged_template / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.replace("profile: tiny", "profile: mine"))
    command = "mera-ds init replay.percent=1 --profile mine.yaml order=[video] --method finetune r"
    assert "r: mine, finetune, video" in succeed(command, tmp_path).output
    config = load_config(tmp_path / "r")
    assert (config.replay.percent, config.align.max_steps) == (1.0, 9)


@pytest.mark.slow
def test_status_of_an_interrupted_run(merged_template: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged_template, tmp_path / "run"))
    (folder / "stages/02-video/realign/step-000003").mkdir(parents=True)
    lines = succeed(f"mera-ds status {folder}", tmp_path).output.splitlines()
    states = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert states.pop("02-video/realign") == "interrupted, saved at step-000003"
    assert states.pop("02-video/evaluate") == "to do"
    assert set(states.values()) == {"done"}


class TestShards:
    @pytest.fixture
    def shards(self, tiny_template: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_template / "data", tmp_path / "data"))

    def test_lint_names_what_is_damaged(self, shards: Path, tmp_path: Path) -> None:
        tar = shards / "audio/test/00000.tar"
        content = bytearray(tar.read_bytes())
        content[1000] ^= 1
        tar.write_bytes(content)
        ended = run(f"mera-ds shards lint {shards}", tmp_path)
        assert ended.status == 3
        assert f"{shards}/audio/test: 1 problems" in ended.output
        assert f"{tar}: bytes 0 to {len(content)} have the sha256" in ended.output
        assert ended.message == "1 problems in 8 shard sets; rebuild them"

    def test_lint_finds_an_overlap_of_splits(self, shards: Path, tmp_path: Path) -> None:
        shutil.rmtree(shards / "video/test")
        shutil.copytree(shards / "video/train", shards / "video/test")
        ended = run(f"mera-ds shards lint {shards / 'video'}", tmp_path)
        assert ended.status == 3
        assert "problems in 2 shard sets" in ended.message

    def test_preview_as_text(self, shards: Path, tmp_path: Path) -> None:
        output = succeed(f"mera-ds shards preview {shards / 'image'} --count 2", tmp_path).output
        assert "what colour is it?" in output.lower()

    @pytest.mark.parametrize(
        ("command", "expected"),
        [
            ("build tinny --out out", "unknown recipe 'tinny'; did you mean 'tiny'?"),
            ("build tiny --source nowhere --out out", "--source nowhere is not a folder"),
            ("lint nowhere", "nowhere holds no shard set"),
            ("preview nowhere", "nowhere holds no shard set"),
            ("preview nowhere --count 0", "--count 0 must be at least 1"),
        ],
    )
    def test_bad_input(self, command: str, expected: str, tmp_path: Path) -> None:
        ended = run(f"mera-ds shards {command}", tmp_path)
        assert ended.status == 2
        assert expected in ended.message
        assert list(tmp_path.iterdir()) == []

    def test_a_file_where_the_shards_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("a file")
        ended = run("mera-ds shards build tiny --out out", tmp_path)
        assert ended.status == 2
        assert re.match(r"out/\S+ can't be used: Not a directory; give another path", ended.message)
        assert (tmp_path / "out").read_text() == "a file"
