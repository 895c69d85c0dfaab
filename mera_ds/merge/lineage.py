"""Merging and changing one's mind as a change of coefficients.

θ_tuned = θ_{i−1} + Δ_i, so (i−1)/i · θ_{i−1} + 1/i · θ_tuned = θ_{i−1} + Δ_i / i: exact, without
touching a weight, and it can be changed later. Other methods say other coefficients, or factors
that count in place of the newest delta's; what was trained always stays in the product.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from mera_ds.checkpoint import load_delta, require_tensors, write_product
from mera_ds.errors import InputError
from mera_ds.manifest import DeltaEntry, Manifest, check_chain, read_manifest
from mera_ds.merge.factors import factorise
from mera_ds.merge.fisher import marginals_from_moments
from mera_ds.merge.methods import Method
from mera_ds.merge.methods.base import seed_of
from mera_ds.merge.updates import (
    Coefficient,
    LayerMerge,
    Update,
    layers_of,
    open_updates,
    take_over,
)
from mera_ds.settings import require_known


def merged_lineage(manifest: Manifest, stage: int, coefficient: Fraction) -> tuple[DeltaEntry, ...]:
    """Return the lineage with the newest delta's coefficient set.

    Args:
        manifest: of the tuned model.
        stage: the stage that was just tuned.
        coefficient: its weight, e.g. 1/i for the cumulative moving average.

    Raises:
        InputError: if the newest delta is not that of this stage, or was merged before.
    """
    *older, newest = _tuned_lineage(manifest, stage)
    return (*older, dataclasses.replace(newest, coefficient=str(coefficient)))


def _tuned_lineage(manifest: Manifest, stage: int) -> tuple[DeltaEntry, ...]:
    """Return the lineage of a model that was tuned in a stage and not merged yet."""
    if not manifest.lineage or manifest.lineage[-1].stage != stage:
        raise InputError(
            f"merge of stage {stage}: the newest delta of the tuned model is that of stage "
            f"{manifest.lineage[-1].stage if manifest.lineage else 'none'}; give the model that "
            f"was tuned in stage {stage}"
        )
    newest = manifest.lineage[-1]
    if Fraction(newest.coefficient) != 1 or newest.layers or newest.trained is not None:
        raise InputError(
            f"merge of stage {stage}: the delta has the coefficient {newest.coefficient} already"
        )
    return manifest.lineage


def merge_product(
    tuned: Path, output: Path, *, key: str, step: str, stage: int, coefficient: str
) -> Manifest:
    """Write the merged model: the tuned one's files, with one coefficient changed."""
    manifest = read_manifest(tuned)
    check_chain(tuned, manifest)
    return write_product(
        output,
        key=key,
        step=step,
        base_sha256=manifest.base_sha256,
        previous=tuned,
        lineage=merged_lineage(manifest, stage, Fraction(coefficient)),
        provenance={"merge": "cumulative moving average", "coefficient": coefficient},
    )


def merge_product_by(
    method: Method,
    tuned: Path,
    output: Path,
    *,
    key: str,
    step: str,
    stage: int,
    measured: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
) -> Manifest:
    """Write the merged model by a method: the older deltas stand as earlier merges left them.

    Args:
        method: the method.
        tuned: the product that was tuned in the stage.
        output: the folder to write.
        key: hash of the step's inputs.
        step: name of the step.
        stage: its number.
        measured: by stage, mean squared gradients of the factors, on data.
    """
    manifest = read_manifest(tuned)
    check_chain(tuned, manifest)
    _tuned_lineage(manifest, stage)
    marginals = _marginals(tuned, manifest, measured)
    merged = apply_method(tuned, manifest, method, measured=marginals)
    return _write(tuned, output, manifest, merged, key, step)


def _marginals(
    product: Path, manifest: Manifest, measured: Mapping[int, Mapping[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """Return the Fisher information of layers from squared gradients of the factors."""
    found = {}
    for entry in manifest.lineage:
        if entry.stage in measured:
            factors = load_delta(product, entry)
            squares = measured[entry.stage]
            require_tensors(squares, factors, f"Fisher information of stage {entry.stage}")
            found[entry.stage] = marginals_from_moments(factors, squares, entry.scale)
    return found


@dataclass(frozen=True)
class Merged:
    """What a method makes of a lineage."""

    lineage: tuple[DeltaEntry, ...]
    replaced: Mapping[int, Mapping[str, Tensor]]
    """By stage, factors in place of the trained ones."""
    measured: Mapping[int, Mapping[str, Tensor]]
    """By stage, Fisher information that was measured on data just now."""
    facts: Mapping[str, Any]
    """For the provenance: method, options, and how far factors are from a dense result."""


def apply_method(
    product: Path,
    manifest: Manifest,
    method: Method,
    *,
    anew: bool = False,
    measured: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
) -> Merged:
    """Return what a method makes of a product's lineage.

    Args:
        product: the product's folder.
        manifest: its manifest.
        method: the method.
        anew: as if every stage had been merged by this method, from the trained deltas on;
            otherwise only the newest delta is, and the older ones stand as merges left them.
        measured: by stage, Fisher information of layers that the product does not hold yet.

    Raises:
        InputError: if there are not two stages to merge.
    """
    updates, layers, error = merge_updates(product, manifest, method, anew=anew, measured=measured)
    entries = []
    for entry, update in zip(manifest.lineage, updates, strict=True):
        if anew or update.replaced:
            kept = entry.as_trained
            entry = dataclasses.replace(
                entry,
                file=kept.file,
                sha256=kept.sha256,
                scale=kept.scale,
                rank=kept.rank,
                trained=None,
            )
        entries.append(_weighed(entry, update, layers))
    replaced = {update.stage: _tensors(update) for update in updates if update.replaced}
    facts: dict[str, Any] = {"merge": method.name, "options": dataclasses.asdict(method.options)}
    if error is not None:
        facts["relative_error"] = error
    return Merged(tuple(entries), replaced, measured, facts)


def merge_updates(
    product: Path,
    manifest: Manifest,
    method: Method,
    *,
    anew: bool,
    measured: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
) -> tuple[list[Update], list[str], float | None]:
    """Return updates as a method leaves them, all layers, and how far dense results are missed.

    The error is that of the factors of a stated rank, over the norm of the dense result.
    """
    if len(manifest.lineage) < 2:
        raise InputError(f"{product} has {len(manifest.lineage)} stage; merging needs two or more")
    updates = open_updates(product, manifest, trained=anew, measured=measured)
    layers = layers_of(updates)
    first = 2 if anew and not method.kind.joint else len(updates)
    error = None
    for count in range(first, len(updates) + 1):
        factoriser = _Factoriser(method, updates[:count])
        take_over(updates[:count], factoriser.sparse(method.merge(updates[:count], layers)))
        error = factoriser.error
    return updates, layers, error


class _Factoriser:
    """Turns dense results into factors and adds up what is lost."""

    def __init__(self, method: Method, updates: Sequence[Update]) -> None:
        self._rank = method.rank or sum(update.file.rank for update in updates)
        self._lost = self._whole = 0.0

    def sparse(self, merges: Iterator[LayerMerge]) -> Iterator[LayerMerge]:
        for merge in merges:
            if not isinstance(merge.newest, Tensor):
                yield merge
                continue
            near, lost = factorise(merge.newest, self._rank, seed_of(merge.layer))
            self._lost += lost**2
            self._whole += float(merge.newest.double().square().sum())
            yield dataclasses.replace(merge, newest=near)

    @property
    def error(self) -> float | None:
        """Relative error of all dense results together; None if there were none."""
        return (self._lost / self._whole) ** 0.5 if self._whole > 0 else None


def _tensors(update: Update) -> dict[str, Tensor]:
    found = {}
    for layer, factors in update.replaced.items():
        if factors.rank > 0:
            found[f"{layer}.lora_A"] = factors.right.float()
            found[f"{layer}.lora_B"] = factors.left.float()
    return found


def _weighed(entry: DeltaEntry, update: Update, layers: Sequence[str]) -> DeltaEntry:
    """Return the entry with the coefficient that most layers have, and those of the others."""
    texts = {layer: _text(update.coefficient_of(layer)) for layer in layers}
    common = Counter(texts.values()).most_common(1)[0][0]
    others = {layer: text for layer, text in texts.items() if text != common}
    return dataclasses.replace(entry, coefficient=common, layers=others)


def _text(coefficient: Coefficient) -> str:
    """Return a coefficient so that it is read back exactly."""
    return str(coefficient) if isinstance(coefficient, Fraction) else repr(float(coefficient))


def reweighted(manifest: Manifest, coefficients: Mapping[str, str]) -> tuple[DeltaEntry, ...]:
    """Return the lineage with the coefficients of some modalities set.

    Args:
        manifest: of any product.
        coefficients: by modality, fractions or decimal numbers.

    Raises:
        InputError: if a modality has no delta or a coefficient is no number.
    """
    for modality in coefficients:
        require_known(modality, [entry.modality for entry in manifest.lineage], "modality")
    return tuple(
        dataclasses.replace(entry, coefficient=_exact(coefficients[entry.modality]), layers={})
        if entry.modality in coefficients
        else entry
        for entry in manifest.lineage
    )


def _exact(text: str) -> str:
    try:
        found = Fraction(text)
        float(found)
        return str(found)
    except (ValueError, ArithmeticError):
        raise InputError(
            f"the coefficient '{text}' is no number; write a fraction such as 1/3, or 0.5"
        ) from None


def reweight_product(
    product: Path,
    output: Path,
    *,
    key: str,
    step: str,
    change: Mapping[str, str] | Method,
) -> Manifest:
    """Write a variant of a product: its files, linked, with other coefficients (and factors).

    Args:
        product: where to start from; it stays as it is.
        output: the folder to write.
        key: hash of product and change.
        step: what the variant is called.
        change: coefficients by modality, or a method to merge all stages with anew.
    """
    manifest = read_manifest(product)
    check_chain(product, manifest)
    if isinstance(change, Method):
        merged = apply_method(product, manifest, change, anew=True)
    else:
        facts = {"merge": "coefficients given by hand", "coefficients": dict(change)}
        merged = Merged(reweighted(manifest, change), {}, {}, facts)
    return _write(product, output, manifest, merged, key, step)


def _write(
    product: Path, output: Path, manifest: Manifest, merged: Merged, key: str, step: str
) -> Manifest:
    return write_product(
        output,
        key=key,
        step=step,
        base_sha256=manifest.base_sha256,
        previous=product,
        lineage=merged.lineage,
        replaced=merged.replaced,
        measured=merged.measured,
        provenance=merged.facts,
    )


def undo_product(
    product: Path, output: Path, *, key: str, step: str, parents: Sequence[Path]
) -> Manifest:
    """Write the model before a product's newest stage.

    Args:
        product: the model whose newest stage is undone; it stays as it is.
        output: the folder to write.
        key: hash of product and change.
        step: what the variant is called.
        parents: products among which the one that the newest delta was trained on may be, best
            first. Its connectors are taken, too. Without it, the deltas and connectors before the
            newest stage are taken as they stand now.

    Raises:
        InputError: if there is only one stage, or its factors are those of all stages (EWC).
    """
    manifest = read_manifest(product)
    check_chain(product, manifest)
    if len(manifest.lineage) < 2 and parents:
        raise InputError(
            f"{product} has one pair of factors that was carried on from stage to stage, so the "
            f"newest can't be taken out; the model before it is {parents[0]}"
        )
    if len(manifest.lineage) < 2:
        raise InputError(f"{product} has one stage only; before it there is the bare backbone")
    *older, newest = manifest.lineage
    facts = {"undone": newest.modality, "of": manifest.model_sha256}
    source = next((path for path in parents if _is_before(path, newest)), None)
    common: dict[str, Any] = {"key": key, "step": step, "base_sha256": manifest.base_sha256}
    if source is not None:
        return write_product(output, **common, previous=source, provenance=facts)
    return write_product(
        output,
        **common,
        previous=product,
        lineage=tuple(older),
        without=[newest.modality],
        provenance=facts,
    )


def _is_before(path: Path, newest: DeltaEntry) -> bool:
    found = read_manifest(path)
    return found.backbone_sha256 == newest.parent and newest.modality not in found.connectors
