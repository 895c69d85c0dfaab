"""The arithmetic of a lineage, in the one order that training, evaluation and export share.

    W_merged = W + w_1·B_1 A_1 + w_2·B_2 A_2 + …      in fp32, in the order of the stages

with w_j = c_j · s_j; the caller rounds once. Factors are read layer by layer from memory-mapped
files, so that no more than a layer is resident.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mera_ds.checkpoint import load_delta
from mera_ds.errors import DataError
from mera_ds.files import sha256_file
from mera_ds.manifest import Factors, Manifest


@dataclass(frozen=True)
class WeightedDelta:
    """One stage's factors, and what their product counts."""

    tensors: Mapping[str, Tensor]
    weight: float
    """Coefficient × alpha / rank."""
    where: str
    """Name of the delta, for messages."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """The same for single layers, where it differs."""

    def weight_of(self, layer: str) -> float:
        """Return what the product counts in a layer."""
        return self.weights.get(layer, self.weight)


def weighted_deltas(product: Path, manifest: Manifest) -> list[WeightedDelta]:
    """Read the deltas of a product, in the order of the stages; those that count 0 are left out."""
    return [
        WeightedDelta(
            load_delta(product, entry), entry.weight, str(product / entry.file), entry.weights
        )
        for entry in manifest.lineage
        if entry.weight != 0 or any(entry.weights.values())
    ]


def add_products(weight: Tensor, terms: Iterable[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Return weight + Σ w · left @ right in fp32.

    Args:
        weight: (out, in).
        terms: w, left (out, r), right (r, in), in the order of the stages.
    """
    total = weight.float()
    for factor, left, right in terms:
        total = torch.addmm(total, left.float(), right.float(), alpha=factor)
    return total


class FactorFile:
    """A file of LoRA factors that is read layer by layer; its hash is checked when it is opened."""

    def __init__(self, product: Path, entry: Factors) -> None:
        self._path = product / entry.file
        self.scale = entry.scale
        self.rank = entry.rank
        if not self._path.exists():
            raise DataError(f"{self._path} is missing; restore it or make its folder again")
        if sha256_file(self._path) != entry.sha256:
            raise DataError(
                f"{self._path} was changed or damaged (its SHA-256 differs); restore it"
            )
        try:
            self._file = safe_open(str(self._path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{self._path} can't be read as safetensors ({error}); restore it"
            ) from None
        self._names = set(self._file.keys())
        self.layers = sorted({name.rpartition(".")[0] for name in self._names})

    def factors(self, layer: str) -> tuple[Tensor, Tensor] | None:
        """Return B (out, r) and A (r, in) of a layer, or None if the delta leaves it alone.

        Raises:
            DataError: if one of the two is missing.
        """
        names = [f"{layer}.lora_B", f"{layer}.lora_A"]
        found = [name for name in names if name in self._names]
        if len(found) == 1:
            (missing,) = set(names) - set(found)
            raise DataError(f"{self._path} has no tensor '{missing}'")
        return (self._file.get_tensor(names[0]), self._file.get_tensor(names[1])) if found else None
