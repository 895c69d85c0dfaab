"""Exports: the bits that evaluation computes with, one rounding, and one adapter for all stages."""

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mera_ds.checkpoint import NewDelta, read_manifest, write_product
from mera_ds.errors import DataError, InputError
from mera_ds.merge.export import export_folder
from mera_ds.merge.lineage import merge_product, reweight_product
from mera_ds.merge.lineage_adapter import export_adapter
from mera_ds.merge.methods import open_method
from mera_ds.model.backbone import fold_lineage
from mera_ds.model.lora import linear_layers

RANK, SCALE, STAGES = 4, 2.0, 3


def deltas_of(stage: int, llm: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return factors whose product is about 2 % of the weights, as training gives them."""
    generator = torch.Generator().manual_seed(stage)
    found = {}
    for name, layer in linear_layers(llm).items():
        outputs, inputs = layer.weight.shape
        found[f"{name}.lora_A"] = torch.randn(RANK, inputs, generator=generator) / RANK**0.5
        found[f"{name}.lora_B"] = 2.2e-4 * torch.randn(outputs, RANK, generator=generator)
    return found


def save_base(folder: Path, dtype: torch.dtype, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    llm = LlamaForCausalLM(config).to(dtype).eval()
    llm.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    return llm


def save_chain(place: Path, llm: LlamaForCausalLM) -> Path:
    previous = None
    for stage in range(1, STAGES + 1):
        facts: dict[str, Any] = {"key": "k", "step": "s"}
        delta = NewDelta(
            stage=stage,
            modality=f"m{stage}",
            scale=SCALE,
            rank=RANK,
            tensors=deltas_of(stage, llm),
        )
        tuned, merged = place / f"tuned{stage}", place / f"merged{stage}"
        connectors = {f"m{stage}": {"w": torch.ones(2)}}
        write_product(
            tuned,
            **facts,
            base_sha256="b",
            previous=previous,
            delta=delta,
            connectors=connectors,
        )
        merge_product(tuned, merged, **facts, stage=stage, coefficient=f"1/{stage}")
        previous = merged
    assert previous is not None
    return previous


@pytest.fixture
def base(tmp_path: Path) -> LlamaForCausalLM:
    return save_base(tmp_path / "base", torch.float32)


@pytest.fixture
def product(base: LlamaForCausalLM, tmp_path: Path) -> Path:
    return save_chain(tmp_path, base)


def logits(llm: nn.Module) -> Tensor:
    with torch.no_grad():
        return llm(input_ids=torch.arange(20)[None]).logits


def loaded(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize("options", [{"max_shard_size": "100KB"}, {}])
def test_files_of_another_layout_beside_the_base_are_left_out(
    options: dict[str, Any], tmp_path: Path
) -> None:
    llm = save_base(tmp_path / "base", torch.float32, **options)
    names = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    save_file({"layers.0.attention.wq": torch.ones(2)}, tmp_path / "base/consolidated.safetensors")
    product = save_chain(tmp_path, llm)
    export_folder(tmp_path / "base", product, read_manifest(product), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == names


def test_a_base_of_files_with_other_names(tmp_path: Path) -> None:
    llm = save_base(tmp_path / "base", torch.float32)
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/weights.safetensors")
    product = save_chain(tmp_path, llm)
    export_folder(tmp_path / "base", product, read_manifest(product), tmp_path / "out")
    assert (tmp_path / "out/weights.safetensors").exists()


def test_an_index_without_files_is_named(tmp_path: Path) -> None:
    llm = save_base(tmp_path / "base", torch.float32, max_shard_size="100KB")
    product = save_chain(tmp_path, llm)
    (tmp_path / "base/model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json holds no weight_map; restore it"):
        export_folder(tmp_path / "base", product, read_manifest(product), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_holds_the_bits_of_the_loaded_model(dtype: torch.dtype, tmp_path: Path) -> None:
    llm = save_base(tmp_path / "base", dtype, max_shard_size="100KB")
    assert (tmp_path / "base/model.safetensors.index.json").exists()
    product = save_chain(tmp_path, llm)
    manifest = read_manifest(product)
    export_folder(tmp_path / "base", product, manifest, tmp_path / "out")
    fold_lineage(llm, product, manifest)
    exported = loaded(tmp_path / "out")
    assert exported.dtype == dtype
    for name, weight in llm.state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight), name


def test_what_has_no_delta_is_copied_to_the_byte(product: Path, tmp_path: Path) -> None:
    manifest = read_manifest(product)
    found = export_folder(tmp_path / "base", product, manifest, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert found.changed == len(changed)
    assert (tmp_path / "out/tokenizer.json").exists()
    assert (tmp_path / "out/manifest.json").read_bytes() == (product / "manifest.json").read_bytes()
    assert {path.name for path in (tmp_path / "out/connectors").iterdir()} == {
        f"m{stage}.safetensors" for stage in (1, 2, 3)
    }


def literal_chain(
    weights: Mapping[str, Tensor], llm: LlamaForCausalLM, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tune and average whole weights stage by stage, rounding to the dtype each time."""
    current = {name: weight.to(dtype) for name, weight in weights.items()}
    for stage in range(1, STAGES + 1):
        factors = deltas_of(stage, llm)
        for name, weight in current.items():
            left, right = (factors[f"{name}.lora_{factor}"] for factor in "BA")
            wide = weight.double() if dtype == torch.float64 else weight.float()
            tuned = (wide + SCALE * left.to(wide) @ right.to(wide)).to(dtype)
            share = float(Fraction(1, stage))
            current[name] = torch.lerp(wide, tuned.to(wide), share).to(dtype)
    return current


class TestAgainstTheLiteralChain:
    def errors(self, dtype: str, tmp_path: Path) -> tuple[float, float, float]:
        """Return rms errors of export and chain over the rms update, and the most ulp apart."""
        kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        llm = save_base(tmp_path / "base", kinds[dtype])
        product = save_chain(tmp_path, llm)
        before = {name: layer.weight.detach() for name, layer in linear_layers(llm).items()}
        exact = literal_chain(before, llm, torch.float64)
        chain = literal_chain(before, llm, kinds[dtype])
        export_folder(tmp_path / "base", product, read_manifest(product), tmp_path / "out")
        stored = load_file(tmp_path / "out/model.safetensors")
        ours = wide = update = apart = 0.0
        for name, weight in exact.items():
            found = stored[f"{name}.weight"].double()
            ours += float((found - weight).square().sum())
            wide += float((chain[name].double() - weight).square().sum())
            update += float((weight - before[name].double()).square().sum())
            spacing = torch.finfo(kinds[dtype]).eps * 2.0 ** weight.abs().log2().floor()
            # Below 2^-14 the numbers of fp16 are as far apart as there.
            least = torch.finfo(kinds[dtype]).eps * 2.0**-14 if dtype == "fp16" else 0.0
            difference = (found - chain[name].double()).abs() / spacing.clamp(min=least)
            apart = max(apart, float(difference[weight.abs() > 2.0**-10].max()))
        return (ours / update) ** 0.5, (wide / update) ** 0.5, apart

    def test_in_fp32_they_agree_to_rounding(self, tmp_path: Path) -> None:
        ours, chain, apart = self.errors("fp32", tmp_path)
        assert ours < 1e-5
        assert chain < 1e-4
        assert apart <= 12

    @pytest.mark.parametrize(("dtype", "limit"), [("fp16", 0.03), ("bf16", 0.25)])
    def test_one_rounding_is_better_than_one_at_every_step(
        self, dtype: str, limit: float, tmp_path: Path
    ) -> None:
        """Both errors against exact arithmetic, as shares of the update."""
        ours, chain, apart = self.errors(dtype, tmp_path)
        assert ours < 0.6 * chain
        assert chain < limit
        assert apart <= 12


def test_another_dtype(product: Path, base: LlamaForCausalLM, tmp_path: Path) -> None:
    manifest = read_manifest(product)
    found = export_folder(tmp_path / "base", product, manifest, tmp_path / "out", dtype="bf16")
    fold_lineage(base, product, manifest)
    exported = loaded(tmp_path / "out")
    assert exported.dtype == torch.bfloat16
    lost = whole = 0.0
    for name, layer in linear_layers(base).items():
        rounded = layer.weight.to(torch.bfloat16)
        assert torch.equal(exported.get_submodule(name).weight, rounded)
        lost += float((rounded.float() - layer.weight).detach().square().sum())
        first = load_file(tmp_path / "base/model.safetensors")[f"{name}.weight"]
        whole += float((layer.weight - first).detach().square().sum())
    assert found.relative == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert record["relative_rounding"] == found.relative


@pytest.mark.parametrize("name", ["ties", "opcm", "ema"])
def test_a_method_can_be_exported(
    name: str, product: Path, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    """A dense result, too, which a lineage could only keep with an error."""
    manifest, method = read_manifest(product), open_method(name, {})
    export_folder(tmp_path / "base", product, manifest, tmp_path / "out", method=method)
    options = {"rank": 64} if name == "ties" else {}
    reweight_product(
        product, tmp_path / "new", key="k", step="s", change=open_method(name, options)
    )
    fold_lineage(base, tmp_path / "new", read_manifest(tmp_path / "new"))
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(base), rtol=0, atol=1e-5)


class TestAdapter:
    def test_base_and_adapter_are_the_merged_model(
        self, product: Path, base: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        manifest = read_manifest(product)
        found = export_adapter(tmp_path / "base", product, manifest, tmp_path / "adapter")
        assert (found.rank, found.relative) == (STAGES * RANK, 0.0)
        served = PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter").eval()
        bare = logits(base)
        fold_lineage(base, product, manifest)
        expected = logits(base)
        assert float((expected - bare).abs().max()) > 1e-3
        torch.testing.assert_close(logits(served), expected, rtol=0, atol=1e-5)

    def test_a_compressed_one_states_its_error(
        self, product: Path, base: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        manifest = read_manifest(product)
        found = export_adapter(tmp_path / "base", product, manifest, tmp_path / "small", rank=5)
        assert found.rank == 5
        stored = load_file(tmp_path / "small/adapter_model.safetensors")
        before = {
            name: layer.weight.detach().clone() for name, layer in linear_layers(base).items()
        }
        fold_lineage(base, product, manifest)
        lost = whole = 0.0
        for name, layer in linear_layers(base).items():
            key = f"base_model.model.{name}.lora"
            near = stored[f"{key}_B.weight"].double() @ stored[f"{key}_A.weight"].double()
            update = (layer.weight.double() - before[name].double()).detach()
            best = torch.linalg.svdvals(update)[5:].norm()
            assert float((near - update).norm()) == pytest.approx(float(best), rel=1e-2)
            lost += float((near - update).square().sum())
            whole += float(update.square().sum())
        assert found.relative == pytest.approx((lost / whole) ** 0.5, rel=1e-2)

    def test_half_the_bytes_and_a_stated_error(
        self, product: Path, base: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        manifest = read_manifest(product)
        exact = tmp_path / "exact"
        export_adapter(tmp_path / "base", product, manifest, exact)
        found = export_adapter(
            tmp_path / "base", product, manifest, tmp_path / "half", dtype="fp16"
        )
        tensors = [load_file(p / "adapter_model.safetensors") for p in (exact, tmp_path / "half")]
        lost = whole = 0.0
        for name in linear_layers(base):
            first, second = (
                entry[f"base_model.model.{name}.lora_B.weight"].double()
                @ entry[f"base_model.model.{name}.lora_A.weight"].double()
                for entry in tensors
            )
            lost += float((first - second).square().sum())
            whole += float(first.square().sum())
        assert found.relative == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
        assert 1e-5 < found.relative < 1e-3
        sizes = [sum(tensor.nbytes for tensor in entry.values()) for entry in tensors]
        assert sizes[0] == 2 * sizes[1]

    def test_layers_of_other_ranks_keep_them(
        self, product: Path, base: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        """A fourth stage that trained a single layer."""
        name = "model.layers.0.mlp.up_proj"
        some = {key: value for key, value in deltas_of(4, base).items() if key.startswith(name)}
        delta = NewDelta(stage=4, modality="m4", scale=SCALE, rank=RANK, tensors=some)
        write_product(
            tmp_path / "four", key="k", step="s", base_sha256="b", previous=product, delta=delta
        )
        manifest = read_manifest(tmp_path / "four")
        export_adapter(tmp_path / "base", tmp_path / "four", manifest, tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert config["r"] == 4 * RANK
        assert set(config["rank_pattern"].values()) == {3 * RANK}
        assert len(config["rank_pattern"]) == 13
        served = PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter").eval()
        fold_lineage(base, tmp_path / "four", manifest)
        torch.testing.assert_close(logits(served), logits(base), rtol=0, atol=1e-5)


class TestRefusals:
    def test_a_base_without_the_layers(self, product: Path, tmp_path: Path) -> None:
        other = LlamaConfig(
            vocab_size=40,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
        with pytest.raises(DataError, match=r"changes 'model\.layers\.1"):
            export_folder(tmp_path / "other", product, read_manifest(product), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_overflow_names_the_tensor(
        self, product: Path, base: LlamaForCausalLM, tmp_path: Path
    ) -> None:
        with torch.no_grad():
            base.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
        base.save_pretrained(tmp_path / "base")
        with pytest.raises(DataError, match=r"layers\.0\.mlp\.up_proj\.weight' is not finite"):
            export_folder(
                tmp_path / "base", product, read_manifest(product), tmp_path / "out", dtype="fp16"
            )
        assert not (tmp_path / "out").exists()

    def test_an_output_that_exists(self, product: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="exists; delete it"):
            export_folder(tmp_path / "base", product, read_manifest(product), tmp_path / "base")
        with pytest.raises(InputError, match="exists; delete it"):
            export_adapter(tmp_path / "base", product, read_manifest(product), tmp_path / "base")
