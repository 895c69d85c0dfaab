"""A lineage as a complete HF folder: every weight computed in fp32 and rounded once.

The base's files are gone through tensor by tensor, memory-mapped; a tensor without a delta is
copied (to the byte, unless another dtype is asked for), and the result keeps the base's shards. So
no more than a few tensors are resident, whatever the size of the model. The arithmetic is that of
`mera_ds.deltas`, so the folder holds the bits that training and evaluation compute with.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mera_ds.deltas import FactorFile, add_products
from mera_ds.errors import DataError
from mera_ds.files import committed_folder, failpoint, read_json, require_space, write_json
from mera_ds.manifest import MANIFEST, Manifest
from mera_ds.merge.card import WEIGHT_ENDINGS, files_about_origin
from mera_ds.merge.compare import EXPORT_RECORD
from mera_ds.merge.lineage import merge_updates
from mera_ds.merge.methods import Method
from mera_ds.merge.partial import require_new
from mera_ds.merge.safetensors_io import INDEX, weight_files
from mera_ds.merge.updates import layers_of, open_updates

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

Terms = Sequence[tuple[float, Tensor, Tensor]]
Update = Callable[[str], Terms | Tensor]
"""What is added to a layer: products with their factors, or a dense matrix."""


@dataclass(frozen=True)
class Rounding:
    """What rounding to the written dtype changes, over all changed weights."""

    changed: int
    """Tensors with an update."""
    relative: float
    """Norm of the rounding error over the norm of the update."""


def lineage_update(product: Path, manifest: Manifest) -> tuple[list[str], Update]:
    """Return the layers that a lineage changes, and its update of each."""
    files = [
        (entry, FactorFile(product, entry))
        for entry in manifest.lineage
        if entry.weight != 0 or any(entry.weights.values())
    ]
    weights = {entry.stage: entry.weights for entry, _ in files}

    def update(layer: str) -> Terms:
        found = [(entry, file.factors(layer)) for entry, file in files]
        return [
            (weights[entry.stage].get(layer, entry.weight), *factors)
            for entry, factors in found
            if factors is not None
        ]

    return sorted({layer for _, file in files for layer in file.layers}), update


def method_update(product: Path, manifest: Manifest, method: Method) -> tuple[list[str], Update]:
    """Return the same as a method makes it from the trained deltas; a dense result stays dense."""
    if method.kind.result == "dense":
        updates = open_updates(product, manifest, trained=True)

        def dense(layer: str) -> Tensor:
            (merged,) = method.merge(updates, [layer])
            assert isinstance(merged.newest, Tensor)
            return merged.newest

        return layers_of(updates), dense
    updates, layers, _ = merge_updates(product, manifest, method, anew=True)

    def terms(layer: str) -> Terms:
        parts = [(float(entry.coefficient_of(layer)), entry.current(layer)) for entry in updates]
        return [(factor, part.left, part.right) for factor, part in parts if part is not None]

    return layers, terms


def export_folder(
    base: Path,
    product: Path,
    manifest: Manifest,
    output: Path,
    *,
    dtype: str | None = None,
    method: Method | None = None,
) -> Rounding:
    """Write base + lineage as an HF folder, with the connectors and the manifest beside it.

    Args:
        base: HF folder of the bare backbone; its tokenizer and configuration are carried over.
        product: the model.
        manifest: its manifest.
        output: the folder to write; must not exist.
        dtype: `fp32`, `fp16` or `bf16`; default: that of each tensor of the base.
        method: merge the trained deltas by this method instead of taking the lineage as it stands.

    Raises:
        InputError: if the output exists or can't be made.
        DataError: if a delta does not fit the base, or a weight is not finite in the dtype.
        ResourceError: if the disk is too small.
    """
    require_new(output)
    layers, update = (
        lineage_update(product, manifest)
        if method is None
        else method_update(product, manifest, method)
    )
    files = {path: _header(path) for path in weight_files(base)}
    tensors = {name: entry for header in files.values() for name, entry in header.items()}
    unknown = [layer for layer in layers if f"{layer}.weight" not in tensors]
    if unknown:
        raise DataError(f"{product} changes '{unknown[0]}', which {base} does not have")
    target = None if dtype is None else DTYPES[dtype]
    require_space(output.parent, sum(_bytes(e, target) for e in tensors.values()) + 50_000_000)
    writer = _Writer(set(layers), update, target)
    with committed_folder(output) as folder:
        for path, header in files.items():
            writer.write(path, header, folder / path.name)
            failpoint("export.after_file")
        carry_over(base, folder, target, sum(_bytes(e, target) for e in tensors.values()))
        copy_product(product, manifest, folder)
        facts = {"dtype": dtype or "as the base", "relative_rounding": writer.rounding.relative}
        write_json(folder / EXPORT_RECORD, record(manifest, method) | facts)
    return writer.rounding


def record(manifest: Manifest, method: Method | None) -> dict[str, Any]:
    """Return what an export says about its origin."""
    return {
        "schema": 1,
        "base": manifest.base_sha256,
        "model": manifest.model_sha256,
        "backbone": manifest.backbone_sha256,
        "method": None if method is None else method.name,
    }


def copy_product(product: Path, manifest: Manifest, folder: Path) -> None:
    """Copy a product's connectors and manifest."""
    for file in (MANIFEST, *(entry.file for entry in manifest.connectors.values())):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(product / file, folder / file)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the base, from its file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    code: str


def _header(path: Path) -> dict[str, _Stored]:
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {}
            for name in file.keys():
                part = file.get_slice(name)
                tensor = file.get_tensor(name)
                found[name] = _Stored(tuple(tensor.shape), tensor.dtype, str(part.get_dtype()))
            return found
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read as safetensors ({error}); restore it") from None


def _bytes(entry: _Stored, target: torch.dtype | None) -> int:
    return torch.Size(entry.shape).numel() * _written(entry, target).itemsize


def _written(entry: _Stored, target: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a tensor is written; one without fractions keeps its own."""
    return target if target is not None and entry.dtype.is_floating_point else entry.dtype


class _Writer:
    """Writes safetensors files tensor by tensor, which the library's own writer can't."""

    def __init__(self, layers: set[str], update: Update, target: torch.dtype | None) -> None:
        self._layers = layers
        self._update = update
        self._target = target
        self._changed = 0
        self._error = self._size = 0.0

    @property
    def rounding(self) -> Rounding:
        relative = (self._error / self._size) ** 0.5 if self._size > 0 else 0.0
        return Rounding(self._changed, relative)

    def write(self, source: Path, header: Mapping[str, _Stored], path: Path) -> None:
        facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, entry in header.items():
            dtype = _written(entry, self._target)
            code = entry.code if dtype == entry.dtype else _CODES[dtype]
            begin, end = end, end + _bytes(entry, self._target)
            facts[name] = {"dtype": code, "shape": entry.shape, "data_offsets": [begin, end]}
        text = json.dumps(facts).encode()
        text += b" " * (-len(text) % 8)
        with safe_open(str(source), framework="pt") as file, path.open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            for name, entry in header.items():
                ready = self._merged(name, file.get_tensor(name), _written(entry, self._target))
                output.write(ready.contiguous().flatten().view(torch.uint8).numpy().data)

    def _merged(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self._layers:
            return weight.to(dtype)
        update = self._update(layer)
        if isinstance(update, Tensor):
            exact = weight.float() + update
        else:
            _require_fit(name, weight, update)
            exact = add_products(weight, update)
        rounded = exact.to(dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise DataError(f"'{name}' is not finite in {dtype}; export with another --dtype")
        self._changed += 1
        self._error += float((rounded.float() - exact).double().square().sum())
        self._size += float((exact - weight.float()).double().square().sum())
        return rounded


def _require_fit(name: str, weight: Tensor, terms: Terms) -> None:
    for _, left, right in terms:
        if (left.shape[0], right.shape[1]) != tuple(weight.shape):
            raise DataError(
                f"'{name}': the factors of a delta are {tuple(left.shape)} and "
                f"{tuple(right.shape)}, the base's weight {tuple(weight.shape)}"
            )


def carry_over(base: Path, folder: Path, target: torch.dtype | None, size: int) -> None:
    """Copy configuration, tokenizer and index, with what the dtype changes in them.

    What a merge or an export has written about the base's weights is left out.

    Args:
        base: an HF folder.
        folder: where the files go.
        target: dtype of the weights there; None: as in the base.
        size: bytes of all weights there.
    """
    about_itself = files_about_origin(base)
    for source in sorted(base.iterdir()):
        left_out = source.name.endswith(WEIGHT_ENDINGS) or source.name in about_itself
        if source.is_file() and not left_out:
            shutil.copyfile(source, folder / source.name)
    if (base / INDEX).exists():
        index = read_json(base / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": size}
        write_json(folder / INDEX, index)
    if target is not None:
        config = read_json(base / "config.json")
        names = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
        write_json(folder / "config.json", config | dict.fromkeys(names, _NAMES[target]))
