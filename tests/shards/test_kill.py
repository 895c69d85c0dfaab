"""A build that is killed with SIGKILL anywhere, and run again, ends with the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mera_ds
from mera_ds.files import FAILPOINT_VARIABLE

from .samples import COUNT, contents

SCRIPT = Path(__file__).with_name("samples.py")
REPOSITORY = Path(mera_ds.__file__).parents[1]


def _build(folder: Path, log: Path, failpoint: str = "") -> int:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), FAILPOINT_VARIABLE: failpoint}
    command = [sys.executable, str(SCRIPT), str(folder), str(log)]
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("failpoint", "reread_from"),
    [
        ("shards.in_tar:1", 0),
        ("shards.in_tar:8", 6),
        ("shards.tar_written:1", 0),
        ("shards.tar_written:3", 4),
        ("shards.tar_renamed:3", 4),
        ("shards.tar_recorded:3", 6),
        ("shards.tar_recorded:6", COUNT),
        ("shards.before_index", COUNT),
        ("shards.index_written", COUNT),
    ],
)
def test_kill_and_rerun(folder: Path, tmp_path: Path, failpoint: str, reread_from: int) -> None:
    reference = contents(folder)
    killed, log = tmp_path / "killed", tmp_path / "log"
    assert _build(killed, log, failpoint) == -signal.SIGKILL
    assert (killed / "index.json").exists() == (failpoint == "shards.index_written")
    for path in killed.glob("*.tar"):
        assert path.read_bytes() == reference[path.name], "only whole tars have their final name"

    log.unlink()
    assert _build(killed, log) == 0
    assert contents(killed) == reference
    read = log.read_text().split() if log.exists() else []
    assert read == [f"n{number:02d}" for number in range(reread_from, COUNT)]


def test_damage_after_the_kill_is_noticed(folder: Path, tmp_path: Path) -> None:
    killed, log = tmp_path / "killed", tmp_path / "log"
    _build(killed, log, "shards.tar_recorded:4")
    tar = bytearray((killed / "00001.tar").read_bytes())
    tar[700] ^= 4
    (killed / "00001.tar").write_bytes(tar)
    assert _build(killed, log) == 0
    assert contents(killed) == contents(folder)
