"""Adding a modality to a run: read its file, try it on one sample, extend configuration and plan.

Nothing that the run has made depends on what is added: products are known by what they were made
from, so the earlier stages stay finished and the new one is learned on top of them.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from mera_ds.batch import Features
from mera_ds.config import (
    ComponentConfig,
    ModalityConfig,
    RunConfig,
    load_config,
    resolve_path,
    save_config,
)
from mera_ds.data.dataset import TEST, TRAIN, ModalityData, UnitReader, UnitRef
from mera_ds.data.prompts import PromptBuilder
from mera_ds.errors import InputError
from mera_ds.files import failpoint, folder_lock, remove_temporaries
from mera_ds.identity import data_folders, weights_path
from mera_ds.media import DECODERS
from mera_ds.methods import make_plan
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders
from mera_ds.model.connectors import CONNECTORS, Connector, build_connector
from mera_ds.model.encoders import ENCODERS, Encoder
from mera_ds.plan import Plan, load_plan, save_plan
from mera_ds.registry import copy_plugins, find_plugins, keep_plugins, load_plugins, plugin_errors
from mera_ds.settings import parse, read_yaml, require_known
from mera_ds.shards.remote import is_url

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")


@dataclass(frozen=True, kw_only=True)
class ModalityFile(ModalityConfig):
    """What the file of a modality holds; its relative paths start from the file's folder."""

    modality: str
    """Its name; the shard sets must have it, too."""
    plugins: tuple[str, ...] = ()
    """Python files with kinds of one's own."""

    def __post_init__(self) -> None:
        """Check the name: it becomes part of file and tensor names."""
        if not _NAME.fullmatch(self.modality):
            raise InputError(
                f"modality is {self.modality!r}; it must be made of a-z 0-9 _ - and start with a "
                "letter"
            )


def add_modality(run: Path, file: Path) -> RunConfig:
    """Make a modality the last of a run's order, and return the run's new configuration.

    Raises:
        InputError: if the run learns it already, or the file, a kind, an option, a shard set or
            the number of tokens is wrong; the run is as it was then.
        DataError: if a shard set is damaged, or a medium can't be decoded.
        LockedError: if somebody works on the run.
    """
    config = load_config(run)
    load_plugins(config, run)
    added = parse(ModalityFile, read_yaml(file), str(file))
    if added.modality in config.order:
        raise InputError(f"{run} learns {added.modality} already: {' → '.join(config.order)}")
    plugins = find_plugins(added.plugins, file.parent, run)
    config = dataclasses.replace(
        config,
        order=(*config.order, added.modality),
        modalities={**config.modalities, added.modality: _entry(added, file.parent)},
        plugins=keep_plugins(plugins, run, config.plugins),
    )
    plan = _longer_plan(config, run)
    check_kinds(config, [added.modality])
    try_modality(config, run, added.modality)
    with folder_lock(run):
        remove_temporaries(run)
        copy_plugins(plugins, run)
        save_plan(plan, run / "plan.json")
        failpoint("add.plan_written")  # a run in this state is refused, and adding again repairs it
        save_config(config, run / "config.yaml")
    return config


def _entry(added: ModalityFile, base: Path) -> ModalityConfig:
    """Return the modality's configuration with paths that hold from everywhere."""
    names = [entry.name for entry in dataclasses.fields(ModalityConfig)]
    entry = ModalityConfig(**{name: getattr(added, name) for name in names})
    return dataclasses.replace(
        entry,
        data=tuple(_absolute(text, base) for text in entry.data),
        encoder=_with_absolute_weights(entry.encoder, base),
        connector=_with_absolute_weights(entry.connector, base),
    )


def _with_absolute_weights(component: ComponentConfig, base: Path) -> ComponentConfig:
    if component.weights is None:
        return component
    return dataclasses.replace(component, weights=_absolute(component.weights, base))


def _absolute(text: str, base: Path) -> str:
    if text.startswith(("{", "~", "/")) or is_url(text):
        return text
    folder = str(base.resolve()).replace("{", "{{").replace("}", "}}")
    return f"{folder}/{text}"


def _longer_plan(config: RunConfig, run: Path) -> Plan:
    """Return the plan for the longer order; it must begin with the steps that the run has."""
    plan = make_plan(config)
    old = load_plan(run / "plan.json").steps
    if plan.steps[: len(old)] != old:
        raise InputError(
            f"{run / 'plan.json'} is not the plan of the method '{config.method}' for this order; "
            "make a new run with 'mera-ds init'"
        )
    return plan


def check_kinds(config: RunConfig, modalities: Iterable[str]) -> None:
    """Refuse an unknown encoder, connector or option now, not when its stage comes."""
    for name in modalities:
        encoder, connector = config.modalities[name].encoder, config.modalities[name].connector
        where = f"modalities.{name}"
        require_known(encoder.kind, ENCODERS, f"{where}.encoder: kind")
        parse(ENCODERS[encoder.kind].Options, encoder.options, f"{where}.encoder.options")
        media = ENCODERS[encoder.kind].media
        require_known(media, DECODERS, f"{where}.encoder: '{encoder.kind}' takes media whose kind")
        require_known(connector.kind, CONNECTORS, f"{where}.connector: kind")
        parse(CONNECTORS[connector.kind].Options, connector.options, f"{where}.connector.options")


def try_modality(config: RunConfig, run: Path, modality: str) -> None:
    """Take one sample, that with the longest text, through decoder, encoder and connector.

    Raises:
        InputError: if the shards have no text for a phase, a shape is not what the classes
            promise, a plugin's code fails, or the row is longer than `prompt.max_length`.
        DataError: if a shard set is damaged, or the medium can't be decoded.
    """
    folders = data_folders(config, run, modality)
    ModalityData(modality, folders, TEST)
    data = ModalityData(modality, folders, TRAIN)
    for phase in ("align", "tune"):
        tasks = config.phase(phase).tasks
        if not data.units(tasks):
            raise InputError(f"{modality}: its training shards have no {' and no '.join(tasks)}")
    unit = max(data.units(config.tune.tasks), key=data.length)
    with plugin_errors(f"{data.unit_id(unit)} can't be encoded"):
        encoder = build_encoders(config, run, [modality])[modality]
        features = _encode(encoder, data, unit)
        connector, width = _connector(config, run, modality, encoder)
        _check_connector(connector, features, width)
        tokens = connector.num_tokens(encoder.max_tokens)
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
    prompts = PromptBuilder(config.prompt, tokenizer)
    settings = config.modalities[modality]
    reader = UnitReader(data, settings, prompts, lambda _: features.values[0], encoded=True)
    sample = reader.read(unit)
    text = len(sample.prefix_ids) + len(sample.suffix_ids) + len(sample.answer_ids)
    if tokens + text > config.prompt.max_length:
        raise InputError(
            f"{sample.id} would be {tokens} + {text} tokens long, medium and text, more than "
            f"prompt.max_length={config.prompt.max_length}; let encoder or connector give fewer"
        )


def _encode(encoder: Encoder, data: ModalityData, unit: UnitRef) -> Features:
    """Encode one medium twice, and check what an encoder promises."""
    inputs = [encoder.transform(data.medium(unit, encoder.media)) for _ in range(2)]
    features = encoder(inputs)
    values, mask = features.values, features.mask
    _require_shape(
        f"encoder '{encoder.kind}': forward gave values",
        tuple(values.shape),
        (2, values.shape[1] if values.ndim == 3 else encoder.max_tokens, encoder.feature_dim),
    )
    _require_shape(f"encoder '{encoder.kind}': its mask", tuple(mask.shape), values.shape[:2])
    if values.shape[1] > encoder.max_tokens:
        raise InputError(
            f"encoder '{encoder.kind}' gave {values.shape[1]} tokens, more than its "
            f"max_tokens={encoder.max_tokens}"
        )
    if values.dtype != torch.float32 or mask.dtype != torch.bool or not mask.any(dim=1).all():
        raise InputError(
            f"encoder '{encoder.kind}': values must be fp32 ({values.dtype}), and the mask bool "
            f"({mask.dtype}) with a real token for every medium"
        )
    if not torch.isfinite(values).all() or not torch.equal(values[0], values[1]):
        raise InputError(
            f"encoder '{encoder.kind}' gave values that are not finite, or not the same twice"
        )
    if any(weight.requires_grad for weight in encoder.parameters()):
        raise InputError(f"encoder '{encoder.kind}' isn't frozen; end __init__ with self.freeze()")
    return features


def _connector(
    config: RunConfig, run: Path, modality: str, encoder: Encoder
) -> tuple[Connector, int]:
    """Return a fresh connector, and the width of the language model."""
    backbone = resolve_path(config.backbone.path, run)
    width = int(AutoConfig.from_pretrained(backbone, local_files_only=True).hidden_size)
    component = config.modalities[modality].connector
    weights = weights_path(component, run) if component.weights is not None else None
    options = component.options
    connector = build_connector(component.kind, options, encoder.feature_dim, width, weights)
    return connector, width


@torch.no_grad()
def _check_connector(connector: Connector, features: Features, width: int) -> None:
    connector.fit(features.values, features.mask)
    count = connector.num_tokens(features.values.shape[1])
    found = connector(features.values, features.mask).shape
    _require_shape("the connector gave tokens", tuple(found), (2, count, width))
    mask = connector.token_mask(features.mask).shape
    _require_shape("the connector's token_mask", tuple(mask), (2, count))


def _require_shape(what: str, found: Iterable[int], expected: Iterable[int]) -> None:
    if tuple(found) != tuple(expected):
        raise InputError(f"{what} of shape {tuple(found)} for 2 media; expected {tuple(expected)}")
