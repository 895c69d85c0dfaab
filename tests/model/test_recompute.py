"""Gradient checkpointing: the same loss and gradients, less that is kept, little done twice."""

from typing import Any

import pytest
import torch
from probes import Operations
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mera_ds.config import LoraConfig, Recomputation, load_profile
from mera_ds.errors import InputError
from mera_ds.model.lora import attach_lora, lora_parameters
from mera_ds.model.recompute import set_recomputation

LAYERS, WIDTH, HEADS, INNER, RANK, TOKENS = 3, 48, 4, 80, 4, 2 * 20
PRODUCTS = 7
"""Linear maps of a layer."""


def build(setting: Recomputation, lora: bool = True, dropout: float = 0.25) -> LlamaForCausalLM:
    """Return a frozen Llama in training mode, with LoRA that already does something."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=99,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
        )
    )
    llm.requires_grad_(False)
    llm.config.use_cache = False
    set_recomputation(llm, setting)
    if lora:
        attach_lora(llm, LoraConfig(rank=RANK, alpha=8.0, dropout=dropout))
        for parameter in lora_parameters(llm).values():
            parameter.data = torch.randn(parameter.shape) / 8
    return llm.train()


def loss_of(llm: LlamaForCausalLM) -> Tensor:
    return (hidden(llm) * torch.linspace(-1, 1, WIDTH)).sum()


def hidden(llm: LlamaForCausalLM, requires_grad: bool = True) -> Tensor:
    """Run the layers on rows as a connector gives them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, TOKENS // 2, WIDTH, generator=generator, requires_grad=requires_grad)
    torch.manual_seed(2)  # for dropout
    return llm.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state


def learn(setting: Recomputation) -> tuple[float, dict[str, Tensor]]:
    llm = build(setting)
    loss = loss_of(llm)
    loss.backward()
    gradients = {name: entry.grad for name, entry in lora_parameters(llm).items()}
    assert all(entry is not None and bool(entry.any()) for entry in gradients.values())
    return float(loss.detach()), gradients


@pytest.mark.parametrize("setting", [True, "all", 0, 2, 3, "selective", "none"])
def test_loss_and_gradients_stay_the_same(setting: Recomputation) -> None:
    loss, gradients = learn(setting)
    expected_loss, expected = learn(False)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * scale)


def kept(setting: Recomputation, **kind: Any) -> list[int]:
    """Return the bytes that each layer made and that live until the backward pass."""
    llm = build(setting, **kind)
    operations = Operations(list(llm.parameters()))
    with operations.within(llm.model.layers), operations:
        result = hidden(llm)
    sizes = [operations.alive(number) for number in range(LAYERS)]
    del result
    return sizes


def test_a_number_counts_from_the_input() -> None:
    everything, mixed, nothing = kept(False), kept(2), kept(True)
    assert mixed[:2] == nothing[:2]
    assert mixed[2] == everything[2]
    assert nothing == [TOKENS * WIDTH * 4] * LAYERS, "the input of the next layer alone"


def test_selective_keeps_no_more_than_it_must() -> None:
    """Per token: output, q, k, v, attention, o, gate, up, down, and LoRA's seven inner results."""
    attention = WIDTH + HEADS  # with the logarithm of each head's sum
    numbers = WIDTH + 2 * WIDTH + attention + WIDTH + 2 * INNER + WIDTH + PRODUCTS * RANK
    assert kept("selective", dropout=0.0) == [TOKENS * numbers * 4] * LAYERS
    assert kept("selective")[0] < kept(False)[0] / 2


def products(setting: Recomputation) -> tuple[int, int]:
    """Return how many matrix products forward and backward pass do."""
    llm = build(setting, dropout=0.0)
    with Operations(list(llm.parameters())) as forward:
        loss = loss_of(llm)
    with Operations(list(llm.parameters())) as backward:
        loss.backward()
    counts = [calls["aten::mm"] + calls["aten::addmm"] for calls in (forward.calls, backward.calls)]
    return counts[0], counts[1]


def test_selective_repeats_only_the_products_over_the_rank() -> None:
    """That is LoRA's second; nothing needs the last one of a layer."""
    forward, plain = products(False)
    assert forward == 3 * PRODUCTS * LAYERS
    assert products("all") == (forward, plain + LAYERS * (3 * PRODUCTS - 1))
    assert products("selective") == (forward, plain + LAYERS * (PRODUCTS - 1))


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="is 4, but this LlamaForCausalLM has 3 layers"):
        build(4)
    with pytest.raises(InputError, match="is True, but this Linear has 0 layers"):
        set_recomputation(nn.Linear(2, 2), True)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["-1", "some", "1.5", "null"])
def test_other_settings_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"gradient_checkpointing is '?(-1|some|1\.5|None)"):
        load_profile("tiny", [f"backbone.gradient_checkpointing={text}"])


@pytest.mark.parametrize("setting", [False, True, "selective"])
def test_layers_below_which_nothing_trains_keep_nothing(setting: Recomputation) -> None:
    llm = build(setting)
    for name, parameter in lora_parameters(llm).items():
        parameter.requires_grad_(".layers.2." in name or name.startswith("model.layers.2."))
    operations = Operations(list(llm.parameters()))
    with operations.within(llm.model.layers), operations:
        result = hidden(llm, requires_grad=False)
    assert result.requires_grad
    below, input_of_the_last, last = (operations.alive(number) for number in range(LAYERS))
    assert below == 0
    assert input_of_the_last <= TOKENS * WIDTH * 4
    assert last > 0
