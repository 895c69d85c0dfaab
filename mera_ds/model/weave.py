"""PathWeave's adapter-in-adapter (arXiv 2410.20178), in the backbone as MERA's comparison has it.

At stage m a linear layer W (out, in) has m experts. The old ones j < m are the LoRA pairs of the
stages before, frozen, each with an in-adapter F_j (r, r) between its factors; the newest is an
ordinary pair. Each token is shared out among them by a dense noisy gate:

    y = W x + Σ_{j<m} g_j · s_j B_j (F_j A_j x + f_j) + g_m · s_m B_m A_m x
    g = softmax(G x + ε ⊙ (softplus(N x) + 0.01))     ε ~ N(0, 1) while the gates train, 0 otherwise

G and N (m, in) start at zero: equal gates, and noise of deviation ln 2 + 0.01. What trains is A_m,
B_m, all F_j and f_j, G and N; `lora.dropout` is on A_m's x alone. An in-adapter goes on from the
values of the stage before, if it is that old; gates are those of the stage. Softmax and noise are
computed in fp32.

A weave file holds, per linear layer, `<layer>.inner` (m−1, r, r), `<layer>.inner_bias` (m−1, r) and
`<layer>.gate` (2, m, in), which is G and N. The pairs are in the deltas of the lineage.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from mera_ds.config import LoraConfig
from mera_ds.deltas import WeightedDelta
from mera_ds.errors import DataError
from mera_ds.model.lora import linear_layers

SMALLEST_NOISE = 0.01
Pair = tuple[Tensor, Tensor]
TRAINED = ("lora_A", "lora_B", "inner", "inner_bias", "gate")


class WovenLinear(nn.Module):
    """A linear layer at the stage that trains its newest expert."""

    def __init__(
        self, base: nn.Linear, olds: Sequence[Pair], scale: float, dropout: float = 0.0
    ) -> None:
        """Take over the old experts; the caller sets the values of what trains.

        Args:
            base: the frozen layer.
            olds: A_j (r, in) and s_j·B_j (out, r), in the order of the stages.
            scale: s_m.
            dropout: of the newest pair's input, while it trains.
        """
        super().__init__()
        rank, device, dtype = len(olds[0][0]), base.weight.device, base.weight.dtype
        count, (width_out, width_in) = len(olds), base.weight.shape
        self.base = base
        self.scale = scale
        self.dropout = dropout
        down = torch.cat([factor for factor, _ in olds]).to(device, dtype)
        up = torch.cat([factor for _, factor in olds], dim=1).to(device, dtype)
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.inner = nn.Parameter(torch.empty(count, rank, rank, device=device))
        self.inner_bias = nn.Parameter(torch.zeros(count, rank, device=device))
        self.gate = nn.Parameter(torch.zeros(2, count + 1, width_in, device=device))
        self.lora_A = nn.Parameter(torch.empty(rank, width_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(width_out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        inputs = x.flatten(0, -2).to(self.lora_A.dtype)
        olds, rank, _ = self.inner.shape
        newest, scores = self._trained_down(inputs)
        gates = self._gates(scores)
        known = functional.linear(inputs, self.down.to(inputs.dtype)).unflatten(-1, (olds, rank))
        inner = torch.einsum("tjr,jsr->tjs", known, self.inner) + self.inner_bias
        shared = (gates[:, :-1, None] * inner).flatten(1)
        own = newest * (gates[:, -1:] * self.scale)
        result: Tensor = self.base(x)
        rows = result.flatten(0, -2)
        rows = torch.addmm(rows, shared.to(rows.dtype), self.up.t().to(rows.dtype))
        rows = torch.addmm(rows, own.to(rows.dtype), self.lora_B.t().to(rows.dtype))
        return rows.view_as(result)

    def _trained_down(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the products (T, r) of x with A_m and (T, 2 m) with G and N."""
        gate = self.gate.flatten(0, 1)
        if self.training and self.dropout > 0:
            newest = functional.linear(functional.dropout(inputs, self.dropout), self.lora_A)
            return newest, functional.linear(inputs, gate)
        # One product for all that trains of the way down.
        both = functional.linear(inputs, torch.cat([self.lora_A, gate]))
        newest, scores = both.split((len(self.lora_A), len(gate)), dim=-1)
        return newest, scores

    def _gates(self, scores: Tensor) -> Tensor:
        """Return g (T, m) for the products of x with G and N (T, 2 m)."""
        logits, noise = scores.float().unflatten(-1, self.gate.shape[:2]).unbind(-2)
        if self.training and self.gate.requires_grad:
            deviation = functional.softplus(noise) + SMALLEST_NOISE
            logits = logits + torch.randn_like(logits) * deviation
        return logits.softmax(dim=-1).to(scores.dtype)


class StackedLinear(nn.Module):
    """The same layer with nothing left to train: one product down and one up for all experts.

    The in-adapters are multiplied into the way down, and the gate's rows stand below it:

        h = [F_1 A_1; …; F_{m−1} A_{m−1}; A_m; G] x + [f_1; …; 0; 0]      y = W x + U (g ⊙ h)
    """

    def __init__(self, woven: WovenLinear) -> None:
        super().__init__()
        self.base = woven.base
        device, dtype = woven.base.weight.device, woven.base.weight.dtype
        count, rank, width = len(woven.inner), woven.inner.shape[1], woven.down.shape[1]
        self.shape = (count + 1, rank)
        old = woven.inner.float() @ woven.down.float().unflatten(0, (count, rank))
        down = torch.cat([old.reshape(-1, width), woven.lora_A.float(), woven.gate[0].float()])
        bias = torch.zeros(len(down), device=device)
        bias[: count * rank] = woven.inner_bias.float().flatten()
        up = torch.cat([woven.up.float(), woven.scale * woven.lora_B.float()], dim=1)
        self.down, self.bias, self.up = (
            nn.Parameter(tensor.detach().to(device, dtype), requires_grad=False)
            for tensor in (down, bias, up)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        experts, rank = self.shape
        h = functional.linear(x, self.down, self.bias)
        parts, logits = h.split((experts * rank, experts), dim=-1)
        gates = logits.softmax(dim=-1, dtype=torch.float32).to(h.dtype)
        shared = (parts.unflatten(-1, self.shape) * gates[..., None]).flatten(-2)
        result: Tensor = self.base(x) + functional.linear(shared, self.up)
        return result


def weave(
    llm: PreTrainedModel,
    olds: Sequence[WeightedDelta],
    config: LoraConfig,
    inner: Literal["random", "identity"],
    previous: Mapping[str, Tensor],
) -> None:
    """Put a fresh expert beside those of earlier stages, and gates over all, on all linear layers.

    Args:
        llm: the backbone, with nothing folded into it.
        olds: the pairs of the earlier stages.
        config: rank, alpha and dropout of the fresh pair.
        inner: first values of an in-adapter that `previous` does not have.
        previous: weave file of the stage before; empty at the second stage.

    Raises:
        DataError: if the pairs or the file don't fit the backbone.
    """
    for name, layer in linear_layers(llm).items():
        pairs, scale = _pairs(name, layer, olds, config.rank), config.alpha / config.rank
        woven = WovenLinear(layer, pairs, scale, config.dropout)
        nn.init.kaiming_uniform_(woven.lora_A, a=5**0.5)
        _set_inner(woven, inner, name, previous)
        llm.set_submodule(name, woven)


@torch.no_grad()
def _set_inner(woven: WovenLinear, inner: str, name: str, previous: Mapping[str, Tensor]) -> None:
    rank = woven.inner.shape[1]
    for values, bias in zip(woven.inner, woven.inner_bias, strict=True):
        if inner == "identity":
            values.copy_(torch.eye(rank))
        else:
            values.uniform_(-(rank**-0.5), rank**-0.5)
            bias.uniform_(-(rank**-0.5), rank**-0.5)
    if previous:
        known = len(woven.inner) - 1
        woven.inner[:known] = _tensor(previous, f"{name}.inner", woven.inner[:known])
        woven.inner_bias[:known] = _tensor(previous, f"{name}.inner_bias", woven.inner_bias[:known])


@torch.no_grad()
def attach_woven(
    llm: PreTrainedModel, experts: Sequence[WeightedDelta], tensors: Mapping[str, Tensor]
) -> None:
    """Put the finished experts of all stages and their gates on all linear layers, frozen.

    Args:
        llm: the backbone, with nothing folded into it.
        experts: the pairs of all stages, the newest last.
        tensors: the weave file.

    Raises:
        DataError: if the pairs or the file don't fit the backbone.
    """
    for name, layer in linear_layers(llm).items():
        *olds, newest = _pairs(name, layer, experts, None)
        woven = WovenLinear(layer, olds, 1.0)
        woven.lora_A.copy_(newest[0])
        woven.lora_B.copy_(newest[1])
        for part in ("inner", "inner_bias", "gate"):
            target = getattr(woven, part)
            target.copy_(_tensor(tensors, f"{name}.{part}", target))
        llm.set_submodule(name, StackedLinear(woven))


def woven_parameters(llm: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains in woven layers, as `<layer>.<part>`; empty without."""
    return {
        f"{name}.{part}": getattr(module, part)
        for name, module in llm.named_modules()
        if isinstance(module, WovenLinear)
        for part in TRAINED
    }


def _pairs(
    name: str, layer: nn.Linear, deltas: Sequence[WeightedDelta], rank: int | None
) -> list[Pair]:
    """Return A (r, in) and weight·B (out, r) of a layer in each delta."""
    pairs = []
    for delta in deltas:
        down, up = (delta.tensors.get(f"{name}.{factor}") for factor in ("lora_A", "lora_B"))
        rank = rank or (len(down) if down is not None else None)
        expected = ((rank, layer.in_features), (layer.out_features, rank))
        if down is None or up is None or (tuple(down.shape), tuple(up.shape)) != expected:
            raise DataError(f"{delta.where} has no factors of rank {rank} that fit '{name}'")
        pairs.append((down, delta.weight_of(name) * up))
    return pairs


def _tensor(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != like.shape:
        shape = "none" if found is None else tuple(found.shape)
        raise DataError(f"weave file: '{name}' has shape {shape}, expected {tuple(like.shape)}")
    return found
