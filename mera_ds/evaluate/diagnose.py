"""Forgetting or misalignment? Where an old modality's loss comes from (paper, section 3).

For every stage i and every modality j learnt until then, the mean loss per supervised token on
texts of its test set, or what is lost of its scores there (see `measures`), with

    (a) the backbone of stage i and the connector as stage j left it,
    (b) the backbone of stage i and the connector that is in its model, realigned or not,
    (c) the backbone and the connector of stage j.

Then a − c is what learning the later modalities has cost, a − b what realigning the connector has
won back (misalignment) and b − c what it has not (forgetting). Beside it stands how far the
backbone has drifted since stage j, layer by layer: the relative norm of the change of its linear
layers, and the cosine of its hidden states with those of (c), both with the old connector.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mera_ds.batch import Batch
from mera_ds.checkpoint import Manifest, load_connector, read_manifest
from mera_ds.config import RunConfig, resolve_path
from mera_ds.data.dataset import TEST, ModalityData, UnitReader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.data.replay import replay_sample
from mera_ds.deltas import WeightedDelta, add_products, weighted_deltas
from mera_ds.distributed import World
from mera_ds.evaluate.findings import Finding, StageModel
from mera_ds.evaluate.loss import read_batches
from mera_ds.evaluate.measures import Loss, Measure, Opened, ScoreLost
from mera_ds.features import open_data
from mera_ds.log import logger
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders, build_model, move_to
from mera_ds.model.lora import linear_layers
from mera_ds.model.mllm import MultimodalLM
from mera_ds.shards.format import TASKS

STATE_SAMPLES = 4
"""Of so many texts per modality the hidden states are compared."""


@torch.no_grad()
def diagnose(
    run: Path,
    config: RunConfig,
    stages: Sequence[StageModel],
    samples: int,
    world: World,
    scores: bool = False,
) -> list[Finding]:
    """Return a finding for every stage and modality learnt until then, its own included.

    Args:
        run: the run's folder.
        config: its configuration.
        stages: the finished stages, from the first.
        samples: texts per modality.
        world: this process, alone.
        scores: whether scores are compared instead of losses.

    Raises:
        InputError: if scores are compared and a modality had none above 0 when it was learnt.
    """
    tests = _open_tests(run, config, [stage.modality for stage in stages], world)
    batches = {name: _batches(config, *test, samples) for name, test in tests.items()}
    measure: Measure = ScoreLost(run, config, tests, world) if scores else Loss(batches)
    learnt: dict[str, tuple[float, Tensor]] = {}
    findings = []
    for number, stage in enumerate(stages, start=1):
        modalities = [entry.modality for entry in stages[:number]]
        encoders = build_encoders(config, run, modalities)
        model = build_model(config, run, stage.product, modalities, encoders)
        move_to(model, encoders, world.device)
        model.eval()
        for place, old in enumerate(stages[:number], start=1):
            name = old.modality
            _set_connector(model, old.product, name)
            before = measure(model, name, stage.product, old.product)
            states = _states(model, batches[name])
            when, at_first = learnt.setdefault(name, (before, states))
            newest = before
            if _connector_sha256(stage.realigned, name) != _connector_sha256(old.product, name):
                _set_connector(model, stage.realigned, name)
                newest = measure(model, name, stage.product, stage.realigned)
            findings.append(
                Finding(
                    stage=number,
                    learnt_at=place,
                    modality=name,
                    old_connector=before,
                    newest_connector=newest,
                    when_learnt=when,
                    weight_drift=weight_drift(model, old.product, stage.product),
                    cosines=tuple(_cosine(a, b) for a, b in zip(states, at_first, strict=True)),
                )
            )
            logger.info("stage %d, %s: %.3f, %.3f, %.3f", number, name, before, newest, when)
    return findings


def _open_tests(
    run: Path, config: RunConfig, modalities: Sequence[str], world: World
) -> dict[str, Opened]:
    encoders = build_encoders(config, run, modalities)
    prompts = PromptBuilder(config.prompt, load_tokenizer(resolve_path(config.backbone.path, run)))
    return {
        name: open_data(config, run, name, TEST, encoders[name], prompts, world)
        for name in modalities
    }


def _batches(
    config: RunConfig, data: ModalityData, reader: UnitReader, samples: int
) -> list[Batch]:
    """Return some texts of a test set, each task with its share."""
    units = data.units(TASKS)
    percent = min(100.0, 100 * samples / len(units))
    kept = replay_sample(data.ids(units), data.tasks(units), percent, config.seed)
    return read_batches(reader, units.take(kept), config.execution.micro_batch_size)


def _set_connector(model: MultimodalLM, product: Path, modality: str) -> None:
    tensors = load_connector(product, read_manifest(product), modality)
    model.connectors[modality].load_state_dict(tensors)


def _connector_sha256(product: Path, modality: str) -> str:
    return read_manifest(product).connectors[modality].sha256


def _states(model: MultimodalLM, batches: Sequence[Batch]) -> Tensor:
    """Return the hidden states behind each block (blocks, R, D) at all positions of some texts."""
    samples = batches[0].samples[:STATE_SAMPLES]
    return model.block_states(Batch(samples, (True,) * len(samples))).cpu()


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(functional.cosine_similarity(a.float(), b.float(), dim=-1).mean())


def weight_drift(model: MultimodalLM, old: Path, new: Path) -> tuple[float, ...]:
    """Return ‖W_new − W_old‖ / ‖W_new‖ of each block's linear layers.

    Nothing where the backbones don't differ by deltas that add up: woven or fully tuned ones.

    Args:
        model: with the new backbone.
        old: product of the old one.
        new: product of the new one.
    """
    manifests = read_manifest(old), read_manifest(new)
    if any(entry.weave is not None or entry.backbone is not None for entry in manifests):
        return ()
    deltas = _difference(zip((old, new), manifests, (-1.0, 1.0), strict=True))
    names = {id(layer): name for name, layer in linear_layers(model.llm).items()}
    drifts = []
    for block in model.blocks:
        changed, whole = 0.0, 0.0
        for layer in block.modules():
            if not isinstance(layer, nn.Linear) or id(layer) not in names:
                continue
            terms = _terms(deltas, names[id(layer)], layer.weight.device)
            change = add_products(torch.zeros_like(layer.weight, dtype=torch.float32), terms)
            changed += float(change.square().sum())
            whole += float(layer.weight.float().square().sum())
        drifts.append((changed / whole) ** 0.5)
    return tuple(drifts)


def _difference(
    sides: Iterable[tuple[Path, Manifest, float]],
) -> list[tuple[float, WeightedDelta]]:
    """Return the deltas of the products, each with the sign of its product."""
    return [
        (sign, delta) for path, manifest, sign in sides for delta in weighted_deltas(path, manifest)
    ]


def _terms(
    deltas: Sequence[tuple[float, WeightedDelta]], layer: str, device: torch.device
) -> list[tuple[float, Tensor, Tensor]]:
    def factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
        return tensors[f"{layer}.{name}"].to(device)

    return [
        (
            sign * delta.weight_of(layer),
            factor(delta.tensors, "lora_B"),
            factor(delta.tensors, "lora_A"),
        )
        for sign, delta in deltas
        if f"{layer}.lora_A" in delta.tensors
    ]
