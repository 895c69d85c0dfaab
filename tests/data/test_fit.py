"""Texts that a run can't use are found with the rows of training, without what is left out."""

import os
from pathlib import Path

import pytest

from mera_ds.config import ComponentConfig, ModalityConfig, PromptConfig
from mera_ds.data.dataset import ModalityData, UnitReader
from mera_ds.data.fit import text_problems
from mera_ds.data.prompts import PromptBuilder
from mera_ds.model.backbone import load_tokenizer
from mera_ds.shards.damage import quarantine_folder
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards

MEDIUM = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a shard set of three samples, each in a tar of its own."""
    texts = (
        Text("c0", "caption", "", ("a cat",)),
        Text("q0", "qa", "What is it that sits on the mat?", ("cat", "a cat")),
    )
    samples = [
        RawSample(f"s{number}", "png", bytes([number]) * 900, f"c{number}", "drawn", texts)
        for number in range(3)
    ]
    recipe = {"name": "test"}
    path = tmp_path / "pets" / "train"
    write_shards(path, "pets", "train", "image", samples, "CC0-1.0", recipe, shard_bytes=1)
    return path


def problems(folder: Path, prompts: PromptBuilder, max_length: int) -> list[str]:
    return text_problems(folder, prompts, "Describe it.", MEDIUM, max_length)


@pytest.mark.parametrize("suffix", [None, "Answer the question using a single word or phrase."])
def test_lengths_are_those_of_training(
    folder: Path, tiny_template: Path, suffix: str | None
) -> None:
    tokenizer = load_tokenizer(tiny_template / "backbone")
    prompts = PromptBuilder(PromptConfig(style="plain", qa_suffix=suffix), tokenizer)
    config = ModalityConfig(
        data=("somewhere",),
        encoder=ComponentConfig(kind="tiny-image"),
        connector=ComponentConfig(kind="mlp"),
        caption_prompt="Describe it.",
    )
    data = ModalityData("image", [folder.parent], "train")
    reader = UnitReader(data, config, prompts, lambda unit: pytest.fail("no medium"), False)
    longest = MEDIUM + max(len(reader.pieces(unit)) for unit in data.units(["caption", "qa"]))
    assert problems(folder, prompts, longest) == []
    found = problems(folder, prompts, longest - 1)
    assert len(found) == 3
    assert f"s0#q0 is {longest} tokens long" in found[0]


def test_what_is_in_quarantine_is_left_out(folder: Path, tiny_template: Path) -> None:
    tokenizer = load_tokenizer(tiny_template / "backbone")
    prompts = PromptBuilder(PromptConfig(style="plain"), tokenizer)
    os.truncate(folder / "00001.tar", 600)
    quarantine_folder(folder)
    found = problems(folder, prompts, 1)
    assert [line.split(" is ")[0].split(": ")[-1] for line in found] == [
        "s0#c0",
        "s0#q0",
        "s2#c0",
        "s2#q0",
    ]
