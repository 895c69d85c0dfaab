"""`mera-ds doctor`: what it prints and how it ends; `mera-ds plan` without the files."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mera_ds.cli import main

MakeRun = Callable[..., Path]
SHARDS = [f"modalities.{name}.data=['{{shards}}/{name}']" for name in ("image", "video")]


@pytest.fixture(autouse=True)
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the places `{weights}` and `{shards}` be empty, and no key be set."""
    monkeypatch.setenv("MERA_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("MERA_SHARDS", str(tmp_path / "shards"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_has_everything(
    make_tiny_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_tiny_run()
    assert main(["doctor", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{run}: files" in said
    assert "MISSING" not in said
    assert "found    backbone: model.safetensors" in said


def test_a_profile_before_there_is_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--profile", "tiny"]) == 0
    assert "later    image shards" in capsys.readouterr().out
    assert main(["doctor", "--profile", "tiny", "evaluate.judge=openai"]) == 2
    said = capsys.readouterr()
    assert "MISSING  OPENAI_API_KEY     not set" in said.out
    assert "error: 1 of " in said.err


def test_files_that_are_missing(
    nothing: Path, make_tiny_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_tiny_run(*SHARDS)
    assert main(["doctor", str(run)]) == 2
    said = capsys.readouterr()
    assert f"  MISSING  video shards video/test\n           {nothing}/shards/video/test" in said.out
    assert f"from mera-ds shards build video --source DIR --out {nothing}/shards" in said.out
    assert "error: 4 of " in said.err


def test_without_a_run_it_tells_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("environment\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no run at nowhere"),
        (["nowhere", "--profile", "tiny"], "doctor takes a run or --profile, not both"),
        (["--profile", "tinny"], "profile 'tinny' is unknown; did you mean 'tiny'?"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_is_printed_without_the_files(
    make_tiny_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_tiny_run(*SHARDS, "backbone.path={weights}/llama")
    assert main(["plan", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * (3 + 3 * 5) + 2
    assert "of image: steps of 16, through all 20 times  from the bare backbone" in lines[1]
    assert lines[-1] == f"  files are missing: run 'mera-ds doctor {run}'"


def test_a_plan_says_nothing_of_files_that_are_there(
    make_tiny_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(make_tiny_run())]) == 0
    assert "missing" not in capsys.readouterr().out
