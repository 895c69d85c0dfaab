"""The multimodal model against a plain one: a row at a time, full logits, shifted labels."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mera_ds.batch import Batch, Sample
from mera_ds.config import LoraConfig
from mera_ds.errors import DataError, InputError
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.connectors import build_connector
from mera_ds.model.encoders import build_encoder
from mera_ds.model.lora import attach_lora
from mera_ds.model.mllm import MultimodalLM

FEATURE_DIM = 12
WIDTH = 32
VOCABULARY = 512
TOKENS = (5, 1, 3, 4)
"""How many feature tokens the media of the samples have."""


def tiny_llm(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Return a random Llama whose greedy texts vary."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()


def tiny_model(llm: nn.Module | None = None, max_length: int = 64) -> MultimodalLM:
    """Return a model with three connectors, of both kinds."""
    queries = {"num_queries": 3, "hidden": 16, "layers": 2, "heads": 2, "dropout": 0.0}
    kinds = {
        "image": ("mlp", {}),
        "video": ("mlp", {"norm": "layer"}),
        "audio": ("qformer", queries),
    }
    torch.manual_seed(1)
    connectors = {
        name: build_connector(kind, options, FEATURE_DIM, WIDTH)
        for name, (kind, options) in kinds.items()
    }
    return MultimodalLM(llm or tiny_llm(), connectors, {}, max_length)


def sample(number: int, modality: str = "image", answered: bool = True) -> Sample:
    """Return a sample of its own length, text and medium."""
    generator = torch.Generator().manual_seed(number)
    sizes = (1 + number % 2, 2 + number % 3, 1 + (number + 1) % 4)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in sizes]
    tokens = TOKENS[number % len(TOKENS)]
    return Sample(
        id=f"set/{number}#0",
        modality=modality,
        prefix_ids=tuple(ids[0]),
        suffix_ids=tuple(ids[1]),
        answer_ids=tuple(ids[2]) if answered else (),
        media=torch.randn(tokens, FEATURE_DIM, generator=generator),
        encoded=True,
    )


def batch(samples: Sequence[Sample], counted: Sequence[bool] | None = None) -> Batch:
    return Batch(tuple(samples), tuple(counted or [True] * len(samples)))


def row_of(model: MultimodalLM, one: Sample) -> tuple[Tensor, Tensor]:
    """Return the embeddings (1, T, D) and token ids (T,) of a row; the ids of its medium are 0."""
    embed = model.llm.get_input_embeddings()
    mask = torch.ones(1, len(one.media), dtype=torch.bool)
    media = model.connectors[one.modality](one.media[None], mask)[0]
    tail = torch.tensor((*one.suffix_ids, *one.answer_ids), dtype=torch.long)
    prefix = torch.tensor(one.prefix_ids, dtype=torch.long)
    ids = torch.cat([prefix, torch.zeros(len(media), dtype=torch.long), tail])
    return torch.cat([embed(prefix), media, embed(tail)])[None], ids


def reference_loss(model: MultimodalLM, samples: Sequence[Sample]) -> Tensor:
    """Return the summed loss from the full logits of each row alone and labels shifted by one."""
    total = torch.zeros(())
    for one in samples:
        embeddings, ids = row_of(model, one)
        labels = ids.clone()
        labels[: len(ids) - len(one.answer_ids)] = -100
        logits = model.llm(inputs_embeds=embeddings).logits[0].float()
        total = total + functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    return total


def gradients(model: MultimodalLM, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    named = model.named_parameters()
    return {name: entry.grad.clone() for name, entry in named if entry.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
class TestLoss:
    def test_it_is_that_of_the_full_logits_with_shifted_labels(self, modality: str) -> None:
        model = tiny_model()
        samples = [sample(number, modality) for number in range(4)]
        expected = reference_loss(model, samples)
        found = model(batch(samples))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert_close(gradients(model, model(batch(samples))), gradients(model, expected))

    def test_a_row_has_the_same_loss_alone_and_among_longer_ones(self, modality: str) -> None:
        model = tiny_model()
        samples = [sample(number, modality) for number in range(4)]
        alone = [model(batch([one])) for one in samples]
        for count in (2, 3, 4):
            together = model(batch(samples[:count]))
            torch.testing.assert_close(together, sum(alone[:count]), rtol=1e-5, atol=1e-5)

    def test_a_row_that_does_not_count_gives_exactly_no_gradient(self, modality: str) -> None:
        model = tiny_model()
        samples = [sample(number, modality) for number in range(2)]
        loss = model(batch(samples, [False, False]))
        assert loss.item() == 0
        found = gradients(model, loss)
        assert all(bool((gradient == 0).all()) for gradient in found.values())
        expected = model(batch(samples[:1]))
        torch.testing.assert_close(model(batch(samples, [True, False])), expected)

    def test_every_connector_gets_a_gradient_zero_if_it_was_not_used(self, modality: str) -> None:
        model = tiny_model()
        found = gradients(model, model(batch([sample(0, modality), sample(1, modality)])))
        for name, connector in model.connectors.items():
            for parameter, _ in connector.named_parameters():
                gradient = found[f"connectors.{name}.{parameter}"]
                assert bool(gradient.any()) <= (name == modality)
        used = [name for name in found if name.startswith(f"connectors.{modality}.")]
        assert any(bool(found[name].any()) for name in used)

    def test_a_sample_without_an_answer_is_an_error(self, modality: str) -> None:
        unanswered = sample(1, modality, answered=False)
        with pytest.raises(DataError, match="set/1#0 has no token to learn from"):
            tiny_model()(batch([sample(0, modality), unanswered]))

    def test_what_lies_in_the_padding_has_no_influence(self, modality: str) -> None:
        model = tiny_model()
        short, long = sample(1, modality), sample(0, modality)
        other = dataclasses.replace(long, media=torch.full_like(long.media, 1e4))
        losses = [model(batch([short, entry], [True, False])) for entry in (long, other)]
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


class TestDtypes:
    def test_the_loss_of_a_half_precision_backbone_is_summed_in_fp32(self) -> None:
        model = tiny_model(tiny_llm(torch.bfloat16))
        loss = model(batch([sample(0), sample(1)]))
        assert loss.dtype == torch.float32
        exact = tiny_model()(batch([sample(0), sample(1)]))
        torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.1)

    def test_with_lora_only_the_factors_and_the_connectors_learn(self) -> None:
        llm = tiny_llm()
        llm.requires_grad_(False)
        attach_lora(llm, LoraConfig(rank=2, alpha=4.0))
        model = tiny_model(llm)
        found = gradients(model, model(batch([sample(0), sample(1)])))
        assert {name for name in found if name.startswith("llm")} == {
            name for name, _ in model.named_parameters() if "lora_" in name
        }
        assert all(bool(found[name].any()) for name in found if "lora_B" in name)


class TestEncoding:
    def test_features_may_be_stored_or_computed(self) -> None:
        encoder = build_encoder("tiny-audio", {"feature_dim": FEATURE_DIM}, None)
        model = tiny_model()
        model._encoders["image"] = encoder
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.rand(n, encoder.input_width, generator=generator) for n in (4, 2, 1)]
        raw = [
            dataclasses.replace(sample(number), media=medium, encoded=False)
            for number, medium in enumerate(inputs)
        ]
        features = encoder(inputs)
        stored = [
            dataclasses.replace(one, media=values[mask], encoded=True)
            for one, values, mask in zip(raw, features.values, features.mask, strict=True)
        ]
        assert [len(one.media) for one in stored] == [4, 2, 1]
        torch.testing.assert_close(model(batch(raw)), model(batch(stored)))

    def test_encoders_run_outside_of_autograd(self) -> None:
        encoder = build_encoder("tiny-audio", {"feature_dim": FEATURE_DIM}, None)
        encoder.requires_grad_(True)
        model = tiny_model()
        model._encoders["image"] = encoder
        raw = dataclasses.replace(
            sample(0), media=torch.rand(4, encoder.input_width), encoded=False
        )
        assert not model.encode([raw]).values.requires_grad

    def test_encoders_are_no_part_of_the_model(self) -> None:
        encoder = build_encoder("tiny-image", {}, None)
        model = MultimodalLM(tiny_llm(), {}, {"image": encoder}, 64)
        assert all(name.startswith("llm.") for name, _ in model.named_parameters())


class TestLength:
    def test_a_row_may_be_as_long_as_allowed(self) -> None:
        one = sample(0)
        length = len(one.prefix_ids + one.suffix_ids + one.answer_ids) + len(one.media)
        assert tiny_model(max_length=length)(batch([one])).isfinite()
        with pytest.raises(
            InputError,
            match=rf"set/0#0 is {length} tokens long .* prompt\.max_length={length - 1}; raise it",
        ):
            tiny_model(max_length=length - 1)(batch([one]))

    def test_generation_checks_it_too(self, tokenizer: Any) -> None:
        with pytest.raises(InputError, match="set/0#0"):
            tiny_model(max_length=5).generate([sample(0, answered=False)], 4, tokenizer)


@pytest.fixture
def tokenizer(tiny_template: Path) -> Any:
    """Return a tokenizer of its own for a test that changes it."""
    return load_tokenizer(tiny_template / "backbone")


def greedy(model: MultimodalLM, one: Sample, count: int, end: int) -> list[int]:
    """Generate one row token by token, each time from the whole row and without a cache."""
    embeddings, _ = row_of(model, one)
    embed = model.llm.get_input_embeddings()
    said: list[int] = []
    while len(said) < count and end not in said:
        logits = model.llm(inputs_embeds=embeddings).logits[0, -1]
        said.append(int(logits.argmax()))
        embeddings = torch.cat([embeddings, embed(torch.tensor([[said[-1]]]))], dim=1)
    return said


@pytest.mark.parametrize("modality", ["image", "audio"])
class TestGeneration:
    def test_it_is_greedy_decoding_of_each_row_alone(self, modality: str, tokenizer: Any) -> None:
        model = tiny_model()
        samples = [sample(number, modality, answered=False) for number in range(4)]
        with torch.no_grad():
            ids = [greedy(model, one, 10, tokenizer.eos_token_id) for one in samples]
        expected = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
        assert model.generate(samples, 10, tokenizer) == expected
        assert len(set(expected)) == 4, "the reference should tell rows apart"

    def test_a_row_ends_with_the_end_token_and_others_go_on(
        self, modality: str, tokenizer: Any
    ) -> None:
        model = tiny_model()
        samples = [sample(number, modality, answered=False) for number in range(4)]
        with torch.no_grad():
            free = [greedy(model, one, 8, -1) for one in samples]
        early = free[2][3]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(early)
        cut = [row[: row.index(early)] if early in row else row for row in free]
        assert len(cut[2]) <= 3 < max(map(len, cut))
        expected = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]
        assert model.generate(samples, 8, tokenizer) == expected

    @pytest.mark.parametrize("stated", ["by the caller", "by the generation config"])
    def test_other_end_tokens_end_it_as_well(
        self, modality: str, stated: str, tokenizer: Any
    ) -> None:
        model = tiny_model()
        one = sample(0, modality, answered=False)
        with torch.no_grad():
            free = greedy(model, one, 8, -1)
        end = free[3]
        ends = (end,) if stated == "by the caller" else ()
        if not ends:
            model.llm.generation_config.eos_token_id = [end, 3]
        expected = tokenizer.decode(free[: free.index(end)], skip_special_tokens=True).strip()
        assert model.generate([one], 8, tokenizer, ends) == [expected]

    def test_the_other_rows_of_the_batch_have_no_influence(
        self, modality: str, tokenizer: Any
    ) -> None:
        model = tiny_model()
        samples = [sample(number, modality, answered=False) for number in range(6)]
        alone = [model.generate([one], 8, tokenizer)[0] for one in samples]
        assert model.generate(samples, 8, tokenizer) == alone
        assert model.generate(samples[::-1], 8, tokenizer) == alone[::-1]
        halves = [model.generate(samples[i : i + 3], 8, tokenizer) for i in (0, 3)]
        assert halves[0] + halves[1] == alone

    def test_it_leaves_no_gradient_and_the_mode_as_it_was(
        self, modality: str, tokenizer: Any
    ) -> None:
        model = tiny_model()
        model.eval()
        model.generate([sample(0, modality, answered=False)], 2, tokenizer)
        assert not model.training
        assert all(entry.grad is None for entry in model.parameters())
