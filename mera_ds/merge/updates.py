"""The stream that merge methods work on: each stage's update of the backbone, layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from mera_ds.checkpoint import load_tensors
from mera_ds.deltas import FactorFile
from mera_ds.errors import DataError
from mera_ds.manifest import DeltaEntry, FileEntry, Manifest
from mera_ds.merge.factors import LowRank
from mera_ds.merge.fisher import Marginals

Coefficient = Fraction | float


@dataclass(frozen=True)
class LayerMerge:
    """What a method makes of one layer:  Σ_j coefficients[j] · Δ_j."""

    layer: str
    coefficients: tuple[Coefficient, ...]
    """One per update, the newest last."""
    newest: LowRank | Tensor | None = None
    """What counts as Δ of the newest update from now on (a `Tensor` is dense); None: as it was."""


@dataclass
class Update:
    """One stage's update Δ of the backbone, and what merges have made of it so far."""

    stage: int
    modality: str
    file: FactorFile
    coefficient: Coefficient
    coefficients: dict[str, Coefficient] = field(default_factory=dict)
    """Of single layers, where they differ."""
    merged: FactorFile | None = None
    """Factors that count instead of the trained ones, on disk."""
    replaced: dict[str, LowRank] = field(default_factory=dict)
    """The same, in memory."""
    information: Mapping[str, Tensor] | None = None
    """Fisher information, if it is known."""

    def trained(self, layer: str) -> LowRank | None:
        """Return s · B A as trained; None where the stage leaves the layer alone."""
        return _scaled(self.file, layer)

    def current(self, layer: str) -> LowRank | None:
        """Return what counts at present: the trained Δ, or what a method has made of it."""
        if layer in self.replaced:
            return self.replaced[layer]
        return self.trained(layer) if self.merged is None else _scaled(self.merged, layer)

    def coefficient_of(self, layer: str) -> Coefficient:
        """Return the coefficient in a layer."""
        return self.coefficients.get(layer, self.coefficient)

    def fisher(self, layer: str) -> Marginals:
        """Return the Fisher information of the stage's loss in a layer.

        Raises:
            DataError: if it was not saved when the stage was tuned.
        """
        if self.information is None:
            raise DataError(
                f"the delta of stage {self.stage} ({self.modality}) has no Fisher information: it "
                "was tuned by an earlier version; tune it again, or choose another method"
            )
        rows, columns = (self.information[f"{layer}.{side}"] for side in ("rows", "columns"))
        return Marginals(rows.double(), columns.double())


def _scaled(file: FactorFile, layer: str) -> LowRank | None:
    found = file.factors(layer)
    if found is None:
        return None
    left, right = found
    return LowRank(left.double() * file.scale, right.double())


def open_updates(
    product: Path,
    manifest: Manifest,
    *,
    trained: bool = False,
    measured: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
) -> list[Update]:
    """Open the deltas of a product; their Fisher information is of one kind for all of them.

    Args:
        product: the product's folder.
        manifest: its manifest.
        trained: take each as it was trained, with coefficient 1, whatever merges have made of it.
        measured: by stage, Fisher information that the product does not hold yet.
    """
    known = all(entry.measured or entry.stage in measured for entry in manifest.lineage)
    updates = [
        _open(product, entry, trained, entry.measured if known else entry.fisher)
        for entry in manifest.lineage
    ]
    if known:
        for update in updates:
            update.information = measured.get(update.stage, update.information)
    return updates


def _open(product: Path, entry: DeltaEntry, trained: bool, fisher: FileEntry | None) -> Update:
    update = Update(
        stage=entry.stage,
        modality=entry.modality,
        file=FactorFile(product, entry.as_trained),
        coefficient=Fraction(1),
        information=None if fisher is None else _information(product, fisher),
    )
    if not trained:
        update.coefficient = Fraction(entry.coefficient)
        update.coefficients = {name: Fraction(text) for name, text in entry.layers.items()}
        update.merged = None if entry.trained is None else FactorFile(product, entry)
    return update


def _information(product: Path, entry: FileEntry) -> Mapping[str, Tensor]:
    return load_tensors(product / entry.file, entry.sha256)


def layers_of(updates: Iterable[Update]) -> list[str]:
    """Return every layer that some update changes."""
    return sorted({layer for update in updates for layer in update.file.layers})


def present(updates: Sequence[Update], layer: str, *, trained: bool = False) -> list[LowRank]:
    """Return the Δ of all updates in a layer, zero (of rank 0) where one leaves it alone.

    Raises:
        DataError: if their shapes differ.
    """
    found = [update.trained(layer) if trained else update.current(layer) for update in updates]
    shapes = {(len(entry.left), entry.right.shape[1]) for entry in found if entry is not None}
    if len(shapes) > 1:
        raise DataError(f"'{layer}' has other shapes in other stages: {sorted(shapes)}")
    ((outputs, inputs),) = shapes
    sample = next(entry.left for entry in found if entry is not None)
    nothing = LowRank(sample.new_zeros(outputs, 0), sample.new_zeros(0, inputs))
    return [entry if entry is not None else nothing for entry in found]


def take_over(updates: Sequence[Update], merges: Iterable[LayerMerge]) -> None:
    """Change the updates as a method says; dense results must have been factorised."""
    for merge in merges:
        for update, coefficient in zip(updates, merge.coefficients, strict=True):
            update.coefficients[merge.layer] = coefficient
        if isinstance(merge.newest, LowRank):
            updates[-1].replaced[merge.layer] = merge.newest
