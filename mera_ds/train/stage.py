"""Carrying out one training step of a plan: product → model → data → loop → product."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mera_ds.batch import pad_features
from mera_ds.checkpoint import NewDelta, is_finished, write_product
from mera_ds.config import PhaseConfig, RunConfig, resolve_path
from mera_ds.data.dataset import TRAIN, ModalityData, UnitReader
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.data.replay import replay_sample
from mera_ds.distributed import World, main_rank_first, process_group
from mera_ds.features import ENCODE_BATCH, open_data
from mera_ds.files import write_json
from mera_ds.identity import base_sha256, product_inputs, product_key, used_plugins
from mera_ds.log import Metrics, logger
from mera_ds.merge.fisher import marginals_from_moments
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders, build_model, move_to
from mera_ds.model.connectors import Connector
from mera_ds.model.mllm import MultimodalLM
from mera_ds.model.trainable import set_trainable
from mera_ds.plan import LORA, DataPart, Plan, TrainStep, connector_set
from mera_ds.train.contract import check_token_counts
from mera_ds.train.engine import Engine
from mera_ds.train.inputs import keep_inputs
from mera_ds.train.loop import Phase, train_phase
from mera_ds.train.schedule import peak_rates
from mera_ds.train.state import remove_checkpoints

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
                remove_checkpoints(_checkpoint_folder(run, step))  # if a kill came in between
                logger.info("%s is finished", step.name)
            return
        _train(run, config, plan, step, key, world)


def _train(
    run: Path, config: RunConfig, plan: Plan, step: TrainStep, key: str, world: World
) -> None:
    start = run / step.start if step.start is not None else None
    modalities = [part.modality for part in step.data]
    settings = config.phase(step.phase)
    encoders = build_encoders(config, run, modalities)
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
    prompts = PromptBuilder(config.prompt, tokenizer, step.phase)
    mixture = {}
    fingerprints = {}
    for part in step.data:
        encoder = encoders[part.modality]
        data, reader = open_data(config, run, part.modality, TRAIN, encoder, prompts, world)
        mixture[part.modality] = _mixture_part(data, reader, part, settings.tasks, config.seed)
        fingerprints[part.modality] = data.fingerprint
    loader = StepLoader(mixture, _loader_settings(config, settings, world))
    lora_for = step.modality if LORA in step.trainable else None
    model = build_model(config, run, start, modalities, encoders, lora_for)
    move_to(model, encoders, world.device)
    if connector_set(step.modality) in step.trainable and step.phase == "align":
        fit_connector(model, mixture[step.modality], step.modality)
    check_token_counts(model, mixture, config.prompt.max_length)
    model.train()
    sets = set_trainable(model, step.trainable)
    folder = _checkpoint_folder(run, step)
    with main_rank_first(world) as mine:
        if mine:
            keep_inputs(folder, product_inputs(config, run, plan, step))
    engine = Engine(model, sets, settings, config.execution, config.backbone.dtype, world)
    rates = peak_rates(settings, step.trainable, _rate_scales(config))
    phase = Phase(step.name, settings, rates, folder, key, config.seed)
    try:
        with Metrics(run, world.is_main) as metrics:
            train_phase(engine, loader, phase, config.execution, world, metrics)
        trained = engine.parameters()
        moments = engine.mean_squared_gradients(LORA)
        buffers = connector_buffers(model)
    finally:
        engine.close()
    with main_rank_first(world) as mine:
        if mine:
            if any(part.percent < 100 for part in step.data):
                _store_replay_list(folder, config, step.data, mixture)
            _write(run, config, step, key, start, {**trained, **buffers}, moments, fingerprints)
            remove_checkpoints(folder)


def _checkpoint_folder(run: Path, step: TrainStep) -> Path:
    return run / Path(step.output).parent / step.phase


@torch.no_grad()
def fit_connector(model: MultimodalLM, part: MixturePart, modality: str) -> None:
    """Give a fresh connector the statistics of its training features (the first media's)."""
    connector = model.connectors[modality]
    assert isinstance(connector, Connector)
    if not connector.fits_data:
        return
    media = {(unit.reader, unit.medium): unit for unit in part.units}
    units = list(media.values())[:FIT_MEDIA]
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


def _mixture_part(
    data: ModalityData, reader: UnitReader, part: DataPart, tasks: Sequence[str], seed: int
) -> MixturePart:
    """Return a modality's units, all of them or the replay sample."""
    units = data.units(tasks)
    if part.percent < 100:
        kept = replay_sample(data.ids(units), data.tasks(units), part.percent, seed)
        units = units.take(kept)
    return MixturePart(reader, units, data.lengths(units), data.ids(units))


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
    delta = None
    if LORA in by_set:
        scale = config.lora.alpha / config.lora.rank
        delta = NewDelta(
            stage=step.stage,
            modality=step.modality,
            scale=scale,
            rank=config.lora.rank,
            tensors=by_set[LORA],
            fisher=marginals_from_moments(by_set[LORA], moments, scale),
        )
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
        connectors=connectors,
        delta=delta,
        provenance={
            "profile": config.profile,
            "seed": config.seed,
            "phase": step.phase,
            "data": dict(fingerprints),
            "plugins": used_plugins(config, fingerprints),
        },
    )
    logger.info("%s: model %s in %s", step.name, manifest.model_sha256[:12], run / step.output)
