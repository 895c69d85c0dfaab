"""Carrying out one training step of a plan: product → model → data → loop → product."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mera_ds.batch import pad_features
from mera_ds.checkpoint import BACKBONE as BACKBONE_FOLDER
from mera_ds.checkpoint import (
    DeltaEntry,
    FullStage,
    NewBackbone,
    NewDelta,
    is_finished,
    load_delta,
    read_manifest,
    require_tensors,
    write_product,
)
from mera_ds.config import PhaseConfig, RunConfig
from mera_ds.data.dataset import UnitRef
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.distributed import World, main_rank_first, process_group
from mera_ds.features import ENCODE_BATCH
from mera_ds.files import write_json
from mera_ds.identity import (
    backbone_folder,
    base_sha256,
    product_inputs,
    product_key,
    used_plugins,
)
from mera_ds.log import Metrics, logger
from mera_ds.manifest import backbone_identity
from mera_ds.merge.fisher import marginals_from_moments
from mera_ds.model.build import build_encoders, build_model, move_to
from mera_ds.model.compilation import compile_layers
from mera_ds.model.connectors import Connector
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.trainable import set_trainable
from mera_ds.plan import BACKBONE, LORA, DataPart, Plan, TrainStep, connector_set
from mera_ds.train.contract import check_token_counts
from mera_ds.train.engine import Engine
from mera_ds.train.full import write_backbone
from mera_ds.train.inputs import keep_inputs
from mera_ds.train.loop import Phase, train_phase
from mera_ds.train.mixture import open_mixture
from mera_ds.train.penalty import HeldFactors, load_importance
from mera_ds.train.schedule import peak_rates
from mera_ds.train.state import remove_checkpoints
from mera_ds.train.watch import Watch

FIT_MEDIA = 512
"""How many media give a fresh connector its statistics."""


def run_train_step(run: Path, config: RunConfig, plan: Plan, step: TrainStep, world: World) -> None:
    """Train one step of the plan and write its product; do nothing if it is finished.

    Args:
        run: the run's folder.
        config: the run's configuration.
        plan: the run's plan.
        step: which step.
        world: this process among the ranks that train.

    Raises:
        InputError: if an input is missing, or was changed since the product was made.
        Interrupted: after saving, on SIGTERM.
    """
    with process_group(world, config.execution.timeout_seconds):
        key = product_key(config, run, plan, step)
        if is_finished(run / step.output, key):
            if world.is_main:
                _clear(_checkpoint_folder(run, step))  # if a kill came in between
                logger.info("%s is finished", step.name)
            return
        with Watch(_checkpoint_folder(run, step), world, config.execution.timeout_seconds) as watch:
            _train(run, config, plan, step, key, world, watch)


def _train(
    run: Path,
    config: RunConfig,
    plan: Plan,
    step: TrainStep,
    key: str,
    world: World,
    watch: Watch,
) -> None:
    start = run / step.start if step.start is not None else None
    modalities = [part.modality for part in step.data]
    settings = config.phase(step.phase)
    encoders = build_encoders(config, run, modalities)
    mixture, fingerprints = open_mixture(run, config, step.data, step.phase, encoders, world)
    loader = StepLoader(mixture, _loader_settings(config, settings, world))
    lora_for = step.modality if LORA in step.trainable else None
    model = build_model(config, run, start, modalities, encoders, lora_for, step.adapter)
    move_to(model, encoders, world.device)
    if connector_set(step.modality) in step.trainable and step.phase == "align":
        fit_connector(model, mixture[step.modality], step.modality)
    check_token_counts(model, mixture, config.prompt.max_length)
    model.train()
    if config.execution.compile:
        compile_layers(model.llm)
    sets = set_trainable(model, step.trainable)
    folder = _checkpoint_folder(run, step)
    with main_rank_first(world) as mine:
        if mine:
            keep_inputs(folder, product_inputs(config, run, plan, step))
    held = _held_factors(run, step)
    engine = Engine(model, sets, settings, config.execution, config.backbone.dtype, world, held)
    rates = peak_rates(settings, step.trainable, _rate_scales(config))
    phase = Phase(step.name, settings, rates, folder, key, config.seed)
    try:
        with Metrics(run, world.is_main) as metrics:
            train_phase(engine, loader, phase, config.execution, world, metrics, watch)
        watch.mark(None, "writing the product")
        trained = engine.parameters(without=[BACKBONE])
        moments = engine.mean_squared_gradients(LORA)
        buffers = connector_buffers(model)
        if engine.is_large:
            source = backbone_folder(config, run, start)
            dtype = config.backbone.dtype
            write_backbone(engine, source, folder / BACKBONE_FOLDER, dtype, world)
    finally:
        engine.close()
    with main_rank_first(world) as mine:
        if mine:
            if any(part.percent < 100 for part in step.data):
                _store_replay_list(folder, config, step.data, mixture)
            trained = {**trained, **buffers}
            _write(run, config, step, key, start, trained, moments, fingerprints)
            _clear(folder)


def _clear(folder: Path) -> None:
    """Remove what a finished phase needs no more; its product links the tuned backbone."""
    remove_checkpoints(folder)
    shutil.rmtree(folder / BACKBONE_FOLDER, ignore_errors=True)


def _held_factors(run: Path, step: TrainStep) -> HeldFactors | None:
    """Return what holds the carried factors, if the step has a penalty."""
    if step.penalty is None or step.start is None:
        return None
    start = run / step.start
    anchor = load_delta(start, read_manifest(start).lineage[-1])
    importance = load_importance(run / step.penalty.source)
    require_tensors(importance, anchor, step.penalty.source)
    return HeldFactors(LORA, step.penalty.strength, importance, anchor)


def _checkpoint_folder(run: Path, step: TrainStep) -> Path:
    return run / Path(step.output).parent / step.phase


@torch.no_grad()
def fit_connector(model: MultimodalLM, part: MixturePart, modality: str) -> None:
    """Give a fresh connector the statistics of its training features (the first media's)."""
    connector = model.connectors[modality]
    assert isinstance(connector, Connector)
    if not connector.fits_data:
        return
    media: dict[tuple[int, int], UnitRef] = {}
    for unit in part.units:
        media.setdefault((unit.reader, unit.medium), unit)
        if len(media) == FIT_MEDIA:
            break
    units = list(media.values())
    rows: list[Tensor] = []
    for start in range(0, len(units), ENCODE_BATCH):
        samples = [part.reader.read(unit) for unit in units[start : start + ENCODE_BATCH]]
        features = model.encode(samples)
        rows += [row[real] for row, real in zip(features.values, features.mask, strict=True)]
    features = pad_features(rows).to(model.device, torch.float32)
    connector.fit(features.values, features.mask)


def connector_buffers(model: MultimodalLM) -> dict[str, Tensor]:
    """Return the connectors' fixed tensors under the names of their trainable sets."""
    return {
        f"{connector_set(modality)}/{name}": buffer.detach().float().cpu()
        for modality, connector in model.connectors.items()
        for name, buffer in connector.named_buffers()
        if name in connector.state_dict()
    }


def _rate_scales(config: RunConfig) -> dict[str, float]:
    return {connector_set(name): entry.lr_scale for name, entry in config.modalities.items()}


def _loader_settings(config: RunConfig, phase: PhaseConfig, world: World) -> LoaderSettings:
    return LoaderSettings(
        batch_size=phase.batch_size,
        epochs=phase.epochs,
        max_steps=phase.max_steps,
        seed=config.seed,
        rank=world.rank,
        world=world.size,
        micro_batch=config.execution.micro_batch_size,
        workers=config.execution.workers,
        texts_together=phase.texts_together,
    )


def _store_replay_list(
    folder: Path, config: RunConfig, parts: Sequence[DataPart], mixture: Mapping[str, MixturePart]
) -> None:
    """Write which units are replayed, as ids."""
    facts = {
        "schema": 1,
        "seed": config.seed,
        "percent": {part.modality: part.percent for part in parts},
        "ids": {modality: list(part.ids) for modality, part in mixture.items()},
    }
    write_json(folder / "replay.json", facts)


def _write(
    run: Path,
    config: RunConfig,
    step: TrainStep,
    key: str,
    start: Path | None,
    trained: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    fingerprints: Mapping[str, list[str]],
) -> None:
    """Write the product: the trained connectors, and the delta if LoRA trained."""
    by_set = {
        name: {
            entry.removeprefix(f"{name}/"): tensor
            for entry, tensor in trained.items()
            if entry.startswith(f"{name}/")
        }
        for name in step.trainable
    }
    delta, weave, backbone = None, None, None
    if BACKBONE in step.trainable:
        backbone = _tuned_backbone(run, config, step, start)
    if LORA in by_set:
        delta, weave = _adapter(config, step, by_set[LORA], moments)
    connectors = {
        modality: by_set[connector_set(modality)]
        for modality in config.modalities
        if connector_set(modality) in by_set
    }
    manifest = write_product(
        run / step.output,
        key=key,
        step=step.name,
        base_sha256=base_sha256(config, run),
        previous=start,
        lineage=_lineage_below(step, start),
        connectors=connectors,
        delta=delta,
        backbone=backbone,
        weave=weave,
        provenance={
            "profile": config.profile,
            "seed": config.seed,
            "phase": step.phase,
            "data": dict(fingerprints),
            "plugins": used_plugins(config, fingerprints),
        },
    )
    logger.info("%s: model %s in %s", step.name, manifest.model_sha256[:12], run / step.output)


def _tuned_backbone(
    run: Path, config: RunConfig, step: TrainStep, start: Path | None
) -> NewBackbone:
    """Return the backbone that was tuned as a whole, with its history."""
    before = None if start is None else read_manifest(start)
    bare = backbone_identity(base_sha256(config, run), ())
    newest = FullStage(
        stage=step.stage,
        modality=step.modality,
        coefficient="1",
        parent=bare if before is None else before.backbone_sha256,
    )
    older = before.backbone.stages if before is not None and before.backbone is not None else ()
    return NewBackbone(
        folder=_checkpoint_folder(run, step) / BACKBONE_FOLDER, stages=(*older, newest)
    )


def _adapter(
    config: RunConfig, step: TrainStep, trained: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> tuple[NewDelta, dict[str, Tensor] | None]:
    """Return the trained pairs as a delta and, if they are woven, what gates them."""
    scale = config.lora.alpha / config.lora.rank
    endings = (".lora_A", ".lora_B")
    pairs = {name: tensor for name, tensor in trained.items() if name.endswith(endings)}
    weave = {name: tensor for name, tensor in trained.items() if name not in pairs}
    delta = NewDelta(
        stage=step.stage,
        modality=step.modality,
        scale=scale,
        rank=config.lora.rank,
        tensors=pairs,
        fisher={} if weave else marginals_from_moments(pairs, moments, scale),
    )
    return delta, weave or None


def _lineage_below(step: TrainStep, start: Path | None) -> tuple[DeltaEntry, ...] | None:
    """Return what the new delta stands on: all before it, but for one that was carried on."""
    if step.adapter != "carried" or start is None:
        return None
    return read_manifest(start).lineage[:-1]
