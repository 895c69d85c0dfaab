"""LoRA on the backbone (through peft) and folding a lineage of deltas into its weights.

A delta file holds `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r) per linear layer; the
update of that layer's weight is  weight · B A  (paper: θ_tuned − θ_{i−1}).
"""

from collections.abc import Mapping

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from mera_ds.config import LoraConfig
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


def attach_lora(llm: PreTrainedModel, config: LoraConfig) -> None:
    """Put fresh LoRA factors (A random, B zero, fp32) on all linear layers of the backbone."""
    names = list(linear_layers(llm))
    inject_adapter_in_model(
        PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # a float is right, too
            lora_dropout=config.dropout,
            target_modules=names,
            bias="none",
        ),
        llm,
        adapter_name=_ADAPTER,
    )
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
def fold_delta(
    llm: PreTrainedModel, tensors: Mapping[str, Tensor], weight: float, where: str
) -> None:
    """Add  weight · B A  to each linear layer, in fp32, rounding once to the layer's dtype.

    Args:
        llm: the backbone, without LoRA attached.
        tensors: the delta's factors.
        weight: coefficient × alpha / rank.
        where: name of the delta, for messages.

    Raises:
        DataError: if the delta names other layers or shapes than the backbone has.
    """
    layers = linear_layers(llm)
    names = {name.rpartition(".")[0] for name in tensors}
    unknown = sorted(names - layers.keys())
    if unknown:
        raise DataError(f"{where} changes '{unknown[0]}', which the backbone does not have")
    for name in sorted(names):
        factor_a, factor_b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        target = layers[name].weight
        if (factor_b.shape[0], factor_a.shape[1]) != tuple(target.shape):
            raise DataError(
                f"{where}: '{name}' is {factor_b.shape[0]}×{factor_a.shape[1]}, "
                f"the backbone's layer {tuple(target.shape)}"
            )
        update = torch.addmm(target.float(), factor_b.float(), factor_a.float(), alpha=weight)
        target.copy_(update)
