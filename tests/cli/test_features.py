"""`mera-ds shards features`: sizes, ranks, kills, and what it must not do twice."""

import multiprocessing
import os
import re
import signal
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from mera_ds.cli import main
from mera_ds.files import FAILPOINT_VARIABLE, folder_lock

from .commands import listing

PARTS = 8
"""Four modalities with a train and a test tar each."""


def command(arguments: list[str], variables: Mapping[str, str]) -> None:
    """Be a process of its own that runs the command."""
    os.environ.update(variables)
    raise SystemExit(main(["shards", "features", *arguments]))


def start(run: Path, cache: Path, *arguments: str, **variables: str) -> BaseProcess:
    words = ["--run", str(run), *arguments]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=command, args=(words, {"MERA_CACHE": str(cache), **variables}))
    process.start()
    return process


def end(process: BaseProcess) -> int:
    process.join(60)
    return int(process.exitcode if process.exitcode is not None else -1)


@pytest.fixture(scope="module")
def reference(tiny_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache with all features, made by one process in one go."""
    cache = tmp_path_factory.mktemp("reference")
    assert end(start(tiny_template, cache)) == 0
    assert len(features(cache)) == 2 * PARTS, "the features of each part, and their hash"
    return cache


def features(cache: Path) -> dict[str, bytes]:
    return listing(cache / "features")


def test_two_ranks_make_the_same_bytes(
    tiny_template: Path, reference: Path, tmp_path: Path, free_port: str
) -> None:
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    ranks = [
        start(tiny_template, tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **where)
        for rank in (0, 1)
    ]
    assert [end(rank) for rank in ranks] == [0, 0]
    assert features(tmp_path) == features(reference)


@pytest.fixture
def free_port() -> str:
    from mera_ds.distributed import _free_port

    return str(_free_port())


@pytest.mark.parametrize(
    ("failpoint", "kept"), [("features.part:3", 3), ("commit.before_rename:3", 2)]
)
def test_it_goes_on_after_a_kill(
    tiny_template: Path, reference: Path, tmp_path: Path, failpoint: str, kept: int
) -> None:
    killed = start(tiny_template, tmp_path, **{FAILPOINT_VARIABLE: failpoint})
    assert end(killed) == -signal.SIGKILL
    whole = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("0*/features.safetensors")}
    whole = {path: time for path, time in whole.items() if ".partial" not in path.parent.name}
    assert len(whole) == kept
    assert end(start(tiny_template, tmp_path)) == 0
    assert features(tmp_path) == features(reference)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole, "nothing was done twice"


def test_sizes_are_stated_before_and_after(
    tiny_template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MERA_CACHE", str(tmp_path))
    words = ["shards", "features", "--run", str(tiny_template), "--modality", "image"]
    assert main([*words, "--dry-run"]) == 0
    before = capsys.readouterr().out
    most = re.search(r"image train: 48 of 48 media to encode, at most ([\d.]+) kB", before)
    assert most is not None
    assert not list(tmp_path.rglob("*.safetensors"))
    assert main(words) == 0
    (train, _) = sorted(tmp_path.rglob("*.safetensors"), key=lambda path: -path.stat().st_size)
    taken = train.stat().st_size / 1000
    assert f"image train: 48 media, {taken:.1f} kB in fp32\n" in capsys.readouterr().out
    header = 0.5
    assert 0.9 * float(most[1]) < taken < float(most[1]) + 48 * 8 / 1000 + header
    assert main(words) == 0
    assert "image train: 0 of 48 media to encode, at most 0.0 kB" in capsys.readouterr().out


def hold(folder: Path, held: Event, released: Event) -> None:
    """Be a process that has a folder's lock until it is told to let go."""
    with folder_lock(folder):
        held.set()
        released.wait(60)


def test_who_computes_the_same_is_waited_for(
    tiny_template: Path, reference: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    held, released = context.Event(), context.Event()
    root = sorted((reference / "features").iterdir())[0].name
    holder = context.Process(target=hold, args=(tmp_path / "features" / root, held, released))
    holder.start()
    assert held.wait(60)
    other = start(tiny_template, tmp_path)
    other.join(1.5)
    assert other.is_alive()
    released.set()
    assert (end(holder), end(other)) == (0, 0)
    assert features(tmp_path) == features(reference)


def test_a_profile_and_a_run_together_are_refused(
    tiny_template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["shards", "features", "--run", str(tiny_template), "--profile", "tiny"]
    assert main(words) == 2
    assert "give --run or --profile, not both" in capsys.readouterr().err
