"""Inputs of the benchmark of merging, and what its outputs should be."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mera_ds.merge.safetensors_io import header_bytes

STAGE = 3
RANK = 128
HIDDEN, INNER, VOCABULARY = 2048, 5632, 32_000
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SPAN_BYTES = 1 << 19
ROWS = 8
"""Every eighth row of each tensor is compared with the merge in fp64."""


def layers_for(gigabytes: float) -> int:
    per_layer = sum(rows * columns for rows, columns in SHAPES.values())
    return max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / per_layer))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama with so many layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": shape for name, shape in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] = (HIDDEN,)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_config(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def in_three(sizes: Mapping[str, int]) -> list[list[str]]:
    """Cut names into three parts of about the same number of bytes."""
    parts: list[list[str]] = [[], [], []]
    total, filled = sum(sizes.values()), 0
    for name, size in sizes.items():
        parts[min(2, 3 * filled // total)].append(name)
        filled += size
    return parts


def make_checkpoint(folder: Path, layers: int, seed: int) -> None:
    """Write random weights; every element differs from one seed to another, norms too."""
    write_config(folder, layers)
    generator = torch.Generator().manual_seed(seed)
    wanted = shapes(layers)
    parts = in_three({name: torch.Size(shape).numel() for name, shape in wanted.items()})
    index = {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        tensors = {
            name: (0.02 * torch.randn(wanted[name], generator=generator)).half() for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def make_adapter(folder: Path, base: Path, layers: int, alpha: float) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                values = 0.02 * torch.randn(shape, generator=generator)
                tensors[f"{key}.lora_{factor}.weight"] = values.half()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in SHAPES}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_sparse(folder: Path, layers: int, value: int) -> None:
    """Write a checkpoint of holes with one number per half megabyte: any size, little disk."""
    write_config(folder, layers)
    header = header_bytes((name, "F16", shape) for name, shape in shapes(layers).items())
    size = len(header) + 2 * sum(torch.Size(shape).numel() for shape in shapes(layers).values())
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
        file.write(header)
        for position in range(len(header), size, SPAN_BYTES // 2):
            file.seek(position)
            file.write(bytes([value, 0x20]))


def tensors_of(folder: Path) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor of a checkpoint."""
    opened = [safe_open(str(file), framework="pt") for file in folder.glob("*.safetensors")]
    places = {name: file for file in opened for name in file.keys()}
    return lambda name: places[name].get_tensor(name)


def exact_parts(work: Path, layers: int, adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield every eighth row of every tensor of the merge in fp64."""
    old, new = tensors_of(work / "A"), tensors_of(work / ("adapter" if adapter else "B"))
    for name in shapes(layers):
        before = old(name)[::ROWS].double()
        if not adapter:
            yield name, before + (new(name)[::ROWS].double() - before) / STAGE
        elif ".layers." in name and "norm" not in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (new(f"{key}.lora_{factor}.weight").double() for factor in "AB")
            yield name, before + b[::ROWS] @ a / STAGE
        else:
            yield name, before


def differences(work: Path, layers: int, folders: Mapping[str, Path], adapter: bool) -> Any:
    """Compare written weights with the exact ones: share not rounded right, largest error in ulp.

    An element counts as rounded right if it is the nearest fp16 number, up to the error of fp32
    arithmetic. Frozen tensors must be those of the base, bit for bit.
    """
    readers = {name: tensors_of(folder) for name, folder in folders.items()}
    wrong, worst = dict.fromkeys(folders, 0), dict.fromkeys(folders, 0.0)
    frozen = dict.fromkeys(folders, True)
    total, old = 0, tensors_of(work / "A")
    for name, exact in exact_parts(work, layers, adapter):
        unit = 2.0 ** (torch.frexp(exact).exponent.clamp(min=-13) - 11)
        total += exact.numel()
        for who, read in readers.items():
            error = (read(name)[::ROWS].double() - exact).abs() / unit
            wrong[who] += int((error > 0.5 + 1e-3).sum())
            worst[who] = max(worst[who], float(error.max()))
            if adapter and ("norm" in name or ".layers." not in name):
                frozen[who] &= torch.equal(
                    read(name).view(torch.int16), old(name).view(torch.int16)
                )
    return {
        who: {
            "not_nearest": wrong[who] / total,
            "largest_error_ulp": round(worst[who], 4),
            "frozen_identical": frozen[who],
        }
        for who in folders
    }
