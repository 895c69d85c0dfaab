"""Base + LoRA adapter in one pass: what peft makes of it, without the dense update."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mera_ds.errors import InputError
from mera_ds.merge import digest, stream
from mera_ds.merge.state_dicts import merge_checkpoints, prepare_merge

from .models import base_model, checkpoint, state

LINEAR = ["q_proj", "o_proj", "up_proj", "down_proj"]


def trained(model: PreTrainedModel, folder: Path, **settings: Any) -> Path:
    """Save an adapter whose factors are all random."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **settings}
    peft_model = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    peft_model.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return dict(model.merge_and_unload().state_dict())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks and spans so small that they begin and end within rows."""
    monkeypatch.setattr(digest, "BLOCK", 100)
    monkeypatch.setattr(stream, "SPAN", 64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", base_model(), "8KB")


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_embd=24, n_layer=2, n_head=2, n_positions=32)
    ).eval()


@pytest.mark.usefixtures("small_blocks")
class TestEqualToPeft:
    """At stage 1 the merge is W + (α/r) B A; at stage i a part of 1/i of that."""

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_rslora": True},
            {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 9}},
            {"modules_to_save": ["lm_head"]},
            {"target_modules": [*LINEAR, "embed_tokens"]},
        ],
        ids=["plain", "rslora", "patterns", "modules_to_save", "embeddings"],
    )
    def test_llama(self, base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
        adapter = trained(base_model(), tmp_path / "adapter", **settings)
        self.assert_equal(base, adapter, tmp_path)

    def test_biases_of_layers_with_factors(self, tmp_path: Path) -> None:
        base = checkpoint(tmp_path / "base", base_model(attention_bias=True))
        model = base_model(attention_bias=True)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        adapter = trained(model, tmp_path / "adapter", bias="all")
        self.assert_equal(base, adapter, tmp_path)

    def test_weights_that_are_stored_transposed(self, tmp_path: Path) -> None:
        base = checkpoint(tmp_path / "base", gpt2())
        adapter = trained(
            gpt2(), tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
        )
        self.assert_equal(base, adapter, tmp_path)

    def assert_equal(self, base: Path, adapter: Path, tmp_path: Path) -> None:
        expected, before = merged_by_peft(base, adapter), state(base)
        loaded = AutoModelForCausalLM.from_pretrained(
            merge_checkpoints(base, adapter, 1, tmp_path / "one")
        ).state_dict()
        changed = 0
        for name, tensor in expected.items():
            torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-6)
        third = state(merge_checkpoints(base, adapter, 3, tmp_path / "three"))
        one = state(tmp_path / "one")
        for name, tensor in third.items():
            part = before[name] + (one[name] - before[name]) / 3
            torch.testing.assert_close(tensor, part, rtol=1e-5, atol=1e-6)
            changed += not torch.equal(tensor, before[name])
        assert changed >= 4


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", base_model().half())
    adapter = trained(base_model(), tmp_path / "adapter")
    found = state(merge_checkpoints(base, adapter, 3, tmp_path / "out"))
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    old = state(base)[f"{name}.weight"]
    exact = old.double() + (6 / 4) / 3 * (b.double() @ a.double())
    unit = 2.0 ** (torch.frexp(exact).exponent - 12)
    assert bool(((found[f"{name}.weight"].double() - exact).abs() <= unit + 1e-7).all())
    for other in ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"):
        assert torch.equal(found[other], state(base)[other])


def test_the_record_names_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter = trained(base_model(), tmp_path / "adapter")
    output = merge_checkpoints(base, adapter, 3, tmp_path / "out")
    record = json.loads((output / "merge.json").read_text())
    assert record["inputs"]["tuned"]["files"].keys() == {"adapter_model.safetensors"}
    assert len(record["inputs"]["tuned"]["weights"]) == 64
    assert "adapter (LoRA adapter)" not in (output / "README.md").read_text()
    assert "tuned (LoRA adapter) | adapter" in (output / "README.md").read_text()
    with pytest.raises(InputError, match=r"went into .*out already, as stage 3"):
        prepare_merge(output, adapter, 4, tmp_path / "again")


def test_another_alpha_is_another_merge(base: Path, tmp_path: Path) -> None:
    """What is left of a stopped merge is not continued with it."""
    keys = set()
    for alpha in (6, 7):
        adapter = trained(base_model(), tmp_path / "adapter")
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": alpha}))
        os.utime(adapter / "adapter_model.safetensors", ns=(0, 0))
        keys.add(prepare_merge(base, adapter, 2, tmp_path / "out").key)
    assert len(keys) == 2


class TestRefusals:
    def refusal(self, base: Path, adapter: Path) -> str:
        with pytest.raises(InputError) as caught:
            prepare_merge(base, adapter, 2, base.parent / "out")
        assert not (base.parent / "out").exists()
        return str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"use_dora": True}, "use_dora is True"),
            ({"use_qalora": True}, "use_qalora is True"),
            ({"lora_bias": True}, "lora_bias is True"),
            ({"peft_type": "IA3"}, "peft_type is IA3, not LORA"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base"),
            ({"layer_replication": [[0, 2]]}, r"layer_replication is [[0, 2]]"),
            ({"r": None}, "r or lora_alpha is missing"),
            ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is no pattern"),
        ],
    )
    def test_what_is_not_plain_lora(
        self, base: Path, tmp_path: Path, changes: dict[str, Any], problem: str
    ) -> None:
        adapter = trained(base_model(), tmp_path / "adapter")
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        message = self.refusal(base, adapter)
        assert f"adapter_config.json: {problem}" in message
        assert "→ merge it with peft (merge_and_unload, save_pretrained)" in message

    def test_dora_as_peft_saves_it(self, base: Path, tmp_path: Path) -> None:
        message = self.refusal(base, trained(base_model(), tmp_path / "adapter", use_dora=True))
        assert "use_dora is True" in message

    def test_another_base(self, tmp_path: Path) -> None:
        wider = checkpoint(tmp_path / "base", base_model(hidden_size=32, num_hidden_layers=1))
        message = self.refusal(wider, trained(base_model(), tmp_path / "adapter"))
        name = "model.layers.0.mlp.up_proj.weight"
        assert (
            f"'{name}' is (40, 32) in {wider}; {tmp_path / 'adapter'} changes (40, 24)" in message
        )
        assert (
            f"changes 'model.layers.1.mlp.up_proj.weight', which {wider} does not have" in message
        )

    def test_other_embeddings_below_the_factors(self, base: Path, tmp_path: Path) -> None:
        model = base_model()
        model.model.embed_tokens.weight.data[3, 3] += 1
        adapter = trained(model, tmp_path / "adapter", target_modules=["embed_tokens"])
        message = self.refusal(base, adapter)
        assert "'model.embed_tokens.weight' of the base of" in message
        assert f"is not that of {base}" in message

    def test_a_factor_is_missing(self, base: Path, tmp_path: Path) -> None:
        adapter = trained(base_model(), tmp_path / "adapter")
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
        save_file(tensors, file)
        message = self.refusal(base, adapter)
        assert "up_proj.lora_A.weight' of" in message
        assert "only LoRA on linear layers and embeddings can be merged" in message

    @pytest.mark.parametrize(
        "settings",
        [
            {"target_modules": ["embed_tokens"]},
            {"target_modules": ["q_proj", "lm_head"]},
            {"modules_to_save": ["embed_tokens"]},
        ],
    )
    def test_one_of_two_tied_tensors(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        """Peft leaves the other one as it was; a tied output would change both."""
        base = checkpoint(tmp_path / "base", base_model(tie_word_embeddings=True))
        adapter = trained(base_model(tie_word_embeddings=True), tmp_path / "adapter", **settings)
        message = self.refusal(base, adapter)
        assert f".weight', which {base} ties to another tensor\n  → peft trained the two" in message
        assert "set tie_word_embeddings to false in its config.json" in message

    def test_settings_that_are_none(self, base: Path, tmp_path: Path) -> None:
        adapter = trained(base_model(), tmp_path / "adapter")
        (adapter / "adapter_config.json").write_text("[]")
        assert "adapter_config.json holds no configuration" in self.refusal(base, adapter)

    def test_no_safetensors(self, base: Path, tmp_path: Path) -> None:
        adapter = trained(base_model(), tmp_path / "adapter")
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        message = self.refusal(base, adapter)
        assert "adapter has adapter_config.json but no adapter_model.safetensors" in message


def test_ties_on_an_adapter_carries_a_warning(base: Path, tmp_path: Path) -> None:
    adapter = trained(base_model(), tmp_path / "adapter")
    for method, warned in (("ties", True), ("dare", True), ("magmax", False)):
        plan = prepare_merge(base, adapter, 2, tmp_path / "out", method=method, base=base)
        assert any("on LoRA deltas can fall below" in note for note in plan.notes) == warned


def test_another_name_of_the_base_is_a_note(base: Path, tmp_path: Path) -> None:
    adapter = trained(base_model(), tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "somebody/other"}))
    (note,) = prepare_merge(base, adapter, 2, tmp_path / "out").notes
    assert note == f"{adapter} was trained on 'somebody/other', and is added to {base}"
