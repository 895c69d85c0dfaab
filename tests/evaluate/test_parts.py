"""One task in parts: by several ranks, after a kill, and with a part that is not right."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from train.conftest import _process_server as _process_server
from train.processes import Ranks, run_ranks

from mera_ds.distributed import World
from mera_ds.evaluate.parts import MOST_PARTS, cut_into_parts, predict_in_parts
from mera_ds.evaluate.predictions import Prediction, load_predictions, save_predictions

from .models import evaluate_on_ranks, make_model, steps

ALONE = World(rank=0, size=1, local_rank=0)
ASKED = [Prediction(f"set/{n}#0", "?" * (n % 7), ("a",), "") for n in range(23)]


class Parrot:
    """Says an item's number, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, positions: Sequence[int]) -> list[str]:
        self.asked += positions
        return [f"text {position}" for position in positions]


def predict(path: Path) -> list[int]:
    """Predict in batches of two and return which items were generated."""
    say = Parrot()
    parts = cut_into_parts([len(entry.question) for entry in ASKED], 2)
    generated = predict_in_parts(path, ASKED, parts, say, ALONE)
    assert sorted(generated.texts) == sorted(f"text {number}" for number in say.asked)
    expected = [dataclasses.replace(e, prediction=f"text {n}") for n, e in enumerate(ASKED)]
    assert load_predictions(path) == expected
    assert not path.with_suffix(".parts").exists()
    return sorted(say.asked)


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (23, 4), (5000, 3)])
def test_every_item_is_in_one_batch_of_similar_length(count: int, size: int) -> None:
    lengths = [(7 * n) % 50 for n in range(count)]
    parts = cut_into_parts(lengths, size)
    batches = [batch for part in parts for batch in part.batches]
    assert sorted(position for batch in batches for position in batch) == list(range(count))
    assert [lengths[n] for batch in batches for n in batch] == sorted(lengths)
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(parts) <= MOST_PARTS


def test_stored_parts_are_not_generated_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    parts = cut_into_parts([len(entry.question) for entry in ASKED], 2)
    done = parts[3].positions
    stored = [dataclasses.replace(ASKED[n], prediction=f"text {n}") for n in done]
    save_predictions(tmp_path / "x.parts" / "00003.jsonl", stored)
    assert predict(path) == sorted(set(range(23)) - set(done))


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b'{"id": "other"}\n', None])
def test_a_part_of_other_items_is_generated_again(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "x.parts" / "00003.jsonl"
    save_predictions(file, ASKED[:2])
    if content is not None:
        file.write_bytes(content)
    assert predict(tmp_path / "x.jsonl") == list(range(23))


@pytest.fixture(scope="module")
def run(make_tiny_run: Callable[..., Path]) -> Path:
    """Return a run whose first stage has a model, evaluated by one rank."""
    run = make_tiny_run(
        "method=finetune",
        "order=[image, audio]",
        "evaluate={batch_size: 4, max_new_tokens: 4, tokenizer: raw, limit: 22}",
    )
    make_model(run, steps(run)[0])
    run_ranks(evaluate_on_ranks, 1, run, 1)
    return run


def forget(run: Path) -> dict[str, bytes]:
    """Delete scores and predictions; return what they were."""
    files = [*run.glob("stages/01-image/evaluation/predictions/*/*.jsonl"), run / "results.jsonl"]
    content = {path.name: path.read_bytes() for path in files}
    for path in [*files, *run.glob("stages/*/evaluation/*.json")]:
        path.unlink()
    return content


@pytest.mark.slow
def test_ranks_share_the_work_and_a_kill_changes_nothing(run: Path) -> None:
    before = forget(run)
    killed = Ranks(evaluate_on_ranks, 2, run, 1, environment={"MERA_FAILPOINT": "evaluate.part:2"})
    assert {end.exit_code for end in killed.wait()} == {-9}
    stored = list(run.glob("stages/01-image/evaluation/predictions/*/*.parts/*.jsonl"))
    assert len(stored) >= 2
    run_ranks(evaluate_on_ranks, 2, run, 1)
    assert forget(run) == before
