"""What a step's product depends on, as one hash.

Two steps with equal keys make equal products, whichever run they belong to. So a finished step is
skipped, a product made from other data or settings is refused, and runs can share stages (an
expert of the first modality is the first stage of every method).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mera_ds.checkpoint import hash_backbone, read_manifest, remembered_sha256
from mera_ds.config import ComponentConfig, PhaseConfig, RunConfig, cache_folder, resolve_path
from mera_ds.errors import InputError
from mera_ds.files import sha256_json
from mera_ds.mergeconfig import CMA
from mera_ds.plan import LORA, MergeStep, Plan, Step, TrainStep
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


def data_folders(config: RunConfig, run: Path, modality: str) -> list[Path]:
    """Return the shard folders of a modality; each holds `train` and `test`.

    For a URL it is the local folder that stands for it.
    """
    return [data_folder(text, run) for text in config.modalities[modality].data]


def product_key(config: RunConfig, run: Path, plan: Plan, step: Step) -> str:
    """Return the hash of everything that determines a step's product.

    Raises:
        InputError: if weights, shards or the product that the step starts from are missing.
    """
    start = None
    if step.start is not None:
        if not (run / step.start / "manifest.json").exists():
            before = plan.producer(step.start).name
            raise InputError(
                f"{step.name} starts from {before}, which is not finished ({run / step.start} is "
                f"missing); run 'mera-ds run {run} --until {before}' first"
            )
        start = read_manifest(run / step.start).key
    facts: dict[str, Any] = {"kind": step.kind, "stage": step.stage, "start": start}
    if isinstance(step, MergeStep):
        facts["coefficient"] = step.coefficient
        if step.method != CMA:
            facts |= {"method": step.method, "options": dict(step.options)}
    elif isinstance(step, TrainStep):
        _refuse_changed_plugins(config, run / step.output, [part.modality for part in step.data])
        facts |= _training_facts(config, run, step)
    else:
        _refuse_changed_plugins(config, run / step.start, step.modalities)
    return sha256_json(facts)


def used_plugins(config: RunConfig, modalities: Iterable[str]) -> dict[str, str]:
    """Return the plugins that some modalities' kinds come from: file name -> SHA-256."""
    entries = [config.modalities[name] for name in modalities]
    kinds = [(ENCODER, entry.encoder.kind) for entry in entries]
    return defining_plugins([*kinds, *((CONNECTOR, entry.connector.kind) for entry in entries)])


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
    modalities = [part.modality for part in step.data]
    return {
        "modality": step.modality,
        "phase": step.phase,
        "settings": _phase_facts(config.phase(step.phase)),
        "trainable": step.trainable,
        "data": [asdict(part) for part in step.data],
        "seed": config.seed,
        "base": base_sha256(config, run),
        "tokenizer": _tokenizer_sha256(resolve_path(config.backbone.path, run)),
        "dtype": config.backbone.dtype,
        "prompt": dump(config.prompt),
        "lora": dump(config.lora) if LORA in step.trainable else None,
        "components": {name: _component_facts(config, run, name) for name in modalities},
    }


def _phase_facts(phase: PhaseConfig) -> dict[str, Any]:
    """Return a phase's settings; those of the usual optimizer are as before there were others."""
    facts = dump(phase)
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
