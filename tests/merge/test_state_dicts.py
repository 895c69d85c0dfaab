"""The literal average of two checkpoints: right, equal to the lineage, and careful with files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mera_ds.checkpoint import NewDelta, read_manifest, write_product
from mera_ds.errors import DataError, InputError
from mera_ds.files import FAILPOINT_VARIABLE
from mera_ds.merge.lineage import merge_product
from mera_ds.merge.state_dicts import INDEX, average, merge_checkpoints, tensor_places
from mera_ds.model.backbone import fold_lineage
from mera_ds.model.lora import WeightedDelta, fold_deltas, linear_layers

SCALE = 2.0
LAYOUTS = ("20KB", "5GB", "8KB", "35KB")
"""Largest shard of each stage's checkpoint: the two inputs of a merge are never cut alike."""


def base_model(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def random_delta(stage: int) -> dict[str, Tensor]:
    """Return LoRA factors of rank 3 on every linear layer, as large as the weights."""
    generator = torch.Generator().manual_seed(stage)
    tensors = {}
    for name, layer in linear_layers(base_model()).items():
        outputs, inputs = layer.weight.shape
        tensors[f"{name}.lora_A"] = 0.1 * torch.randn(3, inputs, generator=generator)
        tensors[f"{name}.lora_B"] = 0.1 * torch.randn(outputs, 3, generator=generator)
    return tensors


def state(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def checkpoint(folder: Path, model: PreTrainedModel, layout: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=layout)
    return folder


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return the model after a fold of a random delta."""
    fold_deltas(model, [WeightedDelta(random_delta(seed), SCALE, "delta")])
    return model


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


class TestArithmetic:
    @pytest.mark.parametrize("stage", [2, 3, 4, 7])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_once(self, stage: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(stage)
        old, new = (torch.randn(50_000, generator=generator).to(dtype) for _ in range(2))
        exact = old.double() * (stage - 1) / stage + new.double() / stage
        found = average(old, new, stage)
        assert found.dtype == dtype
        half_unit = torch.finfo(dtype).eps / 2 * 2.0 ** (torch.frexp(exact).exponent - 1)
        fp32_arithmetic = 2.0**-22 * (old.double().abs() + new.double().abs())
        bound = half_unit + fp32_arithmetic
        assert bool(((found.double() - exact).abs() <= bound).all())
        naive = (old * ((stage - 1) / stage) + new / stage).double()
        sharp = not bool(((naive - exact).abs() <= bound).all())
        assert sharp or stage == 2, "halves are exact, all else would show a second rounding"

    def test_what_did_not_change_comes_out_bit_identical(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            old = torch.randn(10_000).to(dtype)
            for stage in range(1, 8):
                assert torch.equal(average(old, old.clone(), stage), old)

    def test_the_dtype_is_that_of_the_previous_one(self) -> None:
        old, new = torch.zeros(4, dtype=torch.bfloat16), torch.ones(4)
        assert average(old, new, 4).tolist() == [0.25] * 4
        assert average(old, new, 4).dtype == torch.bfloat16
        assert average(new, old, 4).dtype == torch.float32


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
            "config.json",
            "generation_config.json",
            "merge.json",
            "model.safetensors",
        ]

    def test_old_weights_in_other_formats_do_not_come_along(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        for name in ("pytorch_model.bin", "consolidated.00.pth", "x.gguf"):
            (pair[0] / name).write_text("old weights")
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        assert not [path for path in output.iterdir() if "old weights" in path.read_text("latin1")]

    def test_the_record_names_the_inputs(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        output = merge_checkpoints(*pair, 2, tmp_path / "out")
        record = json.loads((output / "merge.json").read_text())
        assert record["stage"] == 2
        for name, folder in zip(("previous", "tuned"), pair, strict=True):
            files = {path.name for path in folder.glob("*.safetensors")}
            assert set(record["inputs"][name]) == files


def config_changed(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestRefusals:
    def test_an_existing_output(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match=r"out exists; delete it or choose another --out"):
            merge_checkpoints(*pair, 2, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize("stage", [0, -1])
    def test_a_stage_below_one(self, pair: tuple[Path, Path], tmp_path: Path, stage: int) -> None:
        with pytest.raises(InputError, match=rf"--stage is {stage}; stages count from 1"):
            merge_checkpoints(*pair, stage, tmp_path / "out")

    def test_all_differences_are_listed(self, tmp_path: Path) -> None:
        previous = checkpoint(tmp_path / "previous", base_model())
        tuned = checkpoint(tmp_path / "tuned", base_model(vocab_size=50, num_hidden_layers=1))
        tensors = state(tuned)
        save_file({**tensors, "extra": torch.ones(1)}, tuned / "model.safetensors")
        config_changed(tuned, model_type="mistral", tie_word_embeddings=True)
        with pytest.raises(InputError) as caught:
            merge_checkpoints(previous, tuned, 2, tmp_path / "out")
        message = str(caught.value)
        for expected in (
            f"'model.layers.1.mlp.up_proj.weight' is only in {previous}",
            f"'extra' is only in {tuned}",
            f"'lm_head.weight' is (48, 24) in {previous} and (50, 24) in {tuned}",
            f"vocab_size is 48 in {previous} and 50 in {tuned}",
            "model_type is llama",
            "tie_word_embeddings is False",
        ):
            assert expected in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("stage", [1, 2, 4])
    def test_another_stage_than_the_next(
        self, pair: tuple[Path, Path], tmp_path: Path, stage: int
    ) -> None:
        merged = merge_checkpoints(*pair, 2, tmp_path / "merged")
        message = rf"merged is the merge of stage 2 .* so the next is stage 3, not {stage}"
        with pytest.raises(InputError, match=message):
            merge_checkpoints(merged, pair[1], stage, tmp_path / "out")
        merge_checkpoints(merged, pair[1], 3, tmp_path / "out")

    def test_a_merge_in_place_of_the_tuned_model(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        merged = merge_checkpoints(*pair, 2, tmp_path / "merged")
        with pytest.raises(InputError, match=r"merged is the result of a merge"):
            merge_checkpoints(pair[0], merged, 2, tmp_path / "out")

    def test_a_folder_that_is_no_checkpoint(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        (pair[1] / "config.json").unlink()
        with pytest.raises(InputError, match="tuned holds no HF checkpoint"):
            merge_checkpoints(*pair, 2, tmp_path / "out")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(path: Path) -> None:
    torch.save({"w": torch.ones(1)}, path)


class TestDamage:
    @pytest.mark.parametrize("damage", [cut, pickled])
    @pytest.mark.parametrize("which", [0, 1])
    def test_a_damaged_file_is_named(
        self,
        pair: tuple[Path, Path],
        tmp_path: Path,
        which: int,
        damage: Callable[[Path], None],
    ) -> None:
        file = sorted(pair[which].glob("*.safetensors"))[0]
        damage(file)
        with pytest.raises(DataError, match=rf"{file.name} can't be read as safetensors"):
            merge_checkpoints(*pair, 2, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_missing_file_is_noticed(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        sorted(pair[0].glob("*.safetensors"))[1].unlink()
        with pytest.raises(DataError, match=r"index\.json and the files disagree on"):
            merge_checkpoints(*pair, 2, tmp_path / "out")

    def test_a_tensor_in_two_files_is_named(self, pair: tuple[Path, Path]) -> None:
        shutil.copyfile(pair[1] / "model.safetensors", pair[1] / "again.safetensors")
        with pytest.raises(DataError, match=r"is in again\.safetensors and model\.safetensors"):
            tensor_places(pair[1])

    def test_what_is_not_finite_is_not_written(
        self, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        tensors = state(pair[1])
        tensors["lm_head.weight"][0, 0] = float("nan")
        save_file(tensors, pair[1] / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(DataError, match=r"'lm_head\.weight' is not finite; .*tuned"):
            merge_checkpoints(*pair, 2, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["previous", "tuned"]


MERGE = """
import sys
from pathlib import Path
from mera_ds.merge.state_dicts import merge_checkpoints
previous, tuned, out = map(Path, sys.argv[1:])
merge_checkpoints(previous, tuned, 2, out, shard_size=10_000)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("point", "committed"),
    [
        ("merge.after_file:2", False),
        ("commit.before_rename", False),
        ("commit.after_rename", True),
    ],
)
def test_kill_9_leaves_no_folder_that_looks_complete(
    pair: tuple[Path, Path], tmp_path: Path, point: str, committed: bool
) -> None:
    inputs = [contents(folder) for folder in pair]
    expected = contents(merge_checkpoints(*pair, 2, tmp_path / "expected", shard_size=10_000))
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-c", MERGE, *map(str, (*pair, out))],
        env={**os.environ, FAILPOINT_VARIABLE: point},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert out.exists() == committed
    if not committed:
        merge_checkpoints(*pair, 2, out, shard_size=10_000)
    assert contents(out) == expected
    assert [contents(folder) for folder in pair] == inputs
