"""The training data of a step: shares of modalities, whole or as replay samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mera_ds.config import RunConfig, resolve_path
from mera_ds.data.dataset import TRAIN, ModalityData, UnitReader
from mera_ds.data.loader import MixturePart
from mera_ds.data.prompts import PromptBuilder
from mera_ds.data.replay import replay_sample
from mera_ds.distributed import World
from mera_ds.features import open_data
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.encoders import Encoder
from mera_ds.plan import DataPart


def open_mixture(
    run: Path,
    config: RunConfig,
    parts: Sequence[DataPart],
    phase: str,
    encoders: Mapping[str, Encoder],
    world: World,
) -> tuple[dict[str, MixturePart], dict[str, list[str]]]:
    """Return the data of some modalities, and the fingerprints of their shard sets.

    Args:
        run: the run's folder.
        config: the run's configuration.
        parts: which shares of which modalities.
        phase: whose tasks and prompts are taken.
        encoders: at least those of the modalities.
        world: this process among the ranks; every one must call it.
    """
    tokenizer = load_tokenizer(resolve_path(config.backbone.path, run))
    prompts = PromptBuilder(config.prompt, tokenizer, phase)
    tasks = config.phase(phase).tasks
    mixture, fingerprints = {}, {}
    for part in parts:
        encoder = encoders[part.modality]
        data, reader = open_data(config, run, part.modality, TRAIN, encoder, prompts, world)
        mixture[part.modality] = _mixture_part(data, reader, part, tasks, config.seed)
        fingerprints[part.modality] = data.fingerprint
    return mixture, fingerprints


def _mixture_part(
    data: ModalityData, reader: UnitReader, part: DataPart, tasks: Sequence[str], seed: int
) -> MixturePart:
    """Return a modality's units, all of them or the replay sample."""
    units = data.units(tasks)
    if part.percent < 100:
        kept = replay_sample(data.ids(units), data.tasks(units), part.percent, seed)
        units = units.take(kept)
    return MixturePart(reader, units, data.lengths(units), data.ids(units))
