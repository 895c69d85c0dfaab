"""Building a published dataset: tolerance, duplicates, reruns, kills, any number of workers."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mera_ds
from mera_ds.errors import DataError
from mera_ds.files import FAILPOINT_VARIABLE
from mera_ds.shards.format import read_index
from mera_ds.shards.lint import lint, lint_pair

from ..conftest import Built, make
from ..sources import coco_name
from ..test_published import texts

REPOSITORY = Path(mera_ds.__file__).parents[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def image(dataset: Built, folder: str, number: int) -> Path:
    return dataset.source / folder / coco_name(folder, number)


def test_too_many_missing_or_broken_media(tmp_path: Path) -> None:
    dataset = make("coco", tmp_path)
    image(dataset, "train2014", 2).unlink()
    with pytest.raises(DataError, match=r"1 of 6 train media .* tolerance=0\.02") as caught:
        dataset.build()
    assert f"train2014/{coco_name('train2014', 2)}: no file" in str(caught.value)
    broken = image(dataset, "train2014", 4)
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(DataError, match="2 of 6 train media"):
        dataset.build("tolerance=0.2")
    report = dataset.out / "coco" / ".prepared" / "train-left_out.txt"
    assert len(report.read_text().splitlines()) == 2
    assert not list(dataset.out.rglob("*.tar"))

    dataset.build("tolerance=0.4")
    assert len(texts(dataset.train)) == 4
    lines = (dataset.train / "left_out.txt").read_text().splitlines()
    assert [line.partition("\t")[0][-6:] for line in lines] == ["02.jpg", "04.jpg"]
    assert not (dataset.test / "left_out.txt").exists()
    assert lint(dataset.train) == []


def test_completed_sources_replace_the_set(tmp_path: Path) -> None:
    dataset = make("coco", tmp_path)
    content = image(dataset, "train2014", 2).read_bytes()
    image(dataset, "train2014", 2).unlink()
    dataset.build("tolerance=0.2")
    image(dataset, "train2014", 2).write_bytes(content)
    dataset.build("tolerance=0.2")
    assert len(texts(dataset.train)) == 6
    assert not (dataset.train / "left_out.txt").exists()


def test_equal_media_are_joined_or_kept_out_of_training(tmp_path: Path) -> None:
    dataset = make("coco", tmp_path)
    shutil.copy(image(dataset, "train2014", 1), image(dataset, "train2014", 5))
    shutil.copy(image(dataset, "val2014", 103), image(dataset, "train2014", 2))
    dataset.build()
    found = texts(dataset.train)
    assert len(found) == 4
    assert [text[2] for text in found["000000000001"]] == ["image 1 text 1", "image 5 text 1"]
    assert "the same medium as 000000000103" in (dataset.train / "left_out.txt").read_text()
    assert read_index(dataset.train).recipe["media"] == {"left_out": 1, "joined": 1}
    assert lint(dataset.train) == []
    assert lint_pair(dataset.train, dataset.test) == []


def test_second_build_only_verifies(built: Callable[[str], Built]) -> None:
    dataset = built("okvqa")
    before = contents(dataset.out)
    dataset.build()
    assert dataset.log[-1].endswith("complete, of just these files and options")
    assert contents(dataset.out) == before


def test_damaged_set_is_built_again(tmp_path: Path) -> None:
    dataset = make("okvqa", tmp_path)
    dataset.build()
    before = contents(dataset.out)
    tar = dataset.train / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    dataset.build()
    assert contents(dataset.out) == before


def test_options_and_seed_decide_the_samples(built: Callable[[str], Built], tmp_path: Path) -> None:
    dataset = built("coco")
    ids = {(dataset.test / "ids.txt").read_text()}
    for seed in range(1, 6):
        dataset.build("test_size=2", f"seed={seed}", out=tmp_path)
        ids.add((tmp_path / "coco" / "test" / "ids.txt").read_text())
    assert len(ids) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["msvd", "cap3d"])
def test_number_of_workers_changes_no_byte(
    name: str, built: Callable[[str], Built], tmp_path: Path
) -> None:
    dataset = built(name)
    options = {"msvd": [], "cap3d": ["points=32", "test_size=3", "train_size=6"]}[name]
    dataset.build(*options, out=tmp_path, workers=3)
    assert contents(tmp_path) == contents(dataset.out)


def command(dataset: Built, failpoint: str) -> int:
    line = [sys.executable, "shards/build.py", "msvd", "--source", str(dataset.source)]
    line += ["--out", str(dataset.out), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), FAILPOINT_VARIABLE: failpoint}
    return subprocess.run(
        line, cwd=REPOSITORY, env=environment, check=False, capture_output=True
    ).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "failpoint", ["recipes.medium_checked:2", "shards.in_tar:2", "shards.index_written:1"]
)
def test_kill_and_rerun(failpoint: str, built: Callable[[str], Built], tmp_path: Path) -> None:
    dataset = make("msvd", tmp_path)
    reference = contents(built("msvd").out)
    assert command(dataset, failpoint) == -signal.SIGKILL
    assert (dataset.test / "index.json").exists() is False
    assert command(dataset, "") == 0
    assert contents(dataset.out) == reference


@pytest.mark.slow
def test_a_worker_that_dies_costs_nothing_but_its_medium(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    dataset = make("msvd", tmp_path)
    assert command(dataset, "recipes.medium:3") == 0, "its media are done again, one by one"
    assert contents(dataset.out) == contents(built("msvd").out)


@pytest.mark.slow
def test_media_whose_decoder_dies_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dataset = make("msvd", tmp_path)
    monkeypatch.setenv(FAILPOINT_VARIABLE, "recipes.medium:1")
    with pytest.raises(DataError, match=r"2 of 2 test media (.|\n)*decoded it died"):
        dataset.build(workers=1)
