"""Units of a modality: from shard folders to samples, and what is wrong with them by name."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mera_ds.config import ComponentConfig, ModalityConfig, PromptConfig
from mera_ds.data.dataset import ModalityData, UnitReader, UnitRef
from mera_ds.data.prompts import PromptBuilder
from mera_ds.errors import DataError, InputError
from mera_ds.model.backbone import load_tokenizer
from mera_ds.shards.format import Text
from mera_ds.shards.reader import Reading
from mera_ds.shards.writer import RawSample, write_shards

CONFIG = ModalityConfig(
    data=("somewhere",),
    encoder=ComponentConfig(kind="tiny-image"),
    connector=ComponentConfig(kind="mlp"),
    caption_prompt="Describe it.",
)


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, dataset: str, *samples: RawSample) -> Path:
    """Write the split `train` of a dataset below a folder."""
    root = folder / dataset
    recipe = {"name": "test"}
    write_shards(root / "train", dataset, "train", "image", samples, "CC0-1.0", recipe, {})
    return root


def sample(key: str, *texts: Text, media: bytes | None = None) -> RawSample:
    return RawSample(
        key=key,
        extension="png",
        media=picture("red") if media is None else media,
        concept=key,
        source="drawn",
        texts=texts,
    )


CAPTIONS = (Text("c0", "caption", "", ("a cat",)), Text("c1", "caption", "", ("one more cat",)))
QUESTION = Text("q0", "qa", "What is it?", ("cat", "a cat", "pet"))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Return two datasets: one with captions and a question, one with a question alone."""
    return [
        write(tmp_path, "many", sample("k1", *CAPTIONS, QUESTION), sample("k2", QUESTION)),
        write(tmp_path, "few", sample("k1", QUESTION, media=picture("blue"))),
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_template: Path) -> Any:
    return load_tokenizer(tiny_template / "backbone")


def reader(data: ModalityData, tokenizer: Any) -> UnitReader:
    """Return a reader whose features are the unit's place, to tell units apart."""

    def load(unit: UnitRef) -> Tensor:
        return torch.tensor([[unit.reader, unit.medium]])

    return UnitReader(data, CONFIG, PromptBuilder(PromptConfig(), tokenizer), load, encoded=True)


def test_units_are_the_texts_of_the_tasks_in_the_order_of_the_shards(folders: list[Path]) -> None:
    data = ModalityData("image", folders, "train")
    assert [data.unit_id(unit) for unit in data.units(["caption", "qa"])] == [
        "many/k1#0",
        "many/k1#1",
        "many/k1#2",
        "many/k2#0",
        "few/k1#0",
    ]
    assert [data.unit_id(unit) for unit in data.units(["caption"])] == ["many/k1#0", "many/k1#1"]
    assert list(data.units([])) == []


def test_task_length_and_dataset_are_known_from_the_index(folders: list[Path]) -> None:
    data = ModalityData("image", folders, "train")
    for folder in folders:
        for tar in folder.rglob("*.tar"):
            tar.unlink()
    units = data.units(["caption", "qa"])
    assert [data.task(unit) for unit in units] == ["caption", "caption", "qa", "qa", "qa"]
    assert [data.length(unit) for unit in units] == [5, 12, 14, 14, 14]
    assert [data.dataset(unit) for unit in units] == ["many"] * 4 + ["few"]


def test_a_caption_is_asked_for_by_the_prompt_of_the_modality(
    folders: list[Path], tokenizer: Any
) -> None:
    data = ModalityData("image", folders, "train")
    found = reader(data, tokenizer).read(data.units(["caption"])[1])
    assert (found.id, found.modality, found.encoded) == ("many/k1#1", "image", True)
    assert tokenizer.decode(found.suffix_ids) == "\nDescribe it.<|end|><|assistant|>"
    assert tokenizer.decode(found.answer_ids) == "one more cat<|end|>"
    assert found.media.tolist() == [[0, 0]]


def test_a_question_is_answered_by_its_first_answer(folders: list[Path], tokenizer: Any) -> None:
    data = ModalityData("image", folders, "train")
    found = reader(data, tokenizer).read(data.units(["qa"])[2])
    assert tokenizer.decode(found.suffix_ids) == "\nWhat is it?<|end|><|assistant|>"
    assert tokenizer.decode(found.answer_ids) == "cat<|end|>"
    assert found.media.tolist() == [[1, 0]]


def test_for_generation_there_is_no_answer(folders: list[Path], tokenizer: Any) -> None:
    data = ModalityData("image", folders, "train")
    assert reader(data, tokenizer).read(data.units(["qa"])[0], supervised=False).answer_ids == ()


def test_media_are_decoded_as_they_stand_in_their_own_dataset(folders: list[Path]) -> None:
    data = ModalityData("image", folders, "train")
    colours = [data.medium(unit, "image").getpixel((0, 0)) for unit in data.units(["qa"])]
    assert colours == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]


def test_the_fingerprint_changes_with_the_content(folders: list[Path], tmp_path: Path) -> None:
    again = write(tmp_path / "again", "few", sample("k1", QUESTION, media=picture("blue")))
    other = write(tmp_path / "other", "few", sample("k1", QUESTION, media=picture("green")))
    few, same, different = (
        ModalityData("image", [folder], "train").fingerprint
        for folder in (folders[1], again, other)
    )
    assert few == same != different


class TestFaults:
    def test_another_modality_is_refused(self, folders: list[Path]) -> None:
        with pytest.raises(
            InputError, match=r"many/train holds shards of modality 'image', not 'audio'"
        ):
            ModalityData("audio", folders, "train")

    def test_two_datasets_of_one_name_are_refused(
        self, folders: list[Path], tmp_path: Path
    ) -> None:
        other = write(tmp_path / "other", "few", sample("k1", QUESTION, media=picture("green")))
        with pytest.raises(InputError, match=r"two shard sets of one name \(many, few, few\)"):
            ModalityData("image", [*folders, other], "train")

    def test_a_missing_split_is_named(self, folders: list[Path]) -> None:
        with pytest.raises(InputError, match="many/test"):
            ModalityData("image", folders, "test")

    def test_a_broken_medium_is_named(self, tmp_path: Path) -> None:
        folder = write(tmp_path, "set", sample("k1", QUESTION, media=picture("red")[:-20]))
        data = ModalityData("image", [folder], "train")
        with pytest.raises(DataError, match=r"set/train: k1\.png"):
            data.medium(data.units(["qa"])[0], "image")

    def test_a_cut_tar_is_named(self, folders: list[Path]) -> None:
        tar = folders[0] / "train" / "00000.tar"
        tar.write_bytes(tar.read_bytes()[:-512])
        with pytest.raises(DataError, match=r"many/train/00000\.tar has 9728 bytes, .* 10240"):
            ModalityData("image", folders, "train")

    def test_a_text_that_is_not_the_one_in_the_index_is_named(self, folders: list[Path]) -> None:
        tar = folders[1] / "train" / "00000.tar"
        content = tar.read_bytes()
        assert content.count(b'["cat","a cat","pet"]') == 1
        tar.write_bytes(content.replace(b'["cat","a cat","pet"]', b'["a cat","cat","pet"]'))
        data = ModalityData("image", folders[1:], "train", Reading(verify=False))
        with pytest.raises(DataError, match=r"k1\.json: its texts are not those in the index"):
            data.text(data.units(["qa"])[0])

    def test_before_that_the_tar_is_compared_with_its_hash(self, folders: list[Path]) -> None:
        tar = folders[1] / "train" / "00000.tar"
        tar.write_bytes(tar.read_bytes().replace(b'"a cat","pet"', b'"a cab","pet"'))
        data = ModalityData("image", folders[1:], "train")
        with pytest.raises(DataError, match=r"00000\.tar: its bytes 0 to 10240 don't have the"):
            data.text(data.units(["qa"])[0])
