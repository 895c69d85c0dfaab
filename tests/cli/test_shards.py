"""`mera-ds shards`: options of recipes, and shard sets against the run that is to use them."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from http_server import serving
from PIL import Image

from mera_ds.cli import main
from mera_ds.config import PROFILES
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards

MakeRun = Callable[..., Path]


def test_a_run_s_own_shards_fit_it(tiny_template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "lint", "--run", str(tiny_template)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.endswith(": sound and fits the run") for line in lines)


def test_shards_fit_a_profile_that_is_no_run_yet(
    tiny_template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (PROFILES / "tiny.yaml").read_text().replace("{run}", str(tiny_template))
    (tmp_path / "own.yaml").write_text(text)
    folder = tiny_template / "data" / "audio" / "test"
    arguments = ["shards", "lint", str(folder), "--profile", str(tmp_path / "own.yaml")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{folder}: sound and fits the run\n"


def test_texts_that_do_not_fit_are_named(
    make_tiny_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_tiny_run("prompt.max_length=12")
    folder = run / "data" / "image"
    assert main(["shards", "lint", str(folder), "--run", str(run)]) == 3
    found = capsys.readouterr()
    assert f"{folder}/train: image-blue-circle-0#c0 is " in found.out
    assert "for the medium, more than prompt.max_length=12" in found.out
    assert "error: " in found.err


def test_a_long_text_is_named(make_tiny_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_tiny_run()
    folder = run / "data" / "image"
    shutil.rmtree(folder / "train")
    texts = (
        Text("c0", "caption", "", ("a red square",)),
        Text("q0", "qa", "what? " * 300, ("red",)),
    )
    sample = RawSample("one", "png", _png(), "one", "here", texts)
    write_shards(folder / "train", "image", "train", "image", [sample], "CC0-1.0", {"name": "x"})
    assert main(["shards", "lint", str(folder / "train"), "--run", str(run)]) == 3
    out = capsys.readouterr().out
    assert "train: one#q0 is" in out
    assert "one#c0" not in out


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_texts_of_remote_shards_are_compared(
    make_tiny_run: MakeRun,
    tiny_template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    with serving(tiny_template / "data") as server:
        url = f"{server}/image"
        data = ("order=[image]", f"modalities.image.data=['{url}']")
        run = make_tiny_run(*data)
        monkeypatch.chdir(run)
        assert main(["shards", "lint", "--run", str(run)]) == 0
        out = capsys.readouterr().out
        assert f"{url}/test: sound and fits the run\n  only its index and texts" in out
        short = make_tiny_run(*data, "prompt.max_length=12")
        assert main(["shards", "lint", "--run", str(short)]) == 3
        assert "image-blue-circle-0#c0 is " in capsys.readouterr().out
        assert main(["shards", "lint", "--run", str(run), "--quarantine"]) == 2
        assert f"{url}/test can't be changed from here" in capsys.readouterr().err


def test_other_shards_are_none_of_the_run(
    tiny_template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_template / "data" / "image", tmp_path / "image")
    assert main(["shards", "lint", str(tmp_path), "--run", str(tiny_template)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'image' / 'test'}: sound"
    assert "its texts were not compared with the run" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["lint"], "name the shard folders to check"),
        (["lint", "--run", "x", "--profile", "tiny"], "give --run or --profile, not both"),
        (["lint", "--run", "nowhere"], "there is no run at nowhere"),
        (["build", "coco", "--out", "x"], "the recipe coco needs --source DIR"),
        (["build", "coco", "--out", "x", "holdot=val2014"], "did you mean 'holdout'"),
        (["build", "tiny", "--out", "x", "seed=1"], "the recipe tiny has no options: seed=1"),
        (["build", "tiny", "--out", "x", "--workers", "-1"], "--workers -1 must be at least 0"),
    ],
)
def test_bad_arguments(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not Path("x").exists()
