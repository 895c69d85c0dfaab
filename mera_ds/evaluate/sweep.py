"""Trying ways of merging on a small validation set, without writing a weight.

One backbone is loaded; for every candidate its linear layers are set to base + update in memory.
The validation set is a seeded sample of the *training* shards, without the units of the replay
list, so the connectors have not been realigned on it; the test sets are not touched. What is
measured is the mean loss per supervised token, modality by modality.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mera_ds.checkpoint import load_connector
from mera_ds.config import RunConfig, resolve_path
from mera_ds.data.dataset import TRAIN, ModalityData, UnitRef
from mera_ds.data.prompts import PromptBuilder
from mera_ds.data.replay import replay_sample
from mera_ds.deltas import add_products
from mera_ds.distributed import World
from mera_ds.errors import InputError
from mera_ds.evaluate.loss import mean_loss, read_batches
from mera_ds.evaluate.pareto import Point
from mera_ds.features import open_data
from mera_ds.identity import base_sha256
from mera_ds.log import logger
from mera_ds.manifest import Manifest, check_lineage
from mera_ds.merge.export import Update, lineage_update, method_update
from mera_ds.merge.lineage import reweighted
from mera_ds.merge.methods import Method
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders, build_model, move_to
from mera_ds.model.lora import linear_layers
from mera_ds.model.mllm import MultimodalLM
from mera_ds.registry import load_plugins
from mera_ds.shards.format import TASKS


@dataclass(frozen=True)
class Candidate:
    """A way of merging: coefficients by modality, or a method for all stages."""

    name: str
    arguments: str | None
    change: Mapping[str, str] | Method


@torch.no_grad()
def sweep(
    run: Path,
    config: RunConfig,
    product: Path,
    manifest: Manifest,
    candidates: Sequence[Candidate],
    samples: int,
    world: World,
) -> list[Point]:
    """Return the losses of every candidate, on the product's connectors.

    Args:
        run: the run's folder.
        config: its configuration.
        product: the model whose deltas and connectors are tried.
        manifest: its manifest.
        candidates: what to try.
        samples: texts per modality.
        world: this process, alone.

    Raises:
        InputError: if the model has fewer than two stages or belongs to another base.
    """
    if len(manifest.lineage) < 2:
        raise InputError(f"{product} has one stage only; there is no old against new yet")
    check_lineage(product, manifest, base_sha256(config, run))
    load_plugins(config, run)
    modalities = [entry.modality for entry in manifest.lineage]
    encoders = build_encoders(config, run, modalities)
    model = build_model(config, run, None, modalities, encoders)
    for modality in modalities:
        tensors = load_connector(product, manifest, modality)
        model.connectors[modality].load_state_dict(tensors)
    prompts = PromptBuilder(config.prompt, load_tokenizer(resolve_path(config.backbone.path, run)))
    batches = {}
    for modality in modalities:
        data, reader = open_data(config, run, modality, TRAIN, encoders[modality], prompts, world)
        units = validation_units(data, config, samples)
        batches[modality] = read_batches(reader, units, config.execution.micro_batch_size)
    move_to(model, encoders, world.device)
    model.eval()
    base = {name: layer.weight.detach().cpu() for name, layer in linear_layers(model.llm).items()}
    base = {name: weight.clone() for name, weight in base.items()}
    points = []
    for candidate in candidates:
        _set_weights(model, base, _update(product, manifest, candidate))
        losses = {name: mean_loss(model, batches[name]) for name in modalities}
        points.append(Point(candidate.name, candidate.arguments, losses))
        logger.info("%s: old %.4f, new %.4f", candidate.name, points[-1].old, points[-1].new)
    return points


def validation_units(data: ModalityData, config: RunConfig, count: int) -> list[UnitRef]:
    """Return about `count` training units of a modality that are not on its replay list.

    Each task gives its share. Where everything is replayed, they are drawn from all units.
    """
    units = data.units(TASKS)
    ids = [data.unit_id(unit) for unit in units]
    tasks = [data.task(unit) for unit in units]
    most = max(config.replay.percent, config.replay.realigning)
    replayed = set(replay_sample(ids, tasks, most, config.seed))
    free = [place for place in range(len(units)) if place not in replayed] or [*range(len(units))]
    share = min(100.0, 100 * count / len(free))
    # Another seed than that of the replay list, whose draws these are what is left of.
    kept = replay_sample(
        [ids[place] for place in free], [tasks[place] for place in free], share, config.seed + 1
    )
    return [units[free[place]] for place in kept]


def _update(product: Path, manifest: Manifest, candidate: Candidate) -> tuple[list[str], Update]:
    if isinstance(candidate.change, Method):
        return method_update(product, manifest, candidate.change)
    lineage = reweighted(manifest, candidate.change)
    return lineage_update(product, dataclasses.replace(manifest, lineage=lineage))


def _set_weights(
    model: MultimodalLM, base: Mapping[str, Tensor], update: tuple[list[str], Update]
) -> None:
    layers, added = update
    for name, layer in linear_layers(model.llm).items():
        weight = base[name]
        if name in layers:
            found = added(name)
            if isinstance(found, Tensor):
                weight = weight.float() + found
            else:
                weight = add_products(weight, found)
        layer.weight.copy_(weight)
