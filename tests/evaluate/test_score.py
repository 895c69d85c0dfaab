"""From predictions to results: the figures, and the rows that the report reads."""

import dataclasses
import html
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mera_ds.config import EvaluateConfig, load_config
from mera_ds.distributed import World
from mera_ds.errors import DataError, InputError
from mera_ds.evaluate.judge import OfflineJudge
from mera_ds.evaluate.predictions import Prediction, load_predictions, save_predictions
from mera_ds.evaluate.run import evaluation_is_finished, run_evaluate_step
from mera_ds.evaluate.score import make_judge, score_captions, score_questions
from mera_ds.report import write_report
from mera_ds.report.results import Score, read_runs

from .chat_server import CANARY, ChatServer, failure
from .models import make_model, steps

RAW = EvaluateConfig(tokenizer="raw")
ALONE = World(rank=0, size=1, local_rank=0)


def captions(*texts: str) -> list[Prediction]:
    """Return predictions beside the references of three media."""
    references = [("a red cat sleeps", "the red cat"), ("two dogs run fast",), ("a blue bird",)]
    return [
        Prediction(f"set/{number}#0", "", entry, text)
        for number, (entry, text) in enumerate(zip(references, texts, strict=True))
    ]


def answers(*texts: str) -> list[Prediction]:
    references = [("cat", "a cat"), ("dog",), ("2",), ("here",)]
    return [
        Prediction(f"set/{number}#0", "What?", entry, text)
        for number, (entry, text) in enumerate(zip(references, texts, strict=True))
    ]


class TestCaptions:
    def test_better_captions_score_higher(self) -> None:
        right = score_captions(
            captions("a red cat sleeps", "two dogs run fast", "a blue bird"), RAW
        )
        near = score_captions(captions("a red cat", "two dogs sleep", "a blue bird"), RAW)
        wrong = score_captions(captions("x", "y", "z"), RAW)
        scores = [found.figures["score"] for found in (right, near, wrong)]
        assert scores[0] > scores[1] > scores[2] == 0
        assert sum(right.per_item.values()) / 3 == pytest.approx(scores[0])

    def test_the_row_says_how_it_was_measured(self) -> None:
        found = {**score_captions(captions("a", "b", "c"), RAW).figures}
        assert found.pop("score") >= 0
        assert len(found.pop("references_sha256")) == 64
        assert found == {
            "metric": "cider",
            "count": 3,
            "missing": 0,
            "judge": None,
            "tokenizer": "raw",
        }

    def test_the_hash_is_that_of_the_references_alone(self) -> None:
        one, other = (score_captions(captions(*texts), RAW).figures for texts in ("abc", "def"))
        assert one["references_sha256"] == other["references_sha256"]
        changed = captions(*"abc")
        changed[0] = dataclasses.replace(changed[0], references=("something else",))
        found = score_captions(changed, RAW).figures
        assert found["references_sha256"] != one["references_sha256"]


class TestQuestions:
    @pytest.mark.parametrize(
        ("texts", "score"),
        [
            (("cat", "dog", "two", "here"), 1.0),
            (("A cat.", "Dog", "2", "there"), 0.75),
            (("", "", "", ""), 0.0),
        ],
    )
    def test_accuracy_is_the_share_of_right_answers(
        self, texts: tuple[str, ...], score: float
    ) -> None:
        scored = score_questions(answers(*texts), RAW)
        assert sum(scored.per_item.values()) / 4 == score
        found = {**scored.figures}
        assert len(found.pop("references_sha256")) == 64
        assert found == {
            "metric": "accuracy",
            "score": score,
            "count": 4,
            "missing": 0,
            "judge": "offline-exact",
            "tokenizer": None,
        }

    def test_the_configured_judge_judges(self, tmp_path: Path) -> None:
        config = EvaluateConfig(judge="offline-containment")
        assert make_judge(config, tmp_path) == OfflineJudge("offline-containment")
        said = answers("it is a cat", "no", "no", "no")
        assert score_questions(said, config).figures["score"] == 0.25
        assert score_questions(said, RAW).figures["score"] == 0.0

    def test_missing_judgements_are_no_score_but_a_reason(
        self, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", CANARY)
        monkeypatch.setenv("MERA_CACHE", str(tmp_path))
        server.respond = lambda n, payload: failure(400, f"too long for {CANARY}")
        config = EvaluateConfig(judge="openai", judge_base_url=server.url)
        with pytest.raises(DataError, match=r"4 of 4 .* too long for \[key\]") as caught:
            score_questions(answers("cat", "dog", "2", "there"), config)
        assert CANARY not in str(caught.value)


@pytest.fixture(scope="module")
def evaluated(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run whose first two stages have models (untrained) and were evaluated."""
    run = make_tiny_run(
        "method=finetune",
        "order=[image, audio]",
        "evaluate={batch_size: 8, max_new_tokens: 6, tokenizer: raw, limit: 6}",
    )
    for step in steps(run):
        make_model(run, step)
        run_evaluate_step(run, load_config(run), step, ALONE)
    return run


def predictions(run: Path) -> dict[str, Any]:
    """Return the files of predictions and when they were written."""
    files = run.rglob("predictions/*/*.jsonl")
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in files}


class TestRun:
    def test_the_report_reads_the_results(self, evaluated: Path) -> None:
        (run,) = read_runs([evaluated])
        expected = {
            (step.stage, modality, task)
            for step in steps(evaluated)
            for modality in step.modalities
            for task in ("caption", "qa")
        }
        assert set(run.scores) == expected
        for (stage, modality, task), score in run.scores.items():
            assert (score.stage, score.modality, score.task) == (stage, modality, task)
            assert (score.method, score.split, score.profile) == ("finetune", "test", "tiny")
            assert score.stage_modality == ("image", "audio")[stage - 1]
            assert score.count == 6
            assert math.isfinite(score.score)
            assert set(score.provenance) == {
                *("commit", "hardware", "dtype", "test_data", "step"),
            }
            assert (score.majority is None) == (task == "caption")

    def test_what_each_item_scored_stands_beside_it(self, evaluated: Path) -> None:
        (run,) = read_runs([evaluated])
        for step in steps(evaluated):
            stored = json.loads((evaluated / step.output / "per_item.json").read_text())
            for name, items in stored["items"].items():
                score = run.scores[step.stage, *name.split("/")]
                assert sum(items.values()) / len(items) == pytest.approx(score.score)

    def test_the_page_shows_samples_with_their_media(self, evaluated: Path, tmp_path: Path) -> None:
        write_report([evaluated], tmp_path)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert page.count("<article>") == 4 * 3
        assert 'src="data:image/png' in page
        assert "<audio controls" in page
        outside = re.findall(r'(?:src|href)="(?!data:)[^"]*|url\(|@import', page)
        assert outside == []
        (said,) = evaluated.glob("stages/02-audio/evaluation/predictions/*/audio-qa.jsonl")
        first = load_predictions(said)[0]
        assert html.escape(first.question) in page
        assert html.escape(first.id) in page

    def test_of_several_seeds_the_run_that_got_furthest_speaks(
        self, evaluated: Path, tmp_path: Path
    ) -> None:
        begun = tmp_path / "begun"
        begun.mkdir()
        shutil.copy(evaluated / "config.yaml", begun)
        write_report([begun, evaluated], tmp_path / "out")
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert page.count("<article>") == 4 * 3

    def test_the_page_names_media_that_are_gone(self, evaluated: Path, tmp_path: Path) -> None:
        shutil.copytree(evaluated, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "data" / "image")
        write_report([tmp_path / "run"], tmp_path / "out")
        page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        assert "run/data/image/test" in page
        assert "<audio controls" in page

    def test_tensorboard_shows_scores_and_what_was_said(self, evaluated: Path) -> None:
        board = EventAccumulator(str(evaluated / "tensorboard"))
        board.Reload()
        assert "evaluate/audio-qa/accuracy" in board.Tags()["scalars"]
        assert "generate/audio-qa/seconds" in board.Tags()["scalars"]
        (text,) = board.Tensors("evaluate/audio-qa")[-1].tensor_proto.string_val
        assert text.decode().startswith("| item | question | prediction | references |")

    def test_every_row_has_every_field_and_no_other(self, evaluated: Path) -> None:
        fields = {entry.name for entry in dataclasses.fields(Score)}
        for line in (evaluated / "results.jsonl").read_text().splitlines():
            assert set(json.loads(line)) == fields

    def test_a_question_alone_is_guessed_as_often_as_its_most_frequent_answer(
        self, evaluated: Path
    ) -> None:
        (path,) = evaluated.glob("stages/01-image/evaluation/predictions/*/image-qa.jsonl")
        said = [entry.references[0] for entry in load_predictions(path)]
        (run,) = read_runs([evaluated])
        most = max(said.count(answer) for answer in said)
        assert run.scores[1, "image", "qa"].majority == most / len(said)

    def test_a_finished_evaluation_is_not_done_again(self, evaluated: Path) -> None:
        config, step = load_config(evaluated), steps(evaluated)[0]
        assert evaluation_is_finished(evaluated, config, step)
        before = predictions(evaluated), (evaluated / "results.jsonl").read_bytes()
        run_evaluate_step(evaluated, config, step, ALONE)
        assert (predictions(evaluated), (evaluated / "results.jsonl").read_bytes()) == before

    def test_other_settings_or_another_model_need_a_new_one(self, evaluated: Path) -> None:
        config, step = load_config(evaluated), steps(evaluated)[0]
        other = dataclasses.replace(config.evaluate, max_new_tokens=7)
        changed = dataclasses.replace(config, evaluate=other)
        assert not evaluation_is_finished(evaluated, changed, step)
        executed = dataclasses.replace(config.execution, features="online")
        again = dataclasses.replace(config, execution=executed)
        assert evaluation_is_finished(evaluated, again, step)
        dearer = dataclasses.replace(
            config.evaluate, judge_max_dollars=50.0, judge_prices=(1.0, 2.0), judge_concurrency=2
        )
        paid = dataclasses.replace(config, evaluate=dearer)
        assert evaluation_is_finished(evaluated, paid, step)

    def test_another_judge_scores_what_was_said(self, evaluated: Path, tmp_path: Path) -> None:
        run = shutil.copytree(evaluated, tmp_path / "run")
        config, step = load_config(run), steps(run)[0]
        judged = dataclasses.replace(config.evaluate, judge="offline-containment")
        changed = dataclasses.replace(config, evaluate=judged)
        assert not evaluation_is_finished(run, changed, step)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("predictions/**/*")}
        run_evaluate_step(run, changed, step, ALONE)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("predictions/**/*")} == before
        assert evaluation_is_finished(run, changed, step)
        rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
        judges = {row["judge"] for row in rows if (row["stage"], row["task"]) == (1, "qa")}
        assert judges == {"offline-containment"}

    def test_a_line_that_is_not_among_the_results_is_put_there_again(
        self, evaluated: Path, tmp_path: Path
    ) -> None:
        run = shutil.copytree(evaluated, tmp_path / "run")
        config, step = load_config(run), steps(run)[1]
        path = run / "results.jsonl"
        results = path.read_bytes()
        path.write_bytes(b"".join(results.splitlines(keepends=True)[:-1]))
        assert not evaluation_is_finished(run, config, step)
        run_evaluate_step(run, config, step, ALONE)
        assert [json.loads(line)["stage"] for line in path.open()] == [
            json.loads(line)["stage"] for line in results.splitlines()
        ]
        assert evaluation_is_finished(run, config, step)

    def test_a_killed_one_goes_on_with_the_stored_predictions(self, evaluated: Path) -> None:
        config, step = load_config(evaluated), steps(evaluated)[1]
        results = (evaluated / "results.jsonl").read_bytes()
        before = predictions(evaluated)
        (lost,) = evaluated.glob("stages/02-audio/evaluation/predictions/*/audio-qa.jsonl")
        lost.unlink()
        (evaluated / step.output / "scores.json").unlink()
        (evaluated / "results.jsonl").unlink()
        run_evaluate_step(evaluated, config, step, ALONE)
        assert (evaluated / "results.jsonl").read_bytes() == results
        after = predictions(evaluated)
        changed = {name for name in before if after[name] != before[name]}
        assert changed == {str(lost.relative_to(evaluated))}

    def test_scores_can_be_computed_again_from_the_predictions_alone(self, evaluated: Path) -> None:
        config, step = load_config(evaluated), steps(evaluated)[0]
        (path,) = evaluated.glob("stages/01-image/evaluation/predictions/*/image-qa.jsonl")
        original = path.read_bytes()
        right = [dataclasses.replace(p, prediction=p.references[0]) for p in load_predictions(path)]
        save_predictions(path, right)
        (evaluated / step.output / "scores.json").unlink()
        run_evaluate_step(evaluated, config, step, ALONE)
        (run,) = read_runs([evaluated])
        assert run.scores[1, "image", "qa"].score == 1.0
        path.write_bytes(original)
        (evaluated / step.output / "scores.json").unlink()
        run_evaluate_step(evaluated, config, step, ALONE)

    def test_a_model_that_is_not_finished_is_named(
        self, evaluated: Path, make_tiny_run: Callable[..., Path]
    ) -> None:
        run = make_tiny_run("method=finetune")
        with pytest.raises(InputError, match=r"01-image/model holds no finished model"):
            run_evaluate_step(run, load_config(run), steps(run)[0], ALONE)
