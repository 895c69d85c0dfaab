"""Whatever forbids a merge is found before a byte is written, all at once and with a remedy."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mera_ds.errors import InputError
from mera_ds.merge.compare import RECORD
from mera_ds.merge.state_dicts import merge_checkpoints, prepare_merge

from .models import bare_checkpoint, base_model, change_config, checkpoint, moved, state


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    previous = checkpoint(tmp_path / "previous", base_model(), "8KB")
    return previous, checkpoint(tmp_path / "tuned", moved(base_model(), 1))


@pytest.fixture(autouse=True)
def nothing_was_written(tmp_path: Path) -> Iterator[None]:
    """Require that a refusal leaves nothing behind."""
    yield
    assert not list(tmp_path.glob("out*"))


def refusal(pair: tuple[Path, Path], stage: int = 2, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepare_merge(*pair, stage, pair[0].parent / "out", **settings)
    message = str(caught.value)
    assert message.startswith("the checkpoints can't be merged:\n  ")
    assert "→" in message
    return message


def rewritten(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or remove (None) tensors of a checkpoint in one file."""
    found: dict[str, torch.Tensor | None] = {**state(folder), **tensors}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


HEAD = "lm_head.weight"


def test_all_differences_are_listed_at_once(tmp_path: Path) -> None:
    previous = checkpoint(tmp_path / "previous", base_model())
    tuned = checkpoint(tmp_path / "tuned", base_model(vocab_size=50, num_hidden_layers=1))
    rewritten(tuned, extra=torch.ones(1))
    change_config(tuned, model_type="mistral", tie_word_embeddings=True)
    message = refusal((previous, tuned))
    for expected in (
        f"'model.layers.1.mlp.up_proj.weight' is only in {previous}",
        f"'extra' is only in {tuned}",
        f"'lm_head.weight' is (48, 24) in {previous} and (50, 24) in {tuned}",
        f"vocab_size is 48 in {previous} and 50 in {tuned}",
        "model_type is llama",
        "tie_word_embeddings is False",
        "the vocabularies differ in size: resize the embeddings",
        "nothing is left out or added",
    ):
        assert expected in message


def test_a_long_list_is_cut(pair: tuple[Path, Path]) -> None:
    rewritten(pair[1], **{f"extra{n:02d}": torch.ones(1) for n in range(30)})
    message = refusal(pair)
    assert "'extra09' is only in" in message
    assert "'extra10'" not in message
    assert "… and 20 more like this" in message


class TestDtypes:
    def test_a_difference_needs_a_choice(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        rewritten(pair[1], **{name: tensor.half() for name, tensor in state(pair[1]).items()})
        message = refusal(pair)
        assert f"'lm_head.weight' is F32 in {pair[0]} and F16 in {pair[1]}" in message
        assert "→ say what to write: --dtype fp32 or --dtype fp16" in message
        prepare_merge(*pair, 2, tmp_path / "out", dtype="F16")

    def test_equal_tables_of_integers_are_taken_over(self, tmp_path: Path) -> None:
        table = torch.arange(9)
        previous = bare_checkpoint(tmp_path / "a", w=torch.zeros(3), table=table)
        tuned = bare_checkpoint(tmp_path / "b", w=torch.ones(3), table=table)
        merged = state(merge_checkpoints(previous, tuned, 2, tmp_path / "merged", dtype="F16"))
        assert torch.equal(merged["table"], table)
        assert merged["w"].tolist() == [0.5] * 3

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
    def test_what_can_not_be_averaged(self, tmp_path: Path, dtype: torch.dtype) -> None:
        previous = bare_checkpoint(tmp_path / "a", w=torch.zeros(3).to(dtype))
        tuned = bare_checkpoint(tmp_path / "b", w=torch.ones(3).to(dtype))
        message = refusal((previous, tuned))
        assert "and not equal" in message
        assert "only F64, F32, F16, BF16 can be averaged: dequantise" in message


class TestTiedWeights:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> tuple[Path, Path]:
        model = base_model(tie_word_embeddings=True)
        pair = (tmp_path / "previous", tmp_path / "tuned")
        for folder, tuned in zip(pair, (False, True), strict=True):
            checkpoint(folder, moved(model, 1) if tuned else model)
        return pair

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_head_that_repeats_the_embeddings_is_left_out(
        self, tied: tuple[Path, Path], tmp_path: Path, which: int
    ) -> None:
        embeddings = state(tied[which])["model.embed_tokens.weight"]
        rewritten(tied[which], **{HEAD: embeddings.clone()})
        plan = prepare_merge(*tied, 2, tmp_path / "out")
        assert HEAD not in {tensor.name for tensor in plan.tensors}
        (note,) = plan.notes
        assert note.startswith(f"'{HEAD}' of {tied[which]} repeats its tied embeddings")

    def test_a_head_that_does_not(self, tied: tuple[Path, Path]) -> None:
        rewritten(tied[1], **{HEAD: torch.ones(48, 24)})
        message = refusal(tied)
        assert f"'{HEAD}' of {tied[1]} differs from the embeddings it is tied to" in message
        assert "set tie_word_embeddings to false" in message

    def test_a_tie_that_is_the_default_of_the_architecture(
        self, tied: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """Older files do not say `tie_word_embeddings` where it is the default."""
        for folder in tied:
            config = json.loads((folder / "config.json").read_text())
            del config["tie_word_embeddings"]
            (folder / "config.json").write_text(json.dumps(config))
        rewritten(tied[1], **{HEAD: state(tied[1])["model.embed_tokens.weight"].clone()})
        plan = prepare_merge(*tied, 2, tmp_path / "out")
        assert HEAD not in {tensor.name for tensor in plan.tensors}
        rewritten(tied[1], **{HEAD: torch.ones(48, 24)})
        assert f"'{HEAD}' is only in {tied[1]}" in refusal(tied)

    def test_only_one_is_tied(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        tied = checkpoint(tmp_path / "tied", base_model(tie_word_embeddings=True))
        message = refusal((pair[0], tied))
        assert f"'{HEAD}' is only in {pair[0]}" in message
        assert "save both with the same tie_word_embeddings" in message


class TestConfiguration:
    def test_another_base_of_the_rotation(self, pair: tuple[Path, Path]) -> None:
        change_config(pair[1], rms_norm_eps=0.5)
        message = refusal(pair)
        assert f"rms_norm_eps is 1e-06 in {pair[0]} and 0.5 in {pair[1]}" in message

    def test_what_says_nothing_about_the_weights(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        change_config(pair[1], use_cache=False, transformers_version="9", pad_token_id=3, new=None)
        plan = prepare_merge(*pair, 2, tmp_path / "out")
        assert len(plan.notes) == 1
        assert "pad_token_id" in plan.notes[0]

    def test_no_configuration(self, pair: tuple[Path, Path]) -> None:
        (pair[1] / "config.json").write_text("[]")
        with pytest.raises(InputError, match=r"config\.json holds no configuration; restore it"):
            prepare_merge(*pair, 2, pair[0].parent / "out")
        (pair[1] / "config.json").unlink()
        (pair[1] / "config.json").mkdir()
        with pytest.raises(InputError, match=r"config\.json can't be read \(Is a directory\)"):
            prepare_merge(*pair, 2, pair[0].parent / "out")


class TestTokenizer:
    def test_other_ids(self, pair: tuple[Path, Path]) -> None:
        for number, folder in enumerate(pair):
            (folder / "tokenizer.json").write_text(json.dumps({"vocab": {"a": number}}))
        message = refusal(pair)
        assert "tokenizer.json differs: the same text has other token ids" in message
        assert "copy the file over its own; otherwise the two can't be merged" in message

    def test_another_layout_of_the_same(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        for indent, folder in zip((None, 2), pair, strict=True):
            (folder / "tokenizer.json").write_text(json.dumps({"vocab": {"a": 1}}, indent=indent))
        assert prepare_merge(*pair, 2, tmp_path / "out").notes == ()

    def test_what_saving_it_changes(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        """How the last batch was cut and padded, and a newer spelling of the merges."""
        vocabulary = {"a": 0, "b": 1, "ab": 2}
        for folder, merges, more in (
            (pair[0], ["a b"], {"truncation": None}),
            (pair[1], [["a", "b"]], {"truncation": {"max_length": 8}, "padding": {"pad_id": 0}}),
        ):
            content = {"model": {"vocab": vocabulary, "merges": merges}, **more}
            (folder / "tokenizer.json").write_text(json.dumps(content))
        prepare_merge(*pair, 2, tmp_path / "out")
        content["model"]["merges"] = [["b", "a"]]
        (pair[1] / "tokenizer.json").write_text(json.dumps(content))
        assert "tokenizer.json differs" in refusal(pair)

    def test_another_chat_template_is_a_note(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        for number, folder in enumerate(pair):
            (folder / "chat_template.jinja").write_text(str(number))
        (note,) = prepare_merge(*pair, 2, tmp_path / "out").notes
        assert note.startswith("chat_template.jinja differs; the output takes that of")


class TestLineage:
    @pytest.fixture
    def merged(self, pair: tuple[Path, Path], tmp_path: Path) -> Path:
        return merge_checkpoints(*pair, 2, tmp_path / "merged", shard_size=9_000)

    @pytest.mark.parametrize("stage", [1, 2, 4])
    def test_another_stage_than_the_next(
        self, pair: tuple[Path, Path], merged: Path, stage: int
    ) -> None:
        message = refusal((merged, pair[1]), stage)
        assert f"merged is the merge of stage 2 ({RECORD}), so the next is stage 3" in message
        assert f"not {stage}\n  → use --stage 3, or give the merge of stage" in message

    def test_the_next_stage(self, merged: Path, tmp_path: Path) -> None:
        tuned = checkpoint(tmp_path / "next", moved(base_model(), 2), "11KB")
        prepare_merge(merged, tuned, 3, tmp_path / "out")

    def test_a_merge_in_place_of_the_tuned_model(
        self, pair: tuple[Path, Path], merged: Path
    ) -> None:
        message = refusal((pair[0], merged))
        assert (
            "merged is the result of a merge (merge.json), not a model tuned after one" in message
        )

    def test_the_same_tuned_model_again(self, pair: tuple[Path, Path], merged: Path) -> None:
        """Whatever files it is cut into."""
        again = pair[0].parent / "again"
        checkpoint(again, moved(base_model(), 1), "7KB")
        message = refusal((merged, again), 3)
        assert f"the tuned model went into {merged} already, as stage 2" in message

    @pytest.mark.parametrize("record", ["[]", "{}", '{"stage": 1, "weights": 2}'])
    def test_a_record_that_is_none(self, pair: tuple[Path, Path], record: str) -> None:
        (pair[0] / RECORD).write_text(record)
        with pytest.raises(
            InputError, match=r"merge\.json is no record of a merge; restore it, or"
        ):
            prepare_merge(*pair, 2, pair[0].parent / "out")

    def test_a_merge_that_was_changed_after(self, merged: Path) -> None:
        file = sorted(merged.glob("*.safetensors"))[1]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        message = refusal((merged, merged.parent / "tuned"), 3)
        assert f"{merged} does not hold the weights that its {RECORD} names" in message
