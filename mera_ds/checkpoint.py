"""Model products on disk: connectors, the lineage of backbone deltas, and a manifest.

A product is a folder that says all of a model but its frozen weights:

    manifest.json                  written last: base, lineage, connectors, key, provenance
    connectors/<modality>.safetensors
    deltas/<stage>-<modality>.safetensors
    fisher/<stage>-<modality>.safetensors
    backbone/                      an HF folder, only if the whole backbone was tuned
    weave.safetensors              only PathWeave: see `mera_ds.model.weave`

The backbone of a product is  θ = θ_base + Σ c_i · s_i · B_i A_i  over its lineage, with the full
backbone, if there is one, in the place of θ_base. Finished files
are hard-linked from product to product, so a product is complete in itself and costs only what it
adds. Every file is named with its SHA-256; reading checks it.
"""

import dataclasses
import os
import platform
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mera_ds.errors import DataError, InputError
from mera_ds.files import (
    add_to_json,
    committed_folder,
    failpoint,
    link_or_copy,
    read_json,
    require_space,
    sha256_file,
    sha256_json,
    write_json,
)
from mera_ds.manifest import MANIFEST as MANIFEST
from mera_ds.manifest import SCHEMA as SCHEMA
from mera_ds.manifest import DeltaEntry as DeltaEntry
from mera_ds.manifest import Factors, backbone_identity, keep_parents, manifest_facts
from mera_ds.manifest import FileEntry as FileEntry
from mera_ds.manifest import FullBackbone as FullBackbone
from mera_ds.manifest import FullStage as FullStage
from mera_ds.manifest import Manifest as Manifest
from mera_ds.manifest import check_lineage as check_lineage
from mera_ds.manifest import is_finished as is_finished
from mera_ds.manifest import read_manifest as read_manifest


@dataclass(frozen=True, kw_only=True)
class NewDelta:
    """LoRA factors to be added to the lineage: `<module>.lora_A` (r, in), `.lora_B` (out, r)."""

    stage: int
    modality: str
    scale: float
    rank: int
    tensors: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    """See `mera_ds.merge.fisher`; empty: not known."""


BACKBONE = "backbone"
"""Folder of a product's full backbone."""


@dataclass(frozen=True, kw_only=True)
class NewBackbone:
    """A full backbone that takes the place of the previous one."""

    folder: Path
    """An HF folder; its files are linked, so nothing may write to them again."""
    stages: tuple[FullStage, ...]


def write_product(
    product: Path,
    *,
    key: str,
    step: str,
    base_sha256: str,
    previous: Path | None,
    lineage: tuple[DeltaEntry, ...] | None = None,
    connectors: Mapping[str, Mapping[str, Tensor]] | None = None,
    without: Collection[str] = (),
    replaced: Mapping[int, Mapping[str, Tensor]] | None = None,
    measured: Mapping[int, Mapping[str, Tensor]] | None = None,
    delta: NewDelta | None = None,
    backbone: NewBackbone | None = None,
    weave: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a product atomically: what `previous` has, changed by what is given.

    Args:
        product: the folder to make.
        key: hash of the step's inputs.
        step: name of the step.
        base_sha256: hash of the backbone's folder.
        previous: product whose files are kept where nothing newer is given.
        lineage: replaces the previous lineage's coefficients (merge).
        connectors: new tensors per modality.
        without: modalities whose connectors are left out.
        replaced: by stage, factors that count instead of those that were trained (merge).
        measured: by stage, Fisher information that was measured on data (merge).
        delta: appended to the lineage with coefficient 1.
        backbone: full weights in the place of the previous ones.
        weave: new in-adapters and gates (PathWeave).
        importance: Fisher information of LoRA factors (EWC).
        provenance: what else to record.

    Raises:
        DataError: if a tensor is empty or not finite.
    """
    before = read_manifest(previous) if previous is not None else None
    connectors, replaced = connectors or {}, replaced or {}
    old = before.connectors if before else {}
    kept = {name: entry for name, entry in old.items() if name not in {*connectors, *without}}
    entries = list(lineage if lineage is not None else before.lineage if before else ())
    added = [weave, importance, delta.tensors if delta else None]
    _require_space(product, [*connectors.values(), *replaced.values(), *filter(None, added)])
    kept_weave = before.weave if before and weave is None else None
    full = before.backbone if before and backbone is None else None
    with committed_folder(product) as folder:
        files = [*kept.values(), *(full.files if full else ()), *filter(None, [kept_weave])]
        _link(previous, folder, [*(entry.file for entry in files), *_files_of(entries)])
        if backbone is not None:
            full = _link_backbone(folder, backbone)
        for modality, tensors in connectors.items():
            kept[modality] = _save_part(folder, f"connectors/{modality}", tensors)
        entries = _save_changes(folder, entries, replaced, measured or {})
        if before is not None and lineage is not None:
            entries = list(keep_parents(before.lineage, entries))
        if delta is not None:
            entries.append(_save_delta(folder, delta, base_sha256, entries))
        manifest = Manifest(
            schema=SCHEMA,
            key=key,
            step=step,
            base_sha256=base_sha256,
            lineage=tuple(entries),
            connectors=dict(sorted(kept.items())),
            provenance={**(provenance or {}), "software": software_versions()},
            backbone=full,
            weave=_save_part(folder, "weave", weave) if weave else kept_weave,
            importance=_save_part(folder, "importance", importance) if importance else None,
        )
        write_json(folder / MANIFEST, manifest_facts(manifest))
    return manifest


def _save_changes(
    folder: Path,
    lineage: Iterable[DeltaEntry],
    replaced: Mapping[int, Mapping[str, Tensor]],
    measured: Mapping[int, Mapping[str, Tensor]],
) -> list[DeltaEntry]:
    """Write what takes the place of some deltas' factors and Fisher information."""
    entries = [
        _save_replaced(folder, entry, replaced[entry.stage]) if entry.stage in replaced else entry
        for entry in lineage
    ]
    return [_save_measured(folder, entry, measured) for entry in entries]


def _link_backbone(product: Path, new: NewBackbone) -> FullBackbone:
    entries = []
    for path in sorted(entry for entry in new.folder.iterdir() if entry.is_file()):
        file = f"{BACKBONE}/{path.name}"
        link_or_copy(path, product / file)
        entries.append(FileEntry(file=file, sha256=sha256_file(product / file)))
    return FullBackbone(files=tuple(entries), stages=new.stages)


def _require_space(product: Path, new: Iterable[Mapping[str, Tensor]]) -> None:
    size = sum(
        tensor.numel() * tensor.element_size() for tensors in new for tensor in tensors.values()
    )
    require_space(product.parent, size + 1_000_000)


def _save_part(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
    file = f"{name}.safetensors"
    return FileEntry(file=file, sha256=save_tensors(folder / file, tensors))


def _files_of(lineage: Iterable[DeltaEntry]) -> list[str]:
    return [file for entry in lineage for file in entry.files]


def _link(previous: Path | None, folder: Path, files: Iterable[str]) -> None:
    for file in files:
        assert previous is not None
        link_or_copy(previous / file, folder / file)


def _save_delta(
    folder: Path, delta: NewDelta, base_sha256: str, lineage: list[DeltaEntry]
) -> DeltaEntry:
    name = f"{delta.stage:02d}-{delta.modality}.safetensors"
    fisher = None
    if delta.fisher:
        sha256 = save_tensors(folder / "fisher" / name, delta.fisher)
        fisher = FileEntry(file=f"fisher/{name}", sha256=sha256)
    return DeltaEntry(
        stage=delta.stage,
        modality=delta.modality,
        coefficient="1",
        scale=delta.scale,
        rank=delta.rank,
        file=f"deltas/{name}",
        sha256=save_tensors(folder / "deltas" / name, delta.tensors),
        parent=backbone_identity(base_sha256, lineage),
        fisher=fisher,
    )


def _save_measured(
    folder: Path, entry: DeltaEntry, measured: Mapping[int, Mapping[str, Tensor]]
) -> DeltaEntry:
    if entry.stage not in measured:
        return entry
    file = f"fisher/{entry.stage:02d}-{entry.modality}-data.safetensors"
    sha256 = save_tensors(folder / file, measured[entry.stage])
    return dataclasses.replace(entry, measured=FileEntry(file=file, sha256=sha256))


def _save_replaced(folder: Path, entry: DeltaEntry, tensors: Mapping[str, Tensor]) -> DeltaEntry:
    file = f"deltas/{entry.stage:02d}-{entry.modality}-merged.safetensors"
    trained = entry.as_trained
    return dataclasses.replace(
        entry,
        file=file,
        sha256=save_tensors(folder / file, tensors),
        scale=1.0,
        rank=max(len(factor) for name, factor in tensors.items() if name.endswith(".lora_A")),
        trained=Factors(
            file=trained.file, sha256=trained.sha256, scale=trained.scale, rank=trained.rank
        ),
    )


def software_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("mera-ds", "torch", "deepspeed", "transformers", "peft", "safetensors")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file (inside a folder that is committed later); return its SHA-256.

    Raises:
        DataError: if there is no tensor, or one is empty or not finite.
    """
    if not tensors:
        raise DataError(f"{path.name}: there is no tensor to save")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise DataError(f"{path.name}: tensor '{name}' is empty and was not saved")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{path.name}: tensor '{name}' is not finite and was not saved")
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    write_safetensors(path, ready)
    failpoint("tensors.written")
    return sha256_file(path)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as they are; a failed write is an `OSError`, as of any other file.

    safetensors has an error class of its own, and the system's number only in its text.
    """
    try:
        save_file(dict(tensors), str(path), metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, checking its hash if given.

    Raises:
        DataError: if the file is missing, damaged or not the one that was written.
    """
    if not path.exists():
        raise DataError(f"{path} is missing; restore it or make its folder again")
    if sha256 is not None and sha256_file(path) != sha256:
        raise DataError(
            f"{path} was changed or damaged: its bytes 0 to {path.stat().st_size} don't have the "
            f"SHA-256 {sha256} that was written; restore it"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read as safetensors ({error}); restore it") from None


def require_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> None:
    """Compare names and shapes, refusing any difference.

    Raises:
        DataError: naming up to ten missing, unexpected or mis-shaped tensors.
    """
    problems = [f"missing '{name}'" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected '{name}'" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"'{name}' has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{where} does not fit the model: {'; '.join(problems[:10])}{more}")


def load_connector(product: Path, manifest: Manifest, modality: str) -> dict[str, Tensor]:
    """Read the tensors of one modality's connector."""
    if modality not in manifest.connectors:
        raise DataError(f"{product} holds no connector for {modality}")
    entry = manifest.connectors[modality]
    return load_tensors(product / entry.file, entry.sha256)


def load_delta(product: Path, entry: DeltaEntry) -> dict[str, Tensor]:
    """Read the LoRA factors of one lineage entry."""
    return load_tensors(product / entry.file, entry.sha256)


def load_part(product: Path, entry: FileEntry) -> dict[str, Tensor]:
    """Read a file of a product, such as `manifest.weave`."""
    return load_tensors(product / entry.file, entry.sha256)


def hash_backbone(folder: Path, memory: Path) -> str:
    """Return the hash of a backbone folder's configuration and weights.

    Args:
        folder: an HF checkpoint.
        memory: JSON file in which hashes are remembered by name, size and times of change.

    Raises:
        InputError: if the folder or its weights are missing.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").exists() or not weights:
        raise InputError(
            f"backbone.path: {folder} holds no HF checkpoint (config.json and *.safetensors); "
            "for the profile 'pocket' run 'mera-ds pocket fetch', otherwise correct the path"
        )
    files = [folder / "config.json", *weights]
    return sha256_json({path.name: remembered_sha256(path, memory) for path in files})


def remembered_sha256(path: Path, memory: Path) -> str:
    """Return a file's SHA-256, or that of a folder's files; computed once per state of the file."""
    if path.is_dir():
        names = sorted(str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file())
        visible = [name for name in names if not name.startswith(".")]  # a hub's notes are not
        return sha256_json({name: remembered_sha256(path / name, memory) for name in visible})
    status = path.stat()
    # The time of change counts, too: a copy may keep the time of writing, and so may an archive.
    stamp = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
    remembered = read_json(memory) if memory.exists() else {}
    if stamp not in remembered:
        remembered = {stamp: sha256_file(path)}
        add_to_json(memory, remembered)
    return str(remembered[stamp])
