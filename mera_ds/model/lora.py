"""LoRA on the backbone (through peft) and folding a lineage of deltas into its weights.

A delta file holds `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r) per linear layer; the
update of that layer's weight is  weight · B A  (paper: θ_tuned − θ_{i−1}).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from mera_ds.checkpoint import require_tensors
from mera_ds.config import LoraConfig
from mera_ds.deltas import WeightedDelta as WeightedDelta
from mera_ds.deltas import add_products
from mera_ds.errors import DataError

_ADAPTER = "default"


def linear_layers(llm: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return every linear layer of the backbone but its output head, by name."""
    head = llm.get_output_embeddings()
    return {
        name: module
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


class _Up(nn.Linear):
    """B, a module so that ZeRO-3 gathers it: adds  scale · B h  to a result in one product."""

    def __init__(self, weight: nn.Parameter, scale: float) -> None:
        width_out, rank = weight.shape
        super().__init__(rank, width_out, bias=False, device="meta")
        self.weight = weight
        self.scale = scale

    def forward(self, h: Tensor, result: Tensor | None = None) -> Tensor:
        """Map (…, r) to (…, out), added to a result (…, out) if there is one."""
        if result is None:
            return super().forward(h)
        rows = result.flatten(0, -2)
        rows = torch.addmm(rows, h.flatten(0, -2), self.weight.t(), alpha=self.scale)
        return rows.view_as(result)


class _LoraLinear(PeftLinear):  # type: ignore[misc]  # peft has no types
    """peft's LoRA, without passes of their own over (…, out) for its scale and its sum."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        plain: Any = self.lora_B[_ADAPTER]
        self.lora_B[_ADAPTER] = _Up(plain.weight, self.scaling[_ADAPTER])

    def forward(self, x: Tensor, *args: Any, **others: Any) -> Tensor:
        """Map (…, in) to (…, out)."""
        down, up = self.lora_A[_ADAPTER], self.lora_B[_ADAPTER]
        if x.dtype != down.weight.dtype:  # factors in fp32 beside a backbone that is not
            result: Tensor = super().forward(x, *args, **others)
            return result
        return up(down(self.lora_dropout[_ADAPTER](x)), self.base_layer(x))


def attach_lora(llm: PreTrainedModel, config: LoraConfig) -> None:
    """Put fresh LoRA factors (A random, B zero, fp32) on all linear layers of the backbone."""
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a float is right, too
        lora_dropout=config.dropout,
        target_modules=list(linear_layers(llm)),
        bias="none",
    )
    settings._register_custom_module({nn.Linear: _LoraLinear})
    inject_adapter_in_model(settings, llm, adapter_name=_ADAPTER)
    for parameter in lora_parameters(llm).values():
        parameter.data = parameter.data.float()


def lora_parameters(llm: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA factors under the names of the delta file; empty without LoRA."""
    factors = {}
    for name, parameter in llm.named_parameters():
        for factor in ("lora_A", "lora_B"):
            ending = f".{factor}.{_ADAPTER}.weight"
            if name.endswith(ending):
                factors[f"{name.removesuffix(ending)}.{factor}"] = parameter
    return factors


@torch.no_grad()
def set_lora(llm: nn.Module, delta: WeightedDelta) -> None:
    """Give attached LoRA factors the values of a delta.

    Raises:
        DataError: if it has other layers or shapes.
    """
    parameters = lora_parameters(llm)
    require_tensors(delta.tensors, parameters, delta.where)
    for name, parameter in parameters.items():
        parameter.copy_(delta.tensors[name])


@torch.no_grad()
def fold_deltas(llm: PreTrainedModel, deltas: Sequence[WeightedDelta]) -> None:
    """Add  Σ weight · B A  to each linear layer, in fp32, rounding once to the layer's dtype.

    Args:
        llm: the backbone, without LoRA attached.
        deltas: in the order of the stages.

    Raises:
        DataError: if a delta names other layers or shapes than the backbone has.
    """
    layers = linear_layers(llm)
    for delta in deltas:
        _require_fit(delta, layers)
    for name, layer in layers.items():
        here = [delta for delta in deltas if f"{name}.lora_A" in delta.tensors]
        terms = [(delta.weight_of(name), *_factors(delta, name)[::-1]) for delta in here]
        layer.weight.copy_(add_products(layer.weight, terms))


def _require_fit(delta: WeightedDelta, layers: Mapping[str, nn.Linear]) -> None:
    names = {name.rpartition(".")[0] for name in delta.tensors}
    unknown = sorted(names - layers.keys())
    if unknown:
        raise DataError(f"{delta.where} changes '{unknown[0]}', which the backbone does not have")
    for name in sorted(names):
        factor_a, factor_b = _factors(delta, name)
        fitting = (factor_b.shape[0], factor_a.shape[1]) == tuple(layers[name].weight.shape)
        if not fitting or factor_b.shape[1] != factor_a.shape[0]:
            raise DataError(
                f"{delta.where}: the factors of '{name}' are {tuple(factor_b.shape)} and "
                f"{tuple(factor_a.shape)}, the backbone's layer {tuple(layers[name].weight.shape)}"
            )


def _factors(delta: WeightedDelta, name: str) -> tuple[Tensor, Tensor]:
    try:
        return delta.tensors[f"{name}.lora_A"], delta.tensors[f"{name}.lora_B"]
    except KeyError as missing:
        raise DataError(f"{delta.where} has no tensor {missing}") from None
