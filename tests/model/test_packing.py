"""Packed rows and shared prefixes against padded rows: loss and every gradient."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mera_ds.batch import Batch, Sample
from mera_ds.config import LoraConfig
from mera_ds.errors import DataError, InputError
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.connectors import build_connector
from mera_ds.model.lora import attach_lora
from mera_ds.model.mllm import Layout, MultimodalLM
from mera_ds.model.packing import pack

WIDTH, FEATURE_DIM, VOCABULARY = 32, 12, 512
SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[type[Any], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
PADDED = Layout()
PACKED = Layout(packed=True)
SHARED = Layout(packed=True, shared=True)


def build(
    layout: Layout, family: str = "llama", checkpointing: bool = False, **settings: Any
) -> MultimodalLM:
    """Return the same random model with LoRA, whatever the layout."""
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    llm: Any = model(config(**{**SETTINGS, **settings}))
    llm.set_attn_implementation("sdpa")
    llm.requires_grad_(False)
    attach_lora(llm, LoraConfig(rank=2, alpha=4.0))
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    connectors = {
        "image": build_connector("mlp", {}, FEATURE_DIM, WIDTH),
        "audio": build_connector("mlp", {"norm": "layer"}, FEATURE_DIM, WIDTH),
    }
    return MultimodalLM(llm, connectors, {}, 64, layout).train()


def ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())


def sample(number: int, medium: int | None, suffix: int = 3, answer: int = 2) -> Sample:
    """Return a sample; those of a medium have its features, and a suffix that begins alike."""
    look = number if medium is None else medium
    generator = torch.Generator().manual_seed(1000 + look)
    return Sample(
        id=f"set/{number}#0",
        modality="image",
        prefix_ids=ids(2, 7),
        suffix_ids=(*ids(2, 8), *ids(suffix, number))[: suffix + number % 3],
        answer_ids=ids(answer + number % 2, 50 + number),
        media=torch.randn(
            3 + (number if medium is None else medium) % 4, FEATURE_DIM, generator=generator
        ),
        encoded=True,
        medium=None if medium is None else (0, medium),
    )


MIXED = [
    sample(0, 0),
    sample(1, 1),
    sample(2, 0),
    sample(3, 2),
    sample(4, 0),
    sample(5, None),
    sample(6, 1),
]


def batch(samples: Sequence[Sample], counted: Sequence[bool] | None = None) -> Batch:
    return Batch(tuple(samples), tuple(counted or [True] * len(samples)))


def result(model: MultimodalLM, one: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and the gradient of every parameter that trains."""
    loss = model(one)
    loss.backward()
    trained = {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }
    return loss.detach(), trained


def assert_same(found: MultimodalLM, expected: MultimodalLM, one: Batch) -> None:
    loss, gradients = result(found, one)
    exact_loss, exact = result(expected, one)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == exact.keys()
    assert len(exact) > 20
    assert all(bool(exact[name].any()) for name in exact if "lora" in name or "image" in name)
    for name, gradient in exact.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [PACKED, SHARED], ids=["packed", "shared"])
class TestEquality:
    def test_loss_and_gradients_are_those_of_padded_rows(self, family: str, layout: Layout) -> None:
        assert_same(build(layout, family), build(PADDED, family), batch(MIXED))

    def test_also_with_checkpointing(self, family: str, layout: Layout) -> None:
        assert_same(build(layout, family, True), build(PADDED, family), batch(MIXED))

    def test_a_sample_that_does_not_count(self, family: str, layout: Layout) -> None:
        counted = [number % 3 != 0 for number in range(len(MIXED))]
        assert_same(build(layout, family), build(PADDED, family), batch(MIXED, counted))

    def test_one_sample_alone(self, family: str, layout: Layout) -> None:
        assert_same(build(layout, family), build(PADDED, family), batch(MIXED[:1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"suffix_ids": ()},
        {"suffix_ids": (5, 6), "answer_ids": (7, 8, 9)},
        {"answer_ids": (7,)},
        {"prefix_ids": ()},
    ],
    ids=["no suffix", "equal texts", "equal answers of one token", "no prefix"],
)
def test_prefixes_of_every_extent_are_shared_rightly(changes: dict[str, Any]) -> None:
    """The first label may be predicted by the medium, the last by the shared part."""
    samples = [dataclasses.replace(sample(n, 0), **changes) for n in range(3)]
    longer = dataclasses.replace(samples[0], answer_ids=(*samples[0].answer_ids, 11))
    assert_same(build(SHARED), build(PADDED), batch([*samples, longer, sample(9, 1)]))


def test_another_prefix_is_no_shared_one() -> None:
    other = dataclasses.replace(sample(1, 0), prefix_ids=ids(3, 99))
    assert_same(build(SHARED), build(PADDED), batch([sample(0, 0), other]))


class TestPositions:
    def test_packing_computes_no_padding(self) -> None:
        model = build(PACKED)
        model(batch(MIXED))
        lengths = [one.text_tokens + len(one.media) for one in MIXED]
        assert model.positions.computed == sum(lengths)
        assert model.positions.padded == len(MIXED) * max(lengths)

    def test_a_shared_medium_is_computed_once(self) -> None:
        model = build(SHARED)
        samples = [sample(3 * number, 0) for number in range(4)]
        model(batch(samples))
        common = len(samples[0].prefix_ids) + len(samples[0].media) + 2  # of the suffix
        own = [one.text_tokens - len(one.prefix_ids) - 2 for one in samples]
        assert model.positions.computed == common + sum(own)

    def test_padded_rows_save_nothing(self) -> None:
        model = build(PADDED)
        model(batch(MIXED))
        assert model.positions.computed == model.positions.padded > 0


class TestRefusals:
    def test_a_sample_without_an_answer(self) -> None:
        with pytest.raises(DataError, match="set/0#0 has no token to learn from"):
            build(PACKED)(batch([dataclasses.replace(sample(0, 0), answer_ids=())]))

    def test_a_row_that_is_too_long(self) -> None:
        long = dataclasses.replace(sample(0, 0), answer_ids=ids(60, 1))
        with pytest.raises(InputError, match=r"set/0#0 is 68 tokens long .*max_length=64;"):
            build(SHARED)(batch([long]))

    def test_a_sliding_window_that_is_shorter_than_a_row(self) -> None:
        with pytest.raises(InputError, match=r"window of 5.* set execution\.packing=false"):
            build(PACKED, "mistral", sliding_window=5)(batch(MIXED))
        assert_same(
            build(PACKED, "mistral", sliding_window=64), build(PADDED, "mistral"), batch(MIXED)
        )

    def test_an_attention_that_cannot_be_kept_apart(self) -> None:
        model = build(PADDED)
        model.llm.set_attn_implementation("eager")
        with pytest.raises(InputError, match=r"needs backbone\.attention sdpa or flash"):
            MultimodalLM(model.llm, {}, {}, 64, PACKED)


def test_a_model_that_packs_still_generates(tiny_template: Any) -> None:
    tokenizer = load_tokenizer(tiny_template / "backbone")
    samples = [dataclasses.replace(one, answer_ids=()) for one in MIXED]
    said = [
        build(layout).eval().generate(samples, 6, tokenizer) for layout in (PADDED, PACKED, SHARED)
    ]
    assert said[0] == said[1] == said[2]


def test_flash_attention_gets_the_ends_of_the_samples() -> None:
    model = build(PACKED)
    media = [torch.zeros(len(one.media), WIDTH) for one in MIXED]
    counted = [True] * len(MIXED)
    row = pack(MIXED, media, counted, False, model.llm.get_input_embeddings())
    found = row.attention_arguments("flash_attention_2")
    lengths = [one.text_tokens + len(one.media) for one in MIXED]
    assert found["cu_seq_lens_q"].diff().tolist() == lengths
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_k"] == max(lengths)
    starts = found["cu_seq_lens_k"][:-1].long()
    assert row.position_ids[0, starts].tolist() == [0] * len(MIXED)
