"""LoRA and the folding of deltas: exactly the linear layers, exactly the same function."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mera_ds.checkpoint import NewDelta, read_manifest, write_product
from mera_ds.config import LoraConfig
from mera_ds.errors import DataError
from mera_ds.merge.lineage import merge_product
from mera_ds.model.backbone import fold_lineage
from mera_ds.model.lora import (
    WeightedDelta,
    attach_lora,
    fold_deltas,
    linear_layers,
    lora_parameters,
)

LAYERS = 2
PROJECTIONS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}
LINEAR = {f"model.layers.{n}.{name}" for n in range(LAYERS) for name in PROJECTIONS}
LORA = LoraConfig(rank=3, alpha=5.0)


def tiny_llm(dtype: torch.dtype = torch.float32, tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(llm: nn.Module) -> Tensor:
    with torch.no_grad():
        return llm(input_ids=torch.arange(20)[None] % 40).logits


def randomise(llm: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Fill the factors as if they had been trained; return a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    factors = lora_parameters(llm)
    for parameter in factors.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return {name: parameter.detach().clone() for name, parameter in factors.items()}


def trained_delta(seed: int) -> dict[str, Tensor]:
    llm = tiny_llm()
    attach_lora(llm, LORA)
    return randomise(llm, seed)


@pytest.mark.parametrize("tied", [True, False])
def test_the_linear_layers_are_all_but_the_head(tied: bool) -> None:
    assert set(linear_layers(tiny_llm(tied=tied))) == LINEAR


class TestAttach:
    def test_every_linear_layer_gets_two_factors_of_the_rank(self) -> None:
        llm = tiny_llm()
        shapes = {name: tuple(layer.weight.shape) for name, layer in linear_layers(llm).items()}
        attach_lora(llm, LORA)
        factors = lora_parameters(llm)
        expected = {f"{name}.{factor}" for name in LINEAR for factor in ("lora_A", "lora_B")}
        assert set(factors) == expected
        for name, (outputs, inputs) in shapes.items():
            assert tuple(factors[f"{name}.lora_A"].shape) == (3, inputs)
            assert tuple(factors[f"{name}.lora_B"].shape) == (outputs, 3)

    def test_fresh_factors_change_nothing(self) -> None:
        llm = tiny_llm()
        before = logits(llm)
        attach_lora(llm, LORA)
        assert torch.equal(logits(llm), before)
        factors = lora_parameters(llm)
        assert all(not factors[name].any() for name in factors if name.endswith("lora_B"))
        assert all(factors[name].any() for name in factors if name.endswith("lora_A"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_factors_are_fp32_whatever_the_backbone_is(self, dtype: torch.dtype) -> None:
        llm = tiny_llm(dtype)
        attach_lora(llm, LORA)
        assert {entry.dtype for entry in lora_parameters(llm).values()} == {torch.float32}
        assert llm.get_input_embeddings().weight.dtype == dtype

    def test_loss_and_gradients_are_those_of_peft(self) -> None:
        plain, found = tiny_llm(), tiny_llm()
        names = list(linear_layers(plain))
        settings = PeftLoraConfig(r=3, lora_alpha=5, target_modules=names, bias="none")
        for llm in (plain, found):
            torch.manual_seed(3)
            if llm is plain:
                inject_adapter_in_model(settings, plain, adapter_name="default")
            else:
                attach_lora(found, LORA)
        expected, factors = lora_parameters(plain), lora_parameters(found)
        assert list(factors) == list(expected)
        assert all(torch.equal(factors[name], expected[name]) for name in expected)
        results = []
        for llm in (plain, found):
            randomise(llm)
            ids = torch.arange(20)[None]
            llm(input_ids=ids, labels=ids).loss.backward()
            results.append({name: p.grad for name, p in lora_parameters(llm).items()})
        for name, gradient in results[0].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                results[1][name], gradient, rtol=0, atol=1e-6 * max(1.0, scale), msg=name
            )

    def test_without_lora_there_are_no_factors(self) -> None:
        assert lora_parameters(tiny_llm()) == {}


class TestFold:
    def test_a_folded_delta_is_the_lora_forward(self) -> None:
        llm = tiny_llm()
        bare = logits(llm)
        attach_lora(llm, LORA)
        factors = randomise(llm)
        expected = logits(llm)
        assert (expected - bare).abs().max() > 0.1
        folded = tiny_llm()
        fold_deltas(folded, [WeightedDelta(factors, LORA.alpha / LORA.rank, "here")])
        torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5)

    def test_a_coefficient_scales_it_and_only_linear_layers_change(self) -> None:
        factors, llm, before = trained_delta(1), tiny_llm(), tiny_llm()
        fold_deltas(llm, [WeightedDelta(factors, 0.25, "here")])
        originals = dict(before.named_parameters())
        for name, parameter in llm.named_parameters():
            expected = originals[name].detach()
            layer = name.removesuffix(".weight")
            if layer in LINEAR:
                product = factors[f"{layer}.lora_B"].double() @ factors[f"{layer}.lora_A"].double()
                expected = (expected.double() + 0.25 * product).float()
                torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(parameter, expected), name

    def test_many_deltas_are_rounded_once(self) -> None:
        """Deltas too small to move a bfloat16 weight one by one move it together."""
        deltas = [WeightedDelta(trained_delta(seed), 0.01, "here") for seed in range(8)]
        llm, exact = tiny_llm(torch.bfloat16), tiny_llm(torch.bfloat16).float()
        fold_deltas(llm, deltas)
        fold_deltas(exact, deltas)
        for name, parameter in llm.named_parameters():
            rounded = dict(exact.named_parameters())[name].to(torch.bfloat16)
            assert torch.equal(parameter, rounded), name

    def test_layers_without_a_delta_stay_as_they_are(self) -> None:
        name = "model.layers.0.mlp.up_proj"
        some = {key: entry for key, entry in trained_delta(1).items() if key.startswith(name)}
        llm = tiny_llm()
        fold_deltas(llm, [WeightedDelta(some, 1.0, "here")])
        changed = {
            entry
            for entry, parameter in llm.named_parameters()
            if not torch.equal(parameter, dict(tiny_llm().named_parameters())[entry])
        }
        assert changed == {f"{name}.weight"}


LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lm_head.lora_A": (3, 16), "lm_head.lora_B": (40, 3)}, "here changes 'lm_head'"),
        ({"model.layers.7.mlp.up_proj.lora_A": (3, 16)}, r"changes 'model\.layers\.7"),
        ({f"{LAYER}.lora_A": (3, 17), f"{LAYER}.lora_B": (24, 3)}, r"\(3, 17\).*\(24, 16\)"),
        ({f"{LAYER}.lora_A": (3, 16), f"{LAYER}.lora_B": (25, 3)}, r"\(25, 3\).*\(24, 16\)"),
        ({f"{LAYER}.lora_A": (3, 16), f"{LAYER}.lora_B": (24, 4)}, r"\(24, 4\) and \(3, 16\)"),
        ({f"{LAYER}.lora_A": (3, 16)}, rf"here has no tensor '{LAYER}\.lora_B'"),
        ({f"{LAYER}.lora_B": (24, 3)}, rf"here has no tensor '{LAYER}\.lora_A'"),
    ],
)
def test_a_delta_of_another_model_is_refused_before_anything_changes(
    tensors: dict[str, tuple[int, int]], message: str
) -> None:
    llm = tiny_llm()
    bad = {name: torch.ones(shape) for name, shape in tensors.items()}
    deltas = [WeightedDelta(trained_delta(1), 1.0, "good"), WeightedDelta(bad, 1.0, "here")]
    with pytest.raises(DataError, match=message):
        fold_deltas(llm, deltas)
    for name, parameter in tiny_llm().named_parameters():
        assert torch.equal(parameter, dict(llm.named_parameters())[name])


def test_a_lineage_is_the_base_and_its_weighted_deltas(tmp_path: Path) -> None:
    previous = None
    for stage in (1, 2, 3):
        delta = NewDelta(stage=stage, modality="m", scale=2.0, rank=3, tensors=trained_delta(stage))
        tuned = tmp_path / f"tuned{stage}"
        facts = {"key": "k", "step": "s", "base_sha256": "b"}
        write_product(tuned, **facts, previous=previous, delta=delta)
        previous = tmp_path / f"merged{stage}"
        merge_product(tuned, previous, key="k", step="s", stage=stage, coefficient=f"1/{stage}")
    assert previous is not None
    llm, expected = tiny_llm(), tiny_llm()
    fold_lineage(llm, previous, read_manifest(previous))
    weights = [2.0, 1.0, 2 / 3]
    fold_deltas(
        expected, [WeightedDelta(trained_delta(n), w, "") for n, w in enumerate(weights, 1)]
    )
    for (name, found), wanted in zip(llm.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted), name
