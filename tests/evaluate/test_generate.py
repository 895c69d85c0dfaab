"""Test items and predictions: what is asked, what is said, and the file in between."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mera_ds.config import Decode, load_config
from mera_ds.data.dataset import TEST, ModalityData, UnitReader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World
from mera_ds.errors import DataError
from mera_ds.evaluate import items
from mera_ds.evaluate.generate import Speaker, questions
from mera_ds.evaluate.parts import cut_into_parts, predict_in_parts
from mera_ds.evaluate.predictions import Prediction, load_predictions, save_predictions
from mera_ds.identity import data_folders
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders, build_model
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards


def write(folder: Path, dataset: str, *samples: tuple[str, tuple[Text, ...]]) -> Path:
    """Write the test split of a dataset of pictures."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    raw = [RawSample(k, "png", buffer.getvalue() + k.encode(), k, "", t) for k, t in samples]
    write_shards(folder / TEST, dataset, TEST, "image", raw, "CC0-1.0", {"name": "test"}, {})
    return folder


@pytest.fixture
def data(tmp_path: Path) -> ModalityData:
    """Return two datasets; one medium has three captions around a question, one has none."""
    captions = [Text(f"c{n}", "caption", "", (f"caption {n}",)) for n in range(4)]
    question = Text("q0", "qa", "What?", ("cat", "a cat"))
    other = Text("q1", "qa", "Where?", ("here",))
    first = write(
        tmp_path / "first",
        "first",
        ("k1", (captions[0], question, captions[1], captions[2])),
        ("k2", (question, other)),
        ("k3", (captions[3],)),
    )
    second = write(tmp_path / "second", "second", ("k1", (captions[3], other)))
    return ModalityData("image", [first, second], TEST)


class TestItems:
    def test_captions_are_grouped_by_medium(self, data: ModalityData) -> None:
        found = items.test_items(data, "first", "caption", None)
        assert [(data.unit_id(i.unit), i.question, i.references) for i in found] == [
            ("first/k1#0", "", ("caption 0", "caption 1", "caption 2")),
            ("first/k3#0", "", ("caption 3",)),
        ]

    def test_each_question_is_an_item_with_all_its_answers(self, data: ModalityData) -> None:
        found = items.test_items(data, "first", "qa", None)
        assert [(data.unit_id(i.unit), i.question, i.references) for i in found] == [
            ("first/k1#1", "What?", ("cat", "a cat")),
            ("first/k2#0", "What?", ("cat", "a cat")),
            ("first/k2#1", "Where?", ("here",)),
        ]

    def test_datasets_are_kept_apart(self, data: ModalityData) -> None:
        found = items.test_items(data, "second", "caption", None)
        assert [data.unit_id(item.unit) for item in found] == ["second/k1#0"]

    def test_a_limit_takes_the_first_items_whole(self, data: ModalityData) -> None:
        found = items.test_items(data, "first", "caption", 1)
        assert [item.references for item in found] == [("caption 0", "caption 1", "caption 2")]


PREDICTIONS = [
    Prediction("first/k1#0", "", ("a", "b"), "a cat"),
    Prediction("first/k2#0", 'What "is"\nit?', ("naïve",), ""),
    Prediction("first/k3#0", "x", (), "odd \u2028 breaks \x85 \x0b \x1c and \r\n \ue000 \x00"),
]


class TestFile:
    def test_predictions_come_back(self, tmp_path: Path) -> None:
        save_predictions(tmp_path / "new" / "x.jsonl", PREDICTIONS)
        assert load_predictions(tmp_path / "new" / "x.jsonl") == PREDICTIONS

    def test_one_line_holds_one_prediction(self, tmp_path: Path) -> None:
        save_predictions(tmp_path / "x.jsonl", PREDICTIONS)
        lines = (tmp_path / "x.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")
        assert [json.loads(line)["id"] for line in lines] == [entry.id for entry in PREDICTIONS]

    @pytest.mark.parametrize(
        "line", ["{", "[]", "5", "", '{"id": "x"}', '{"id": "x", "references": [], "more": 1}']
    )
    def test_a_line_that_is_no_prediction_is_named(self, tmp_path: Path, line: str) -> None:
        save_predictions(tmp_path / "x.jsonl", PREDICTIONS[:1])
        with (tmp_path / "x.jsonl").open("a") as file:
            file.write(f"{line}\n")
        with pytest.raises(DataError, match=r"x\.jsonl:2 is no prediction; delete the file"):
            load_predictions(tmp_path / "x.jsonl")


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model of the profile `tiny` and its pictures."""

    folder: Path
    model: Any
    tokenizer: Any
    data: ModalityData
    reader: UnitReader

    def predict(
        self, task: str, batch_size: int, limit: int | None = None, decode: Decode = "eager"
    ) -> list[Prediction]:
        found = items.test_items(self.data, "image", task, limit)
        say = Speaker(self.model, self.tokenizer, self.reader, found, 6, decode=decode)
        parts = cut_into_parts([len(item.question) for item in found], batch_size)
        file = self.folder / f"{task}-{batch_size}-{decode}.jsonl"
        predict_in_parts(file, questions(self.data, found), parts, say, World(0, 1, 0))
        return load_predictions(file)


@pytest.fixture(scope="module")
def tiny(make_tiny_run: Callable[..., Path]) -> Tiny:
    run = make_tiny_run()
    config = load_config(run)
    encoders = build_encoders(config, run, ["image"])
    model = build_model(config, run, None, ["image"], encoders).eval()
    data = ModalityData("image", data_folders(config, run, "image"), TEST)
    tokenizer = load_tokenizer(run / "backbone")
    encoder = encoders["image"]
    reader = UnitReader(
        data,
        config.modalities["image"],
        PromptBuilder(config.prompt, tokenizer),
        lambda unit: encoder.transform(data.medium(unit, encoder.media)),
        encoded=False,
    )
    return Tiny(run / "said", model, tokenizer, data, reader)


class TestPredict:
    @pytest.mark.parametrize("task", ["caption", "qa"])
    def test_every_item_gets_its_own_text(self, tiny: Tiny, task: str) -> None:
        asked_for = items.test_items(tiny.data, "image", task, None)
        found = tiny.predict(task, batch_size=5)
        assert [entry.id for entry in found] == [tiny.data.unit_id(item.unit) for item in asked_for]
        assert [entry.references for entry in found] == [item.references for item in asked_for]
        for place in (0, 7, len(asked_for) - 1):
            asked = tiny.reader.read(asked_for[place].unit, supervised=False)
            assert found[place].prediction == tiny.model.generate([asked], 6, tiny.tokenizer)[0]

    def test_the_size_of_the_batches_has_no_influence(self, tiny: Tiny) -> None:
        assert tiny.predict("qa", batch_size=3) == tiny.predict("qa", batch_size=64)

    def test_a_fixed_cache_says_the_same(self, tiny: Tiny) -> None:
        assert tiny.predict("qa", 5, decode="static") == tiny.predict("qa", 5)

    def test_the_answer_is_not_shown_to_the_model(self, tiny: Tiny) -> None:
        item = items.test_items(tiny.data, "image", "qa", 1)[0]
        sample = tiny.reader.read(item.unit, supervised=False)
        prompt = tiny.tokenizer.decode((*sample.prefix_ids, *sample.suffix_ids))
        assert item.references[0] not in prompt
        assert sample.answer_ids == ()
