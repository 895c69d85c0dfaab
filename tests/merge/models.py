"""Small checkpoints that the tests of this folder merge."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mera_ds.model.lora import WeightedDelta, fold_deltas, linear_layers

SCALE = 2.0


def base_model(**changes: Any) -> LlamaForCausalLM:
    """Return a two-layer Llama with seeded weights."""
    settings = {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def random_delta(stage: int) -> dict[str, Tensor]:
    """Return LoRA factors of rank 3 on every linear layer, as large as the weights."""
    generator = torch.Generator().manual_seed(stage)
    tensors = {}
    for name, layer in linear_layers(base_model()).items():
        outputs, inputs = layer.weight.shape
        tensors[f"{name}.lora_A"] = 0.1 * torch.randn(3, inputs, generator=generator)
        tensors[f"{name}.lora_B"] = 0.1 * torch.randn(outputs, 3, generator=generator)
    return tensors


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return the model after a fold of a random delta."""
    fold_deltas(model, [WeightedDelta(random_delta(seed), SCALE, "delta")])
    return model


def checkpoint(folder: Path, model: PreTrainedModel, layout: str = "5GB") -> Path:
    """Save a model as an HF folder."""
    model.save_pretrained(folder, max_shard_size=layout)
    return folder


def state(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def bare_checkpoint(folder: Path, **tensors: Tensor) -> Path:
    """Write tensors as a checkpoint of no particular architecture."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Change some values of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
