"""Building a model from a configuration and a product."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mera_ds.checkpoint import (
    Manifest,
    check_lineage,
    load_connector,
    read_manifest,
    require_tensors,
)
from mera_ds.config import RunConfig, resolve_path
from mera_ds.identity import base_sha256, weights_path
from mera_ds.model.adapter import attach_adapter, restore_backbone
from mera_ds.model.backbone import load_backbone
from mera_ds.model.connectors import Connector, build_connector
from mera_ds.model.encoders import Encoder, build_encoder
from mera_ds.model.mllm import MultimodalLM
from mera_ds.plan import Adapter


def seed_everything(*facts: object) -> None:
    """Seed torch from some facts: equal facts, equal random numbers, whatever came before."""
    digest = hashlib.sha256("/".join(map(str, facts)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def build_encoders(config: RunConfig, run: Path, modalities: Sequence[str]) -> dict[str, Encoder]:
    """Build the frozen encoders of some modalities."""
    encoders = {}
    for modality in modalities:
        component = config.modalities[modality].encoder
        weights = weights_path(component, run) if component.weights is not None else None
        encoders[modality] = build_encoder(component.kind, component.options, weights)
    return encoders


def build_model(
    config: RunConfig,
    run: Path,
    product: Path | None,
    modalities: Sequence[str],
    encoders: Mapping[str, Encoder],
    lora_for: str | None = None,
    adapter: Adapter = "new",
) -> MultimodalLM:
    """Build backbone and connectors with the weights of a product.

    Args:
        config: the run's configuration.
        run: the run's folder.
        product: the model to start from; None: the bare backbone.
        modalities: which connectors the model has, in this order; those that the product lacks
            get fresh weights.
        encoders: at least those of `modalities`.
        lora_for: attach LoRA factors to the backbone for learning this modality; None: nothing of
            it trains.
        adapter: which ones.

    Raises:
        InputError: if the product belongs to another backbone, or its adapters can't go on so.
        DataError: if a file does not fit.
    """
    llm = load_backbone(config.backbone, resolve_path(config.backbone.path, run))
    manifest = None
    if product is not None:
        manifest = read_manifest(product)
        check_lineage(product, manifest, base_sha256(config, run))
    if lora_for is not None:
        seed_everything(config.seed, "lora", lora_for)
        attach_adapter(llm, product, manifest, config, adapter)
    elif product is not None and manifest is not None:
        restore_backbone(llm, product, manifest)
    embedding: Any = llm.get_input_embeddings()
    width = int(embedding.embedding_dim)
    connectors = {
        modality: _connector(config, run, product, manifest, modality, encoders[modality], width)
        for modality in modalities
    }
    return MultimodalLM(llm, connectors, encoders, config.prompt.max_length)


def _connector(
    config: RunConfig,
    run: Path,
    product: Path | None,
    manifest: Manifest | None,
    modality: str,
    encoder: Encoder,
    width: int,
) -> Connector:
    component = config.modalities[modality].connector
    weights = weights_path(component, run) if component.weights is not None else None
    seed_everything(config.seed, "connector", modality)
    connector = build_connector(
        component.kind, component.options, encoder.feature_dim, width, weights
    )
    if product is not None and manifest is not None and modality in manifest.connectors:
        found = load_connector(product, manifest, modality)
        require_tensors(found, connector.state_dict(), f"{product}: connector of {modality}")
        connector.load_state_dict(found)
    return connector


def move_to(model: nn.Module, encoders: Mapping[str, Encoder], device: str) -> None:
    """Move a model and its encoders to a device."""
    model.to(device)
    for encoder in encoders.values():
        encoder.to(device)
