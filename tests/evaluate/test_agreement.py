"""Two judges on the same predictions: the figures, and the command that prints them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mera_ds.cli import main
from mera_ds.errors import DataError
from mera_ds.evaluate.agreement import Agreement, compare_judges, in_total
from mera_ds.evaluate.judge import Judgement
from mera_ds.evaluate.predictions import Prediction, save_predictions
from mera_ds.files import write_json

from .chat_server import CANARY, ChatServer, Reply, completion


def verdicts(text: str) -> list[Judgement]:
    kinds = {"y": "yes", "n": "no", "i": "invalid", "e": "error"}
    return [Judgement(kinds[letter], None, "") for letter in text]  # type: ignore[arg-type]


def agreement(first: str, second: str) -> Agreement:
    return compare_judges(verdicts(first), verdicts(second))


def test_kappa_is_that_of_the_textbook() -> None:
    """20 both yes, 5 and 10 apart, 15 both no: p_o = 0.7, p_e = 0.5, kappa = 0.4."""
    found = agreement("y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15)
    assert found.agreement == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    assert (found.accuracy(0), found.accuracy(1)) == (0.5, 0.6)


def test_missing_judgements_are_counted_apart() -> None:
    found = agreement("yynnye", "ynnnie")
    assert (found.judged, found.agreement) == (4, 0.75)
    assert found.table["yes", "missing"] == found.table["missing", "missing"] == 1
    assert in_total([found, found]).table["no", "no"] == 4


@pytest.mark.parametrize(("first", "second"), [("", ""), ("e", "y"), ("yy", "yy")])
def test_where_kappa_means_nothing_there_is_none(first: str, second: str) -> None:
    assert agreement(first, second).kappa is None


@pytest.fixture
def run(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run that has answered four questions."""
    run = make_tiny_run("method=finetune")
    folder = run / "stages" / "01-image" / "evaluation"
    row = {"stage": 1, "dataset": "image", "task": "qa"}
    write_json(folder / "scores.json", {"schema": 1, "key": "k" * 64, "rows": [row]})
    said = ["a cat", "dog", "a black cat", "none"]
    save_predictions(
        folder / "predictions" / ("k" * 16) / "image-qa.jsonl",
        [Prediction(f"image/{n}#0", "What?", ("cat",), text) for n, text in enumerate(said)],
    )
    return run


def test_the_command_compares_with_a_server(
    run: Path,
    server: ChatServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def respond(number: int, payload: dict[str, Any]) -> Reply:
        asked = payload["messages"][1]["content"]
        said = asked.partition("Predicted Answer: ")[2].splitlines()[0]
        word = "yes" if "cat" in said else "no"
        return completion(f"{{'pred': '{word}', 'score': 3}}")

    server.respond = respond
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    words = ["judge-agreement", str(run), "--other", "openai"]
    assert main([*words, f"evaluate.judge_base_url={server.url}"]) == 0
    printed = capsys.readouterr()
    assert "agreement   75.0 %  kappa  0.500  items 4 (missing 0)" in printed.out
    assert "accuracy by offline-exact: 0.250" in printed.out
    assert "accuracy by gpt-4o-mini-2024-07-18: 0.500" in printed.out
    assert CANARY not in printed.out + printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--other", "offline-exact"], "--judge and --other are both 'offline-exact'"),
        (["--other", "offline-containment", "evaluate.limit=3"], "only evaluate.judge_"),
    ],
)
def test_what_can_not_be_compared_is_an_error(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge-agreement", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_predictions_that_are_gone_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = run.rglob("image-qa.jsonl")
    file.unlink()
    words = ["judge-agreement", str(run), "--other", "offline-containment"]
    assert main(words) == DataError.exit_code
    assert f"error: {file} does not exist" in capsys.readouterr().err
