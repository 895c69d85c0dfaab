"""PathWeave's layers: the equation token by token, what trains, and how much of it there is."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from mera_ds.config import LoraConfig, Recomputation
from mera_ds.deltas import WeightedDelta
from mera_ds.errors import DataError
from mera_ds.model.lora import linear_layers
from mera_ds.model.recompute import set_recomputation
from mera_ds.model.weave import (
    TRAINED,
    StackedLinear,
    WovenLinear,
    attach_woven,
    weave,
    woven_parameters,
)

IN, OUT, RANK, OLDS = 5, 4, 2, 2
SCALES = (0.5, 2.0)
NEWEST = 1.5
LLAMA_3_8B = {
    "q": (4096, 4096),
    "k": (4096, 1024),
    "v": (4096, 1024),
    "o": (4096, 4096),
    "gate": (4096, 14336),
    "up": (4096, 14336),
    "down": (14336, 4096),
}
"""Inputs and outputs of a block's linear layers; there are 32 blocks."""
BLOCKS = 32


def woven_layer(seed: int = 0) -> WovenLinear:
    """Return a layer at its third stage with random values everywhere."""
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT)
    olds = [(torch.randn(RANK, IN), scale * torch.randn(OUT, RANK)) for scale in SCALES]
    layer = WovenLinear(base, olds, NEWEST)
    with torch.no_grad():
        for name in TRAINED:
            getattr(layer, name).normal_()
    return layer


def expected(layer: WovenLinear, token: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return the layer's output for one token (in,), written out expert by expert."""
    logits = layer.gate[0] @ token
    if noise is not None:
        deviation = torch.log(1 + torch.exp(layer.gate[1] @ token)) + 0.01
        logits = logits + noise * deviation
    gates = torch.exp(logits) / torch.exp(logits).sum()
    output = layer.base.weight @ token + layer.base.bias
    for j in range(OLDS):
        down = layer.down[j * RANK : (j + 1) * RANK]
        up = layer.up[:, j * RANK : (j + 1) * RANK]
        inner = layer.inner[j] @ (down @ token) + layer.inner_bias[j]
        output = output + gates[j] * (up @ inner)
    return output + gates[OLDS] * NEWEST * (layer.lora_B @ (layer.lora_A @ token))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_noise_it_is_the_equation() -> None:
    layer, x = woven_layer().eval(), torch.randn(3, 6, IN)
    for row, outputs in zip(x, layer(x), strict=True):
        for token, output in zip(row, outputs, strict=True):
            close(output, expected(layer, token))


def test_with_noise_it_is_the_equation() -> None:
    layer, x = woven_layer().train(), torch.randn(6, IN)
    torch.manual_seed(7)
    outputs = layer(x)
    torch.manual_seed(7)
    noises = torch.randn(6, OLDS + 1)
    for token, noise, output in zip(x, noises, outputs, strict=True):
        close(output, expected(layer, token, noise))


def test_there_is_no_noise_where_the_gates_do_not_train() -> None:
    layer, x = woven_layer().train(), torch.randn(6, IN)
    layer.requires_grad_(False)
    close(layer(x), layer.eval()(x))


def test_dropout_is_of_the_newest_pair_alone() -> None:
    layer, x = woven_layer().train().requires_grad_(False), torch.randn(2000, IN)
    plain = layer(x)
    layer.dropout = 0.5
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    kept = functional.dropout(x, 0.5)
    gates = (x @ layer.gate[0].T).softmax(dim=-1)[:, -1:]
    change = gates * NEWEST * ((kept - x) @ layer.lora_A.T @ layer.lora_B.T)
    close(found - plain, change)
    assert float(change.abs().mean()) > 0.1
    close(layer.eval()(x), plain)


def test_stacked_for_inference_it_is_the_same_function() -> None:
    layer, x = woven_layer().eval(), torch.randn(3, 6, IN)
    stacked = StackedLinear(layer)
    close(stacked(x), layer(x))
    assert not any(parameter.requires_grad for parameter in (stacked.down, stacked.up))


def test_gates_by_hand() -> None:
    """Scores 0, ln 2 and ln 5 share a token as 1 : 2 : 5."""
    layer = woven_layer().eval()
    scores = torch.tensor([[0.0, math.log(2), math.log(5), 9.0, 9.0, 9.0]])
    close(layer._gates(scores), torch.tensor([[1 / 8, 2 / 8, 5 / 8]]))


def test_noise_begins_with_a_deviation_of_ln_2() -> None:
    layer = woven_layer().train()
    torch.manual_seed(0)
    logits = layer._gates(torch.zeros(20_000, 2 * (OLDS + 1))).log()
    spread = float((logits[:, 0] - logits[:, 1]).std())
    assert spread == pytest.approx(math.sqrt(2) * (math.log(2) + 0.01), rel=0.02)


def test_what_trains_has_a_gradient_and_nothing_else() -> None:
    layer = woven_layer().train()
    for parameter in layer.base.parameters():
        parameter.requires_grad_(False)
    layer(torch.randn(6, IN)).square().sum().backward()
    moved = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert moved == set(TRAINED)
    assert all(float(getattr(layer, name).grad.abs().sum()) > 0 for name in TRAINED)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def deltas(count: int) -> list[WeightedDelta]:
    torch.manual_seed(1)
    shapes = {name: layer.weight.shape for name, layer in linear_layers(llama()).items()}
    return [
        WeightedDelta(
            {
                **{f"{name}.lora_A": torch.randn(RANK, shape[1]) for name, shape in shapes.items()},
                **{f"{name}.lora_B": torch.randn(shape[0], RANK) for name, shape in shapes.items()},
            },
            0.5 * (number + 1),
            f"delta {number + 1}",
        )
        for number in range(count)
    ]


CONFIG = LoraConfig(rank=RANK, alpha=3.0)


def logits(llm: nn.Module) -> Tensor:
    with torch.no_grad():
        return llm(input_ids=torch.arange(20)[None]).logits


def finished(llm: nn.Module, olds: int) -> tuple[list[WeightedDelta], dict[str, Tensor]]:
    """Return what a stage that trained in `llm` leaves: its pair, and its weave file."""
    torch.manual_seed(2)
    values = {name: torch.randn_like(entry) for name, entry in woven_parameters(llm).items()}
    with torch.no_grad():
        for name, parameter in woven_parameters(llm).items():
            parameter.copy_(values[name])
    pair = {name: value for name, value in values.items() if "lora" in name}
    experts = [*deltas(olds), WeightedDelta(pair, CONFIG.alpha / CONFIG.rank, "newest")]
    return experts, {name: value for name, value in values.items() if name not in pair}


def test_a_finished_stage_is_restored_as_it_trained() -> None:
    trained, restored = llama(), llama()
    weave(trained, deltas(2), CONFIG, "random", {})
    experts, tensors = finished(trained, 2)
    attach_woven(restored, experts, tensors)
    torch.testing.assert_close(logits(restored), logits(trained.eval()), rtol=1e-3, atol=1e-3)
    assert not any(
        parameter.requires_grad
        for name, parameter in restored.named_parameters()
        if name.endswith(("down", "up", "bias"))
    )


def test_a_new_expert_begins_with_nothing_and_in_adapters_as_asked() -> None:
    """With in-adapters of 1 the model begins as the mean of the old experts and a silent one."""
    llm = llama()
    weave(llm, deltas(1), CONFIG, "identity", {})
    half = llama()
    layers = linear_layers(half)
    (delta,) = deltas(1)
    with torch.no_grad():
        for name, layer in layers.items():
            factors = delta.tensors[f"{name}.lora_B"], delta.tensors[f"{name}.lora_A"]
            layer.weight += 0.5 * delta.weight * factors[0] @ factors[1]
    torch.testing.assert_close(logits(llm.eval()), logits(half), rtol=1e-3, atol=1e-3)


def test_random_in_adapters_begin_as_a_linear_layer_does() -> None:
    llm = llama()
    weave(llm, deltas(2), CONFIG, "random", {})
    for name, parameter in woven_parameters(llm).items():
        if name.endswith((".inner", ".inner_bias")):
            assert 0 < float(parameter.detach().abs().max()) <= RANK**-0.5
        if name.endswith((".gate", ".lora_B")):
            assert not parameter.any()


def test_in_adapters_go_on_where_the_stage_before_ended() -> None:
    second, third = llama(), llama()
    weave(second, deltas(1), CONFIG, "random", {})
    experts, tensors = finished(second, 1)
    weave(third, experts, CONFIG, "identity", tensors)
    for name, parameter in woven_parameters(third).items():
        if name.endswith(".inner"):
            assert torch.equal(parameter[0], tensors[name][0])
            assert torch.equal(parameter[1], torch.eye(RANK))
        if name.endswith(".gate"):
            assert parameter.shape[1] == 3
            assert not parameter.any()


def gradients(setting: Recomputation) -> dict[str, Tensor]:
    llm = llama()
    llm.config.use_cache = False
    set_recomputation(llm, setting)
    weave(llm, deltas(2), LoraConfig(rank=RANK, alpha=3.0, dropout=0.25), "random", {})
    trained = woven_parameters(llm)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) / 8)
    tokens = torch.arange(20)[None]
    loss = llm.train()(input_ids=tokens, labels=tokens).loss
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("setting", ["all", 1, "selective"])
def test_a_layer_that_is_computed_again_draws_the_same_noise(setting: Recomputation) -> None:
    expected = gradients("none")
    assert all(bool(gradient.any()) for gradient in expected.values())
    for name, found in gradients(setting).items():
        torch.testing.assert_close(found, expected[name])


def without(tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith(ending)}


def test_files_that_do_not_fit_are_refused() -> None:
    trained = llama()
    weave(trained, deltas(1), CONFIG, "random", {})
    experts, tensors = finished(trained, 1)
    with pytest.raises(DataError, match=r"weave file: 'model.*gate' has shape none"):
        attach_woven(llama(), experts, without(tensors, ".gate"))
    with pytest.raises(DataError, match=r"delta 1 has no factors of rank 4 that fit 'model"):
        weave(llama(), deltas(1), LoraConfig(rank=4, alpha=4.0), "random", {})


def test_counts_at_the_size_of_the_paper() -> None:
    """Llama-3-8B, rank 128: 335.5 M per pair; 11.1 M in-adapters and 10.0 M gates at stage 4.

    Inference keeps four unmerged pairs. In fp16 they are 2.68 GB; the paper's Table 3 says
    20.32 - 17.71 = 2.61 GB more than for the other methods.
    """
    stages, rank = 4, 128
    trained: dict[str, int] = dict.fromkeys(TRAINED, 0)
    inference = 0
    with torch.device("meta"):
        for width_in, width_out in LLAMA_3_8B.values():
            base = nn.Linear(width_in, width_out, bias=False)
            pair = (torch.empty(rank, width_in), torch.empty(width_out, rank))
            layer = WovenLinear(base, [pair] * (stages - 1), 1.0)
            for name in TRAINED:
                trained[name] += BLOCKS * getattr(layer, name).numel()
            stacked = StackedLinear(layer)
            inference += BLOCKS * sum(
                part.numel() for part in (stacked.down, stacked.bias, stacked.up)
            )
    assert trained["lora_A"] + trained["lora_B"] == 335_544_320
    assert trained["inner"] + trained["inner_bias"] == 11_096_064
    assert trained["gate"] == 9_961_472
    assert 2 * inference / 1e9 == pytest.approx(20.32 - 17.71, rel=0.04)
