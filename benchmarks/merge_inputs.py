"""Inputs of the benchmark of merging, and what its outputs should be."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mera_ds.merge.safetensors_io import header_bytes

STAGE = 3
RANK = 128
SPAN_BYTES = 1 << 19
ROWS = 8
"""Every eighth row of each tensor is compared with the merge in fp64."""


@dataclass(frozen=True)
class Llama:
    """A model by its width and depth; the proportions are those of TinyLlama."""

    hidden: int
    layers: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Shapes of the linear layers of one block."""
        hidden, inner = self.hidden, 11 * self.hidden // 4
        return {
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return 125 * self.hidden // 8

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors."""
        ends = (self.vocabulary, self.hidden)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": ends}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found |= {f"{prefix}.{name}.weight": shape for name, shape in self.linear.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}.{norm}.weight"] = (self.hidden,)
        return {**found, "model.norm.weight": (self.hidden,), "lm_head.weight": ends}


def llama_of(gigabytes: float, hidden: int) -> Llama:
    """Return a model of about that size in fp16."""
    one = Llama(hidden, 1)
    block = sum(rows * columns for rows, columns in one.linear.values())
    layers = round((gigabytes * 1e9 / 2 - 2 * one.vocabulary * hidden) / block)
    return Llama(hidden, max(1, layers))


def write_config(folder: Path, llama: Llama) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama.hidden,
        "intermediate_size": llama.linear["mlp.up_proj"][0],
        "num_hidden_layers": llama.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": llama.vocabulary,
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


def make_checkpoint(folder: Path, llama: Llama, seed: int) -> None:
    """Write random weights; every element differs from one seed to another, norms too."""
    write_config(folder, llama)
    generator = torch.Generator().manual_seed(seed)
    wanted = llama.shapes
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


def make_adapter(folder: Path, base: Path, llama: Llama, alpha: float) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(llama.layers):
        for name, (rows, columns) in llama.linear.items():
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
        "target_modules": sorted({name.rpartition(".")[2] for name in llama.linear}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_sparse(folder: Path, llama: Llama, value: int) -> None:
    """Write a checkpoint of holes with one number per half megabyte: any size, little disk."""
    write_config(folder, llama)
    header = header_bytes((name, "F16", shape) for name, shape in llama.shapes.items())
    size = len(header) + 2 * sum(torch.Size(shape).numel() for shape in llama.shapes.values())
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


def exact_parts(work: Path, llama: Llama, adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield every eighth row of every tensor of the merge in fp64."""
    old, new = tensors_of(work / "A"), tensors_of(work / ("adapter" if adapter else "B"))
    for name in llama.shapes:
        before = old(name)[::ROWS].double()
        if not adapter:
            yield name, before + (new(name)[::ROWS].double() - before) / STAGE
        elif ".layers." in name and "norm" not in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (new(f"{key}.lora_{factor}.weight").double() for factor in "AB")
            yield name, before + b[::ROWS] @ a / STAGE
        else:
            yield name, before


def differences(work: Path, llama: Llama, folders: Mapping[str, Path], adapter: bool) -> Any:
    """Compare written weights with the exact ones: share not rounded right, largest error in ulp.

    An element counts as rounded right if it is the nearest fp16 number, up to the error of fp32
    arithmetic. Frozen tensors must be those of the base, bit for bit.
    """
    readers = {name: tensors_of(folder) for name, folder in folders.items()}
    wrong, worst = dict.fromkeys(folders, 0), dict.fromkeys(folders, 0.0)
    frozen = dict.fromkeys(folders, True)
    total, old = 0, tensors_of(work / "A")
    for name, exact in exact_parts(work, llama, adapter):
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
