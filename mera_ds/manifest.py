"""What a product's `manifest.json` says: base, lineage of deltas or full backbone, connectors.

Imports no torch: a lineage can be read, checked and re-weighted without touching a weight.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from mera_ds.errors import DataError, InputError
from mera_ds.files import read_json, sha256_json
from mera_ds.settings import parse

MANIFEST = "manifest.json"
SCHEMA = 3
READABLE = (1, 2, 3)
"""Schema 1 had no coefficients of single layers, no replaced factors, no Fisher information;
schema 2 no full backbone."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the product and its hash."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Factors(FileEntry):
    """A file with `<module>.lora_A` (r, in) and `<module>.lora_B` (out, r) per linear layer."""

    scale: float
    """LoRA's alpha / rank."""
    rank: int


@dataclass(frozen=True, kw_only=True)
class DeltaEntry(Factors):
    """One stage's contribution to the backbone: coefficient × scale × B A, per linear layer."""

    stage: int
    modality: str
    coefficient: str
    """Exact fraction, e.g. `1/3`, or a decimal number; 1 before the merge."""
    parent: str
    """`backbone_sha256` of the backbone that this delta was trained on."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Coefficients of single linear layers, where they differ from `coefficient`."""
    trained: Factors | None = None
    """The factors as they were trained, if a merge method replaced them."""
    trained_on: tuple[Any, ...] = ()
    """The terms of `parent`, if those of the deltas before this one have changed since."""
    fisher: FileEntry | None = None
    """`<module>.rows` (out,) and `<module>.columns` (in,): see `mera_ds.merge.fisher`."""
    measured: FileEntry | None = None
    """The same, measured on data rather than taken from Adam's second moments."""

    @property
    def weight(self) -> float:
        """The factor of B A in every layer that `layers` does not name."""
        return float(Fraction(self.coefficient)) * self.scale

    @property
    def weights(self) -> dict[str, float]:
        """The factor of B A in the layers that `layers` names."""
        return {name: float(Fraction(text)) * self.scale for name, text in self.layers.items()}

    @property
    def as_trained(self) -> Factors:
        """The factors as they were trained."""
        return self.trained or self

    @property
    def term(self) -> list[Any]:
        """What the name of a backbone depends on: trained delta, coefficient, what a merge did."""
        merged = {"layers": dict(self.layers), "factors": self.sha256}
        plain = not self.layers and self.trained is None
        return [self.as_trained.sha256, self.coefficient, *([] if plain else [merged])]

    @property
    def files(self) -> list[str]:
        """All files of this entry."""
        found = (self, self.trained, self.fisher, self.measured)
        return [entry.file for entry in found if entry is not None]


@dataclass(frozen=True, kw_only=True)
class FullStage:
    """One stage of full fine-tuning in the history of a full backbone."""

    stage: int
    modality: str
    coefficient: str
    """What the tuned backbone counted in the merge with the one before; 1 before the merge."""
    parent: str
    """`backbone_sha256` of the backbone that was tuned."""


@dataclass(frozen=True, kw_only=True)
class FullBackbone:
    """All weights of a backbone that was tuned as a whole, as an HF folder in the product."""

    files: tuple[FileEntry, ...]
    """Weights, configuration and what else such a folder holds."""
    stages: tuple[FullStage, ...]
    """How it came about, the newest stage last."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds."""

    schema: int
    key: str
    """Hash of everything that determined this product; equal key, equal product."""
    step: str
    base_sha256: str
    lineage: tuple[DeltaEntry, ...]
    connectors: Mapping[str, FileEntry]
    provenance: Mapping[str, Any]
    backbone: FullBackbone | None = None
    """What stands in the place of the base."""
    weave: FileEntry | None = None
    """What gates the deltas, if they are woven (see `mera_ds.model.weave`) and not added up."""
    importance: FileEntry | None = None
    """Fisher information of LoRA factors: the product of a `FisherStep`, which is no model."""

    @property
    def backbone_sha256(self) -> str:
        """Identity of the backbone: base or full weights, and each delta with its coefficient."""
        plain = backbone_identity(self.base_sha256, self.lineage, self.backbone)
        return plain if self.weave is None else sha256_json([plain, self.weave.sha256])

    @property
    def model_sha256(self) -> str:
        """Identity of the whole model: backbone and connectors."""
        connectors = {name: entry.sha256 for name, entry in self.connectors.items()}
        return sha256_json([self.backbone_sha256, connectors])


def backbone_identity(
    base_sha256: str, lineage: Iterable[DeltaEntry], full: FullBackbone | None = None
) -> str:
    """Return the hash that names θ_base + Σ c_i Δ_i, or the full weights."""
    terms = [entry.term for entry in lineage]
    if full is None:
        return sha256_json([base_sha256, terms])
    weights = [entry.sha256 for entry in full.files if entry.file.endswith(".safetensors")]
    return sha256_json([base_sha256, terms, weights])


def require_deltas(product: Path, manifest: Manifest) -> None:
    """Refuse a product whose backbone is full, where only deltas can be changed or written.

    Raises:
        InputError: naming it.
    """
    if manifest.backbone is not None:
        raise InputError(
            f"{product} was tuned as a whole (tuning: full), so there are no deltas to weigh or to "
            "write as an adapter; 'mera-ds lineage export' without --method and --adapter writes "
            "it, and 'launch/merge.py --previous … --tuned …' merges it in another way"
        )


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what `manifest.json` says: what only few products have is left out of the others."""
    facts = dataclasses.asdict(manifest)
    rare = ("backbone", "weave", "importance")
    return {name: value for name, value in facts.items() if name not in rare or value is not None}


def read_manifest(product: Path) -> Manifest:
    """Read a product's manifest strictly.

    Raises:
        InputError: if the product does not exist or is not finished.
        DataError: if the manifest was written by another version.
    """
    if not (product / MANIFEST).exists():
        raise InputError(f"{product} holds no finished model; run the step that makes it")
    value = read_json(product / MANIFEST)
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema not in READABLE:
        raise DataError(f"{product / MANIFEST}: schema {schema}, expected {SCHEMA}")
    return parse(Manifest, value, str(product / MANIFEST))


def is_finished(product: Path, key: str) -> bool:
    """Return whether the product exists and was made from exactly these inputs.

    Raises:
        InputError: if it exists but was made from other inputs (data, settings or weights).
    """
    if not (product / MANIFEST).exists():
        return False
    found = read_manifest(product).key
    if found != key:
        raise InputError(
            f"{product} was made from other data, settings or weights than this run has now; "
            "restore them, delete that folder to make it again, or make a new run"
        )
    return True


def require_foldable(product: Path, manifest: Manifest) -> None:
    """Refuse a product whose backbone is not the base plus a sum of deltas.

    Raises:
        InputError: if its adapters are woven.
    """
    if manifest.weave is not None:
        raise InputError(
            f"{product}: its adapters are gated token by token (method pathweave), so they can't "
            "be merged, re-weighted or written as one backbone; take a model of another method"
        )


def check_lineage(product: Path, manifest: Manifest, base_sha256: str) -> None:
    """Refuse a product that belongs to another base backbone, or whose deltas do.

    Raises:
        InputError: naming both hashes.
    """
    if manifest.base_sha256 != base_sha256:
        raise InputError(
            f"{product} was trained on the backbone {manifest.base_sha256[:12]}, but the "
            f"configured one is {base_sha256[:12]}; set backbone.path to the folder it was "
            "trained on"
        )
    check_chain(product, manifest)


def check_chain(product: Path, manifest: Manifest) -> None:
    """Refuse a lineage whose deltas were not trained one upon the other.

    A delta's `parent` must be the name of the backbone that is made of this base and of exactly the
    trained deltas before it, in this order: at the coefficients they have now or, where they were
    changed later (`mera-ds lineage reweight`), at those that the delta's `trained_on` states.

    Raises:
        InputError: naming the delta and both hashes.
    """
    for position, entry in enumerate(manifest.lineage):
        before = manifest.lineage[:position]
        terms = list(entry.trained_on) or [other.term for other in before]
        expected = sha256_json([manifest.base_sha256, terms])
        deltas = [term[0] if isinstance(term, list) and term else None for term in terms]
        if entry.parent != expected or deltas != [other.as_trained.sha256 for other in before]:
            raise InputError(
                f"{product}: the delta of stage {entry.stage} ({entry.modality}) was trained on "
                f"the backbone {entry.parent[:12]}, but base and deltas before it are "
                f"{backbone_identity(manifest.base_sha256, before)[:12]}; a delta only fits where "
                "it was trained: restore the lineage, or train the stage again"
            )


def keep_parents(old: Sequence[DeltaEntry], new: Sequence[DeltaEntry]) -> tuple[DeltaEntry, ...]:
    """Return `new`, saying in `trained_on` what its deltas were trained on where that has changed.

    Args:
        old: a lineage.
        new: the same stages with other coefficients or factors.
    """
    kept: list[DeltaEntry] = []
    for position, entry in enumerate(new):
        terms = list(old[position].trained_on) or [other.term for other in old[:position]]
        changed = terms != [other.term for other in kept]
        kept.append(dataclasses.replace(entry, trained_on=tuple(terms) if changed else ()))
    return tuple(kept)
