"""Compiled layers: the same loss and gradients at every length, compiled once."""

import os
import shutil

import pytest
import torch
from test_recompute import WIDTH, build
from torch import Tensor
from torch._dynamo.utils import counters

from mera_ds.model.compilation import compile_layers
from mera_ds.model.lora import lora_parameters


def learn(compiled: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Sum the gradients of rows of three lengths."""
    llm = build(False, dropout=0.0)
    if compiled:
        compile_layers(llm)
    losses = []
    for length in (20, 13, 31):
        generator = torch.Generator().manual_seed(length)
        rows = torch.randn(2, length, WIDTH, generator=generator, requires_grad=True)
        hidden = llm.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        loss = (hidden * torch.linspace(-1, 1, WIDTH)).mean()
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {name: entry.grad for name, entry in lora_parameters(llm).items()}


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler"
)
def test_loss_and_gradients_stay_the_same() -> None:
    expected_losses, expected = learn(False)
    counters.clear()
    losses, gradients = learn(True)
    assert counters["stats"]["unique_graphs"] == 1
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-4 * scale)
