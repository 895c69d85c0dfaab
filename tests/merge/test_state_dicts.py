"""The literal merge of two models on disk: right, equal to the lineage, and a complete folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mera_ds.checkpoint import NewDelta, read_manifest, write_product
from mera_ds.errors import DataError, InputError
from mera_ds.merge.card import REPORT
from mera_ds.merge.compare import RECORD
from mera_ds.merge.digest import read_digests, weights_digest
from mera_ds.merge.lineage import merge_product
from mera_ds.merge.safetensors_io import INDEX, tensor_places
from mera_ds.merge.state_dicts import carry_out, merge_checkpoints, prepare_merge
from mera_ds.model.backbone import fold_lineage
from mera_ds.model.lora import WeightedDelta, fold_deltas, linear_layers

from .models import SCALE, base_model, checkpoint, moved, random_delta, state

LAYOUTS = ("20KB", "5GB", "8KB", "35KB")
"""Largest shard of each stage's checkpoint: the two inputs of a merge are never cut alike."""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Return a checkpoint in many files, and one that was tuned from it, in one file."""
    previous = checkpoint(tmp_path / "previous", base_model(), "8KB")
    return previous, checkpoint(tmp_path / "tuned", moved(base_model(), 1))


class TestChain:
    def test_four_stages_equal_the_lineage(self, tmp_path: Path) -> None:
        """Literal averages of full checkpoints, against one sum of weighted deltas."""
        product, literal = None, checkpoint(tmp_path / "base", base_model(), "11KB")
        for stage, layout in enumerate(LAYOUTS, start=1):
            facts = {"key": "k", "step": "s"}
            delta = NewDelta(
                stage=stage, modality="m", scale=SCALE, rank=3, tensors=random_delta(stage)
            )
            tuned_product = tmp_path / f"tuned-product{stage}"
            write_product(tuned_product, **facts, base_sha256="b", previous=product, delta=delta)
            product = tmp_path / f"product{stage}"
            coefficient = f"1/{stage}"
            merge_product(tuned_product, product, **facts, stage=stage, coefficient=coefficient)

            start = AutoModelForCausalLM.from_pretrained(literal, dtype=torch.float32)
            tuned = checkpoint(tmp_path / f"tuned{stage}", moved(start, stage), layout)
            literal = merge_checkpoints(
                literal, tuned, stage, tmp_path / f"merged{stage}", shard_size=9_000 * stage
            )
            self.assert_equal_to_rounding(literal, product)

    def assert_equal_to_rounding(self, literal: Path, product: Path) -> None:
        exact = base_model()
        fold_lineage(exact, product, read_manifest(product))
        loaded, origin = state(literal), base_model().state_dict()
        assert loaded.keys() == exact.state_dict().keys()
        linear = {f"{name}.weight" for name in linear_layers(base_model())}
        for name, tensor in exact.state_dict().items():
            if name in linear:
                torch.testing.assert_close(loaded[name], tensor, rtol=2e-6, atol=2e-7)
                assert not torch.equal(tensor, origin[name])
            else:
                assert torch.equal(loaded[name], origin[name]), name

    def test_the_result_is_a_model(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (pair[0] / "tokenizer.json").write_text('{"some": "tokenizer"}')
        output = merge_checkpoints(*pair, 2, tmp_path / "out", shard_size=10_000)
        merged = AutoModelForCausalLM.from_pretrained(output)
        expected = base_model()
        fold_deltas(expected, [WeightedDelta(random_delta(1), SCALE / 2, "half")])
        ids = torch.arange(20)[None]
        torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
        assert (output / "tokenizer.json").read_text() == '{"some": "tokenizer"}'

    def test_stage_one_is_the_tuned_model(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        merged = state(merge_checkpoints(*pair, 1, tmp_path / "out"))
        for name, tensor in state(pair[1]).items():
            assert torch.equal(merged[name], tensor), name


class TestLayouts:
    def test_any_two_layouts_give_the_same(self, tmp_path: Path) -> None:
        results = []
        for number, layout in enumerate(("5GB", "10KB")):
            root = tmp_path / str(number)
            previous = checkpoint(root / "previous", base_model(), layout)
            tuned = checkpoint(root / "tuned", moved(base_model(), 1), LAYOUTS[number])
            results.append(state(merge_checkpoints(previous, tuned, 3, root / "out", 15_000)))
        assert results[0].keys() == results[1].keys()
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

    def test_the_index_names_the_file_of_each_tensor(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        output = merge_checkpoints(*pair, 2, tmp_path / "out", shard_size=10_000)
        index = json.loads((output / INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2
        assert files == [
            f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
        ]
        total = 0
        for name, file in index["weight_map"].items():
            with safe_open(str(output / file), framework="pt") as opened:
                total += opened.get_tensor(name).nbytes
        assert index["metadata"]["total_size"] == total
        for file in files:
            assert sum(t.nbytes for t in load_file(output / file).values()) <= 10_000

    def test_one_file_needs_no_index(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        assert sorted(path.name for path in output.iterdir()) == [
            "README.md",
            "config.json",
            "generation_config.json",
            "merge.json",
            "merge_report.json",
            "model.safetensors",
        ]

    def test_old_weights_in_other_formats_do_not_come_along(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        for name in ("pytorch_model.bin", "consolidated.00.pth", "x.gguf", "rust_model.ot"):
            (pair[0] / name).write_text("old weights")
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        assert not [path for path in output.iterdir() if "old weights" in path.read_text("latin1")]


class TestFolder:
    def test_whole_numbers_do_not_hide_the_coefficient(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        folders = []
        for folder in pair:
            folders.append(tmp_path / f"{folder.name}-with-ids")
            folders[-1].mkdir()
            (folders[-1] / "config.json").write_text((folder / "config.json").read_text())
            tensors = {**state(folder), "position_ids": torch.arange(4)}
            save_file(tensors, folders[-1] / "model.safetensors")
        output = merge_checkpoints(*folders, 2, tmp_path / "out")
        assert json.loads((output / RECORD).read_text())["coefficient"] == "1/2"
        assert torch.equal(state(output)["position_ids"], torch.arange(4))

    def test_the_record_names_inputs_and_output_by_their_weights(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        record = json.loads((output / RECORD).read_text())
        assert (record["stage"], record["coefficient"]) == (2, "1/2")
        for name, folder in zip(("previous", "tuned"), pair, strict=True):
            files = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
            found = record["inputs"][name]
            assert (found["folder"], found["files"]) == (name, files)
            assert found["weights"] == weights_digest(read_digests(tensor_places(folder), 1))
        assert record["weights"] == weights_digest(read_digests(tensor_places(output), 2))
        card = (output / "README.md").read_text()
        assert all(entry["weights"] in card for entry in record["inputs"].values())
        assert record["weights"] in card
        assert str(tmp_path) not in card + json.dumps(record)

    def test_the_report_gives_the_norms_of_every_tensor(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        merge_checkpoints(*pair, 3, tmp_path / "out", dtype="BF16")
        report = json.loads((tmp_path / "out" / REPORT).read_text())
        old, new, written = (state(folder) for folder in (*pair, tmp_path / "out"))
        assert report["tensors"].keys() == old.keys()
        squares = 0.0
        for name, entry in report["tensors"].items():
            update = (new[name].double() - old[name].double()) / 3
            exact = old[name].double() + update
            error = (written[name].double() - exact).norm() / exact.norm()
            assert entry["update_norm"] == pytest.approx(float(update.norm()), rel=1e-4)
            assert entry["rounding_error"] == pytest.approx(float(error), rel=1e-3, abs=1e-9)
            squares += float(update.norm()) ** 2
        assert report["total"]["update_norm"] == pytest.approx(squares**0.5, rel=1e-4)

    def test_the_report_counts_what_did_not_change(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        totals = carry_out(prepare_merge(*pair, 3, tmp_path / "out"), tmp_path / "out")
        linear = len(linear_layers(base_model()))
        assert totals.tensors - totals.unchanged == linear
        assert totals.lines()[-1] == f"{totals.unchanged} of {totals.tensors} tensors unchanged"

    def test_another_dtype_is_written_into_the_configuration(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        output = merge_checkpoints(*pair, 2, tmp_path / "out", dtype="BF16")
        assert {tensor.dtype for tensor in state(output).values()} == {torch.bfloat16}
        assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16

    def test_the_tokenizer_of_the_tuned_model_if_only_it_has_one(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        (pair[1] / "tokenizer.json").write_text('{"some": "tokenizer"}')
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        assert (output / "tokenizer.json").read_text() == '{"some": "tokenizer"}'

    def test_the_card_of_an_input_is_not_taken_over(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        (pair[0] / "README.md").write_text("an older card")
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        assert "an older card" not in (output / "README.md").read_text()

    def test_nor_what_an_export_says_about_itself(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        for name in ("export.json", "manifest.json"):
            (pair[0] / name).write_text("{}")
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        assert {"export.json", "manifest.json"}.isdisjoint(path.name for path in output.iterdir())


class TestRefusals:
    def test_an_existing_output(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match=r"out exists; delete it or choose another --out"):
            merge_checkpoints(*pair, 2, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    def test_an_output_that_can_not_be_made(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match="link exists"):
            prepare_merge(*pair, 2, tmp_path / "link")
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match="file is no folder; choose another one"):
            prepare_merge(*pair, 2, tmp_path / "file/below/out")

    @pytest.mark.parametrize("stage", [0, -1])
    def test_a_stage_below_one(self, pair: tuple[Path, Path], tmp_path: Path, stage: int) -> None:
        with pytest.raises(InputError, match=rf"--stage is {stage}; stages count from 1"):
            merge_checkpoints(*pair, stage, tmp_path / "out")

    def test_a_shard_size_of_nothing(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"--shard-size is 0; give a positive"):
            merge_checkpoints(*pair, 1, tmp_path / "out", shard_size=0)

    def test_what_is_not_finite_is_not_written(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        tensors = state(pair[1])
        tensors["lm_head.weight"][0, 0] = float("nan")
        save_file(tensors, pair[1] / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DataError, match=r"'lm_head\.weight' is not finite in F32; .*tuned"):
            merge_checkpoints(*pair, 2, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["previous", "tuned"]
