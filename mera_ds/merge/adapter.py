"""A tuned model given as the base and a PEFT LoRA adapter: θ_tuned = θ_{i−1} + (α/r) B A.

Never built as a whole: each block of rows of B A is made when the rows are merged. Tensors that the
adapter holds in full (`modules_to_save`, biases) are averaged like those of a checkpoint.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mera_ds.errors import InputError
from mera_ds.merge.compare import EMBEDDINGS, EXPORT_RECORD, HEADS, Findings, read_config
from mera_ds.merge.convert import Converter
from mera_ds.merge.digest import block_ranges
from mera_ds.merge.safetensors_io import FLOATS, MappedFiles, TensorPlace, read_header

CONFIG = "adapter_config.json"
FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_BASE = ".base_layer.weight"
_BASE_BIAS = ".base_layer.bias"
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they were."""


@dataclass(frozen=True)
class LowRank:
    """The update of one weight: scale · B A, or its transpose."""

    factor_a: TensorPlace
    """(r, in)"""
    factor_b: TensorPlace
    """(out, r)"""
    scale: float
    """α/r, or α/√r for rank-stabilised LoRA."""
    transposed: bool
    """Whether the weight is stored as (in, out): GPT-2's layers, and embeddings."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it changes."""
        out, inside = self.factor_b.shape[0], self.factor_a.shape[1]
        return (inside, out) if self.transposed else (out, inside)


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds, under the names of the base model's tensors."""

    low_rank: Mapping[str, LowRank]
    full: Mapping[str, TensorPlace]
    base: Mapping[str, TensorPlace]
    """Copies of base weights that peft saves beside the factors of embeddings."""
    places: Mapping[str, TensorPlace]
    """All its tensors under their own names."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder is a PEFT adapter rather than a checkpoint."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def read_adapter(folder: Path, previous: Path, found: Findings) -> Adapter:
    """Read an adapter's names, shapes and settings; add to `found` what can't be merged.

    Raises:
        InputError: if its files are missing.
        DataError: if the tensors' file can't be read.
    """
    config = read_config(folder, CONFIG)
    if not (folder / FILE).exists():
        raise InputError(
            f"{folder} has {CONFIG} but no {FILE}; save the adapter as safetensors "
            "(model.save_pretrained)"
        )
    places = read_header(folder / FILE)
    problems = _unmergeable(config)
    found.add(
        [f"{folder / CONFIG}: {problem}" for problem in problems],
        "merge it with peft (merge_and_unload, save_pretrained) and give that folder as --tuned",
    )
    trained_on = str(config.get("base_model_name_or_path") or "")
    if trained_on and Path(trained_on).name != previous.name:
        found.notes.append(f"{folder} was trained on '{trained_on}', and is added to {previous}")
    if problems:
        return Adapter({}, {}, {}, places)
    low_rank, full, unknown = _sorted_tensors(places, config)
    base_names = [name for name in full if name.endswith(_BASE)]
    copies = {f"{name.removesuffix(_BASE)}.weight": full.pop(name) for name in base_names}
    found.add(
        [f"'{name}' of {folder} is no LoRA factor and no tensor of the base" for name in unknown],
        "only LoRA on linear layers and embeddings can be merged",
    )
    return Adapter(low_rank, full, copies, places)


def _unmergeable(config: Mapping[str, Any]) -> list[str]:
    """Return the settings under which the update is not scale · B A."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')}, not LORA")
    for key, value in sorted(config.items()):
        switched_on = key.startswith("use_") and key != "use_rslora" and value
        other = key in ("alora_invocation_tokens", "layer_replication", "lora_bias") and value
        if switched_on or other:
            problems.append(f"{key} is {value}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        problems.append(f"init_lora_weights is {start}, which changes the base weights, too")
    if not isinstance(config.get("r"), int) or not isinstance(
        config.get("lora_alpha"), int | float
    ):
        problems.append("r or lora_alpha is missing")
    for pattern in config.get("alpha_pattern") or {}:
        try:
            re.compile(pattern)
        except re.error:
            problems.append(f"alpha_pattern: '{pattern}' is no pattern")
    return problems


def _sorted_tensors(
    places: Mapping[str, TensorPlace], config: Mapping[str, Any]
) -> tuple[dict[str, LowRank], dict[str, TensorPlace], list[str]]:
    """Return the updates, the full tensors, and the names that are neither."""
    low_rank: dict[str, LowRank] = {}
    full: dict[str, TensorPlace] = {}
    unknown: list[str] = []
    for name, place in sorted(places.items()):
        inner = name.removeprefix(_PREFIX)
        first = next((pair for pair in (_LINEAR, _EMBEDDING) if inner.endswith(pair[0])), None)
        second = next((pair for pair in (_LINEAR, _EMBEDDING) if inner.endswith(pair[1])), None)
        if second is not None and name.removesuffix(second[1]) + second[0] in places:
            continue
        if first is not None and name.removesuffix(first[0]) + first[1] in places:
            module = inner.removesuffix(first[0])
            factor_b = places[name.removesuffix(first[0]) + first[1]]
            if _are_factors(place, factor_b):
                transposed = first is _EMBEDDING or bool(config.get("fan_in_fan_out"))
                scale = _scale(module, config, place.shape[0])
                low_rank[f"{module}.weight"] = LowRank(place, factor_b, scale, transposed)
                continue
        if "lora_" in inner or place.dtype not in FLOATS or not inner.endswith(("weight", "bias")):
            unknown.append(name)
        else:
            full[_without_wrapper(inner)] = place
    return low_rank, full, unknown


def _without_wrapper(name: str) -> str:
    """Return the base's name of a bias that belongs to a layer with factors."""
    stem = name.removesuffix(_BASE_BIAS)
    return name if stem == name else f"{stem}.bias"


def _are_factors(factor_a: TensorPlace, factor_b: TensorPlace) -> bool:
    return (
        len(factor_a.shape) == len(factor_b.shape) == 2
        and factor_a.shape[0] == factor_b.shape[1]
        and {factor_a.dtype, factor_b.dtype} <= FLOATS.keys()
    )


def _scale(module: str, config: Mapping[str, Any], rank: int) -> float:
    """Return the factor of B A in one module; patterns name modules by how their names end."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def compare_adapter(
    adapter: Adapter, folder: Path, previous: Path, old: Mapping[str, TensorPlace], found: Findings
) -> None:
    """Add to `found` what of the adapter does not fit the base model."""
    shapes = {name: update.shape for name, update in adapter.low_rank.items()}
    shapes |= {name: place.shape for name, place in adapter.full.items()}
    apart = _tied(shapes, previous, old)
    found.add(
        [
            f"{folder} changes '{name}', which {previous} ties to another tensor"
            for name in sorted(apart)
        ],
        "peft trained the two apart: store both in --previous and set tie_word_embeddings to "
        "false in its config.json",
    )
    found.add(
        [
            f"{folder} changes '{name}', which {previous} does not have"
            for name in sorted(shapes.keys() - old.keys() - apart)
        ],
        "give the base model that the adapter was trained on as --previous",
    )
    found.add(
        [
            f"'{name}' is {old[name].shape} in {previous}; {folder} changes {shapes[name]}"
            for name in sorted(shapes.keys() & old.keys())
            if old[name].shape != shapes[name]
        ],
        "give the base model that the adapter was trained on as --previous; if tokens were added, "
        "resize its embeddings first",
    )
    found.add(
        [
            f"'{name}' of the base of {folder} is not that of {previous}"
            for name, place in sorted(adapter.base.items())
            if name in old and not _have_equal_values(old[name], place)
        ],
        "give the base model that the adapter was trained on as --previous",
    )
    found.add(
        [
            f"'{name}' is {old[name].dtype} in {previous}"
            for name in sorted(shapes.keys() & old.keys())
            if old[name].dtype not in FLOATS
        ],
        f"only {', '.join(FLOATS)} can be merged: dequantise the base model",
    )


def check_base(folder: Path, previous: Path, found: Findings) -> None:
    """Add to `found` if an adapter that a lineage was exported as belongs to another base.

    It reads the base once; for an adapter of other origin, nothing.
    """
    if not (folder / EXPORT_RECORD).exists():
        return
    from mera_ds.checkpoint import hash_backbone  # they need torch
    from mera_ds.identity import hash_memory

    wanted = str(read_config(folder, EXPORT_RECORD).get("base"))
    given = hash_backbone(previous, hash_memory())
    if wanted != given:
        found.add(
            [
                f"{folder} is a lineage on the base {wanted[:12]} ({EXPORT_RECORD}), and "
                f"{previous} is {given[:12]}"
            ],
            "give the base of its run, config.json and files as they were, as --previous",
        )


def _tied(names: Iterable[str], previous: Path, old: Mapping[str, TensorPlace]) -> set[str]:
    """Return which names are the embeddings or the head of a base where both are one tensor."""
    tied = read_config(previous).get("tie_word_embeddings")
    if tied is None:  # the architecture's default
        tied = not any(name.endswith(HEADS) for name in old)
    return {name for name in names if tied and name.endswith((*EMBEDDINGS, *HEADS))}


def _have_equal_values(one: TensorPlace, other: TensorPlace) -> bool:
    """Compare two tensors that may have different dtypes."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= FLOATS.keys():
        return False
    files, converter = MappedFiles([one.file, other.file]), Converter(fast=False)
    for begin, end in block_ranges(one.elements):
        values = np.empty((2, end - begin), np.float64)
        for row, place in zip(values, (one, other), strict=True):
            converter.widen(files.raw(place, begin, end), place.dtype, row)
        if not np.array_equal(values[0], values[1]):
            return False
    return True
