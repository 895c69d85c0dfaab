"""Compiling the backbone's layers with torch.compile."""

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(llm: PreTrainedModel) -> None:
    """Let each layer be compiled when it first runs: one compilation serves all of them.

    Rows differ in length from batch to batch, so sizes are left open. Names of modules and
    parameters stay as they are.
    """
    for layer in llm.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
