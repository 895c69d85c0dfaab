"""What of the backbone's forward pass is kept for the backward pass, and what is computed again.

Transformers checkpoints a layer that is told to; which layers, and how, is set here. Its own
switch would also make the input embedding's output require a gradient, which keeps the activations
of layers below which nothing trains.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mera_ds.config import Recomputation
from mera_ds.errors import InputError

SELECTIVE = "selective"
_PRODUCTS = frozenset({"aten::mm", "aten::addmm"})
_ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)


def set_recomputation(llm: PreTrainedModel, setting: Recomputation) -> None:
    """Set which layers are computed again in the backward pass; loss and gradients stay the same.

    Args:
        llm: the backbone.
        setting: see `backbone.gradient_checkpointing`. A number counts from the input: the layers
            above, which keep everything, are the first that the backward pass sets free.

    Raises:
        InputError: if there are not so many layers, or they can't be checkpointed.
    """
    layers = [entry for entry in llm.modules() if isinstance(entry, GradientCheckpointingLayer)]
    count = _layers_to_recompute(setting, len(layers))
    if count > len(layers) or (setting not in (False, "none", 0) and not layers):
        raise InputError(
            f"backbone.gradient_checkpointing is {setting}, but this {type(llm).__name__} has "
            f"{len(layers)} layers that can be checkpointed"
        )
    function: Any = functools.partial(checkpoint, use_reentrant=False)
    if setting == SELECTIVE:
        function = functools.partial(function, context_fn=_selective_contexts(llm))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < count
        layer._gradient_checkpointing_func = function


def _layers_to_recompute(setting: Recomputation, layers: int) -> int:
    if isinstance(setting, bool | str):
        return 0 if setting in (False, "none") else layers
    return setting


def _selective_contexts(llm: PreTrainedModel) -> Callable[[], Any]:
    """Keep the results of large matrix products and of attention; compute the cheap rest again.

    A product costs as much per number that is kept as its inner dimension is long. So the second
    product of LoRA, over its rank alone, is computed again.
    """
    width = int(llm.config.hidden_size)

    def policy(
        context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
    ) -> CheckpointPolicy:
        name = op.name().partition(".")[0]
        keep = name in _ATTENTION
        if name in _PRODUCTS:
            keep = args[-1].shape[0] >= width
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)
