"""What a step's product depends on, as one hash.

Two steps with equal keys make equal products, whichever run they belong to. So a finished step is
skipped, a product made from other data or settings is refused, and runs can share stages (an
expert of the first modality is the first stage of every method).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mera_ds.checkpoint import BACKBONE, hash_backbone, read_manifest, remembered_sha256
from mera_ds.config import ComponentConfig, PhaseConfig, RunConfig, cache_folder, resolve_path
from mera_ds.errors import DataError, InputError
from mera_ds.files import sha256_json
from mera_ds.mergeconfig import CMA
from mera_ds.plan import LORA, DataPart, FisherStep, MergeStep, Plan, Step, TrainStep, step_inputs
from mera_ds.registry import CONNECTOR, ENCODER, defining_plugins
from mera_ds.settings import dump
from mera_ds.shards.format import read_index
from mera_ds.shards.remote import data_folder

_TOKENIZER_FILES = ("*token*.json", "chat_template*", "vocab*", "merges.txt", "*.model")


def hash_memory() -> Path:
    """Return the file in which hashes of large files are remembered."""
    return cache_folder() / "hashes.json"


def base_sha256(config: RunConfig, run: Path) -> str:
    """Return the hash of the configured backbone folder."""
    return hash_backbone(resolve_path(config.backbone.path, run), hash_memory())


def backbone_folder(config: RunConfig, run: Path, product: Path | None) -> Path:
    """Return the HF folder that a product's deltas are added to: its full backbone, or the base.

    Raises:
        DataError: if a file of the full backbone is missing or was changed.
    """
    full = None if product is None else read_manifest(product).backbone
    if product is None or full is None:
        return resolve_path(config.backbone.path, run)
    for entry in full.files:
        path = product / entry.file
        if not path.exists() or remembered_sha256(path, hash_memory()) != entry.sha256:
            raise DataError(f"{path} is missing, or was changed or damaged; restore it")
    return product / BACKBONE


def data_folders(config: RunConfig, run: Path, modality: str) -> list[Path]:
    """Return the shard folders of a modality; each holds `train` and `test`.

    For a URL it is the local folder that stands for it.
    """
    return [data_folder(text, run) for text in config.modalities[modality].data]


def product_key(config: RunConfig, run: Path, plan: Plan, step: Step) -> str:
    """Return the hash of everything that determines a step's product.

    Raises:
        InputError: as `product_inputs`.
    """
    return sha256_json(product_inputs(config, run, plan, step))


def product_inputs(config: RunConfig, run: Path, plan: Plan, step: Step) -> dict[str, Any]:
    """Return everything that determines a step's product.

    Raises:
        InputError: if weights, shards or the product that the step starts from are missing.
    """
    keys = {name: _finished_key(run, plan, step, name) for name in step_inputs(step)}
    start = keys[step.start] if step.start is not None else None
    facts: dict[str, Any] = {"kind": step.kind, "stage": step.stage, "start": start}
    if isinstance(step, MergeStep):
        facts["coefficient"] = step.coefficient
        if step.method != CMA:
            facts |= {"method": step.method, "options": dict(step.options)}
        if step.importance:
            facts["importance"] = [keys[name] for name in step.importance]
    elif isinstance(step, TrainStep):
        _refuse_changed_plugins(config, run / step.output, [part.modality for part in step.data])
        facts |= _training_facts(config, run, step)
        if step.penalty is not None:
            facts["penalty"] = [keys[step.penalty.source], step.penalty.strength]
    elif isinstance(step, FisherStep):
        facts |= _data_facts(config, run, step.data) | {"tasks": config.tune.tasks}
        facts |= {"lora": dump(config.lora), "previous": step.previous and keys[step.previous]}
        facts["decay"] = step.decay
    else:
        _refuse_changed_plugins(config, run / step.start, step.modalities)
    return facts


def used_plugins(config: RunConfig, modalities: Iterable[str]) -> dict[str, str]:
    """Return the plugins that some modalities' kinds come from: file name -> SHA-256."""
    entries = [config.modalities[name] for name in modalities]
    kinds = [(ENCODER, entry.encoder.kind) for entry in entries]
    return defining_plugins([*kinds, *((CONNECTOR, entry.connector.kind) for entry in entries)])


def _finished_key(run: Path, plan: Plan, step: Step, source: str) -> str:
    """Return the key of a product that a step needs."""
    if not (run / source / "manifest.json").exists():
        before = plan.producer(source).name
        raise InputError(
            f"{step.name} starts from {before}, which is not finished ({run / source} is "
            f"missing); run 'mera-ds run {run} --until {before}' first"
        )
    return read_manifest(run / source).key


def _refuse_changed_plugins(config: RunConfig, product: Path, modalities: Iterable[str]) -> None:
    """Say which file it is that a product's key differs by."""
    if not (product / "manifest.json").exists():
        return
    used = set(used_plugins(config, modalities).values())
    for name, sha256 in read_manifest(product).provenance.get("plugins", {}).items():
        if sha256 not in used:
            raise InputError(
                f"the run's plugin plugins/{name} was changed after {product} was made with it; "
                "restore it, or delete the folders of the stages that it made and learn them again"
            )


def _training_facts(config: RunConfig, run: Path, step: TrainStep) -> dict[str, Any]:
    facts = {
        "modality": step.modality,
        "phase": step.phase,
        "settings": _phase_facts(config.phase(step.phase)),
        "trainable": step.trainable,
        "lora": dump(config.lora) if LORA in step.trainable else None,
        **_data_facts(config, run, step.data),
    }
    if step.adapter != "new":
        facts["adapter"] = step.adapter
    if step.adapter == "woven":
        facts["pathweave"] = dump(config.pathweave)
    return facts


def _data_facts(config: RunConfig, run: Path, data: Sequence[DataPart]) -> dict[str, Any]:
    """Return what a loss depends on: the data, its prompts, the frozen parts and the seed."""
    return {
        "data": [asdict(part) for part in data],
        "seed": config.seed,
        "base": base_sha256(config, run),
        "tokenizer": _tokenizer_sha256(resolve_path(config.backbone.path, run)),
        "dtype": config.backbone.dtype,
        "prompt": dump(config.prompt),
        "components": {
            part.modality: _component_facts(config, run, part.modality) for part in data
        },
    }


def _phase_facts(phase: PhaseConfig) -> dict[str, Any]:
    """Return a phase's settings; those that came later are left out where they change nothing."""
    facts = dump(phase)
    if phase.texts_together == 1:
        del facts["texts_together"]
    if phase.optimizer == "adamw":
        del facts["optimizer"]
    return facts


def _tokenizer_sha256(backbone: Path) -> str:
    """Return the hash of the files that turn texts into tokens, the chat template among them."""
    files = {path for pattern in _TOKENIZER_FILES for path in backbone.glob(pattern)}
    return sha256_json(
        {path.name: remembered_sha256(path, hash_memory()) for path in sorted(files)}
    )


def _component_facts(config: RunConfig, run: Path, modality: str) -> dict[str, Any]:
    entry = config.modalities[modality]
    plugins = used_plugins(config, [modality])
    return {
        **({"plugins": sorted(plugins.values())} if plugins else {}),
        **({"feature_dtype": entry.feature_dtype} if entry.feature_dtype != "fp32" else {}),
        "encoder": _component(entry.encoder, run),
        "connector": _component(entry.connector, run),
        "caption_prompt": entry.caption_prompt,
        "lr_scale": entry.lr_scale,
        "shards": [
            read_index(folder / "train").fingerprint
            for folder in data_folders(config, run, modality)
        ],
    }


def _component(component: ComponentConfig, run: Path) -> Mapping[str, Any]:
    weights = None
    if component.weights is not None:
        weights = remembered_sha256(weights_path(component, run), hash_memory())
    return {"kind": component.kind, "options": dict(component.options), "weights": weights}


def weights_path(component: ComponentConfig, run: Path) -> Path:
    """Return the weight file (or folder) of an encoder or connector.

    Raises:
        InputError: if it is missing.
    """
    assert component.weights is not None
    path = resolve_path(component.weights, run)
    if not path.exists():
        raise InputError(
            f"the weights of '{component.kind}' are missing: {path}; for the profile 'pocket' run "
            "'mera-ds pocket fetch', otherwise correct the path in the run's profile"
        )
    return path
