"""Backbones of the public families, as HF folders, through everything that a run does with one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_backbones import END, FAMILIES, WIDTH, write_backbone
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mera_ds.batch import Batch, Sample
from mera_ds.checkpoint import NewDelta, write_product
from mera_ds.config import RunConfig, load_profile
from mera_ds.data.prompts import PromptBuilder
from mera_ds.errors import DataError, InputError
from mera_ds.identity import base_sha256
from mera_ds.model.backbone import load_backbone, load_tokenizer
from mera_ds.model.build import build_encoders, build_model
from mera_ds.model.lora import linear_layers, lora_parameters
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.trainable import set_trainable

QUESTIONS = ("What colour is it?", "Up and left on a blue ground, or right?")
ANSWERS = ("red", "a square on a blue ground")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / family, family)


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return load_profile("tiny", [f"backbone.path={folder}", "prompt.style=chat", *overrides])


def build(config: RunConfig, run: Path, product: Path | None = None, **kind: Any) -> MultimodalLM:
    encoders = build_encoders(config, run, ["image"])
    return build_model(config, run, product, ["image"], encoders, **kind)


def samples(config: RunConfig, model: MultimodalLM, supervised: bool = True) -> list[Sample]:
    """Return a picture of each colour, with texts of different length."""
    prompts = PromptBuilder(config.prompt, load_tokenizer(Path(config.backbone.path)))
    found = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        pieces = prompts.build(question, answer if supervised else None, f"set/{number}#0")
        picture = Image.new("RGB", (8, 8), ("red", "blue")[number])
        found.append(
            Sample(
                id=f"set/{number}#0",
                modality="image",
                prefix_ids=pieces.prefix,
                suffix_ids=pieces.suffix,
                answer_ids=pieces.answer,
                media=model.encoders["image"].transform(picture),
                encoded=False,
            )
        )
    return found


def logits(model: MultimodalLM) -> Tensor:
    with torch.no_grad():
        return model.llm(input_ids=torch.arange(5, 45)[None]).logits


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_loss_reaches_lora_and_connector_only(
    folder: Path, checkpointing: str, tmp_path: Path
) -> None:
    config = config_of(folder, f"backbone.gradient_checkpointing={checkpointing}")
    model = build(config, tmp_path, lora_for="image")
    model.train()
    set_trainable(model, ["connector:image", "lora"])
    loss = model(Batch(tuple(samples(config, model)), (True, True)))
    loss.backward()
    learned = {name for name, entry in model.named_parameters() if entry.grad is not None}
    assert learned == {
        name for name, _ in model.named_parameters() if "lora_" in name or "connectors." in name
    }
    assert all(
        entry.grad.any() for name, entry in lora_parameters(model.llm).items() if "_B" in name
    )
    assert model.connectors["image"].layers[0].weight.grad.any()


def test_the_loss_is_that_of_the_full_logits(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    model = build(config, tmp_path)
    rows = samples(config, model)
    total = torch.zeros(())
    with torch.no_grad():
        for one in rows:
            out = model.llm(inputs_embeds=embeddings(model, one)).logits[0, :-1]
            labels = torch.tensor(one.answer_ids)
            losses = torch.nn.functional.cross_entropy(
                out[-len(labels) :].float(), labels, reduction="sum"
            )
            total += losses
        found = model(Batch(tuple(rows), (True, True)))
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-4)


def embeddings(model: MultimodalLM, one: Sample, more: Sequence[int] = ()) -> Tensor:
    """Return the embeddings (1, T, D) of a row, laid out by hand."""
    embed = model.llm.get_input_embeddings()
    features = model.encode([one])
    media = model.connectors["image"](features.values, features.mask)[0]
    tail = torch.tensor([*one.suffix_ids, *one.answer_ids, *more])
    prefix = torch.tensor(one.prefix_ids, dtype=torch.long)
    return torch.cat([embed(prefix), media, embed(tail)])[None]


def test_generation_is_greedy_and_stops_at_the_end_of_a_turn(
    family: str, folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder)
    model = build(config, tmp_path)
    tokenizer = load_tokenizer(folder)
    prompts = PromptBuilder(config.prompt, tokenizer)
    end = tokenizer.convert_tokens_to_ids(END[FAMILIES[family].tokenizer])
    assert set(prompts.end_ids) == {end, tokenizer.eos_token_id}
    rows = samples(config, model, supervised=False)
    expected = []
    for one in rows:
        said: list[int] = []
        with torch.no_grad():
            while len(said) < 12:
                following = int(
                    model.llm(inputs_embeds=embeddings(model, one, said)).logits[0, -1].argmax()
                )
                if following in prompts.end_ids:
                    break
                said.append(following)
        expected.append(tokenizer.decode(said, skip_special_tokens=True).strip())
    assert model.generate(rows, 12, tokenizer, prompts.end_ids) == expected


def test_folding_a_delta_gives_what_lora_gave(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder)
    model = build(config, tmp_path, lora_for="image")
    model.eval()
    layers = 2 * 7
    factors = lora_parameters(model.llm)
    assert len(factors) == 2 * layers
    generator = torch.Generator().manual_seed(1)
    for parameter in factors.values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    delta = NewDelta(
        stage=1,
        modality="image",
        scale=config.lora.alpha / config.lora.rank,
        rank=config.lora.rank,
        tensors={name: entry.detach() for name, entry in factors.items()},
    )
    write_product(
        tmp_path / "product",
        key="key",
        step="01-image/tune",
        base_sha256=base_sha256(config, tmp_path),
        previous=None,
        delta=delta,
    )
    folded = build(config, tmp_path, tmp_path / "product")
    folded.eval()
    bare = build(config, tmp_path)
    assert len(linear_layers(folded.llm)) == layers
    torch.testing.assert_close(logits(folded), logits(model), rtol=1e-4, atol=1e-4)
    assert float((logits(folded) - logits(bare)).abs().max()) > 0.1


def test_the_connector_is_as_wide_as_the_embedding(folder: Path, tmp_path: Path) -> None:
    model = build(config_of(folder), tmp_path)
    assert model.connectors["image"].layers[-1].out_features == WIDTH


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "lacks tensors that its config.json needs"),
        ("model.layers.1.mlp.up_proj.weight", (5, 5), "of another shape than its config.json"),
        ("model.layers.2.mlp.up_proj.weight", (5, 5), "that its config.json has no place for"),
    ],
)
def test_other_tensors_than_the_configuration_needs_are_named(
    name: str, shape: tuple[int, int] | None, complaint: str, tmp_path: Path
) -> None:
    llama = write_backbone(tmp_path / "llama", "llama")
    tensors = load_file(llama / "model.safetensors")
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=rf"{complaint}.* \(1\): {name}; fetch the folder again"):
        load_backbone(config_of(llama).backbone, llama)


class TestAttention:
    @pytest.fixture
    def llama(self, tmp_path: Path) -> Path:
        return write_backbone(tmp_path / "llama", "llama")

    def test_flash_attention_that_cannot_run_is_refused_with_a_remedy(self, llama: Path) -> None:
        config = config_of(llama, "backbone.attention=flash_attention_2")
        with pytest.raises(
            InputError,
            match=r"is flash_attention_2, but flash-attn .*backbone\.attention=auto .*pip install",
        ):
            load_backbone(config.backbone, llama)

    def test_auto_says_what_it_took_and_why(
        self, llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mera_ds.log.logger.propagate", True)
        with caplog.at_level("INFO", logger="mera_ds"):
            llm = load_backbone(config_of(llama).backbone, llama)
        assert llm.config._attn_implementation == "sdpa"
        assert "LlamaForCausalLM) in fp32, attention sdpa (flash-attn " in caplog.text

    def test_a_family_that_scales_its_logits_is_refused(self, llama: Path) -> None:
        from transformers import GraniteConfig, GraniteForCausalLM

        settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
        GraniteForCausalLM(GraniteConfig(**settings, **heads, logits_scaling=8.0)).save_pretrained(
            llama
        )
        with pytest.raises(InputError, match=r"GraniteForCausalLM with logits_scaling=8\.0"):
            load_backbone(config_of(llama).backbone, llama)
