"""The loader: the same steps for any number of ranks and workers, from any step on."""

import dataclasses
import os
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mera_ds.batch import Batch, Sample
from mera_ds.config import load_config
from mera_ds.data.dataset import TRAIN, MediaCache, ModalityData, UnitReader, UnitRef
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader, _pack
from mera_ds.data.prompts import PromptBuilder
from mera_ds.errors import DataError, InputError, RankError
from mera_ds.identity import data_folders
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.build import build_encoders
from mera_ds.model.encoders import Encoder

Mixture = dict[str, MixturePart]
MODALITIES = ("image", "audio")
SETTINGS = LoaderSettings(
    batch_size=14, epochs=2, max_steps=None, seed=0, rank=0, world=1, micro_batch=4, workers=0
)


@pytest.fixture(scope="module")
def mixture(make_tiny_run: Callable[..., Path]) -> Mixture:
    """Return all captions and questions of the images, and the captions of the sounds."""
    run = make_tiny_run()
    config = load_config(run)
    encoders = build_encoders(config, run, MODALITIES)
    prompts = PromptBuilder(config.prompt, load_tokenizer(run / "backbone"))
    parts = {}
    for modality, tasks in zip(MODALITIES, (("caption", "qa"), ("caption",)), strict=True):
        data = ModalityData(modality, data_folders(config, run, modality), TRAIN)
        load = cache(partial(transformed, data, encoders[modality]))
        reader = UnitReader(data, config.modalities[modality], prompts, load, encoded=False)
        units = data.units(tasks)
        parts[modality] = MixturePart(
            reader, units, list(map(data.length, units)), list(map(data.unit_id, units))
        )
    return parts


def transformed(data: ModalityData, encoder: Encoder, unit: UnitRef) -> Tensor:
    return encoder.transform(data.medium(unit, encoder.media))


def loader(mixture: Mixture, **settings: Any) -> StepLoader:
    return StepLoader(mixture, dataclasses.replace(SETTINGS, **settings))


def counted(batches: list[Batch]) -> list[str]:
    """Return the ids of the samples that count."""
    return [
        sample.id
        for batch in batches
        for sample, counts in zip(batch.samples, batch.counted, strict=True)
        if counts
    ]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """Compare batches down to their tensors."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.counted == other.counted
        for a, b in zip(one.samples, other.samples, strict=True):
            assert dataclasses.replace(a, media=b.media) == b
            assert torch.equal(a.media, b.media)


def test_an_epoch_gives_every_unit_exactly_once(mixture: Mixture) -> None:
    steps = loader(mixture, epochs=1)
    found = [name for step in range(len(steps)) for name in counted(steps[step])]
    assert sorted(found) == sorted(name for part in mixture.values() for name in part.ids)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_takes_the_same_global_batches(mixture: Mixture, world: int) -> None:
    alone = loader(mixture)
    ranks = [loader(mixture, rank=rank, world=world) for rank in range(world)]
    assert {entry.total_steps for entry in ranks} == {alone.total_steps}
    assert {entry.order_hash() for entry in ranks} == {alone.order_hash()}
    for step in (0, 1, alone.total_steps // 2, alone.total_steps - 1):
        shares = [entry[step] for entry in ranks]
        together = [name for share in shares for name in counted(share)]
        assert sorted(together) == sorted(counted(alone[step])) == sorted(alone.sample_ids(step))
        kinds = [[batch.modality for batch in share] for share in shares]
        assert all(kind == kinds[0] for kind in kinds)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(mixture: Mixture, workers: int) -> None:
    alone = list(loader(mixture, max_steps=5).batches(0))
    helped = list(loader(mixture, max_steps=5, workers=workers).batches(0))
    assert [step for step, _ in helped] == [step for step, _ in alone] == list(range(5))
    for (_, found), (_, expected) in zip(helped, alone, strict=True):
        assert_same(found, expected)


def test_resuming_gives_the_rest(mixture: Mixture) -> None:
    whole = dict(loader(mixture).batches(0))
    for start in (0, 1, len(whole) // 2, len(whole) // 2 + 1, len(whole) - 1, len(whole)):
        rest = dict(loader(mixture).batches(start))
        assert list(rest) == list(range(start, len(whole)))
        for step, batches in rest.items():
            assert counted(batches) == counted(whole[step])


def test_resuming_with_other_ranks_takes_up_the_same_global_batches(mixture: Mixture) -> None:
    alone = loader(mixture)
    starts = [dict(loader(mixture, rank=rank, world=2).batches(9)) for rank in range(2)]
    for step in starts[0]:
        together = counted(starts[0][step]) + counted(starts[1][step])
        assert sorted(together) == sorted(alone.sample_ids(step))


def test_every_epoch_has_another_order(mixture: Mixture) -> None:
    both = loader(mixture)
    half = both.total_steps // 2
    first, second = (
        [name for step in range(half) for name in both.sample_ids(start + step)]
        for start in (0, half)
    )
    assert first != second
    assert sorted(first) == sorted(second)


def test_its_length_is_known_beforehand(mixture: Mixture) -> None:
    units = sum(len(part.units) for part in mixture.values())
    assert units % 14
    assert loader(mixture).total_steps == 2 * (units // 14 + 1)
    assert loader(mixture, max_steps=7).total_steps == 7
    assert loader(mixture, epochs=1, max_steps=10_000).total_steps == units // 14 + 1
    assert len(loader(mixture, max_steps=3)) == 3


def test_the_hash_names_the_order(mixture: Mixture) -> None:
    hashes = {
        loader(mixture).order_hash(),
        loader(mixture, seed=1).order_hash(),
        loader(mixture, batch_size=10).order_hash(),
        loader({"image": mixture["image"]}).order_hash(),
    }
    assert len(hashes) == 4
    assert loader(mixture, micro_batch=1, workers=2, max_steps=3).order_hash() in hashes


def test_a_sample_keeps_its_id_and_modality(mixture: Mixture) -> None:
    for batch in loader(mixture)[0]:
        for sample in batch.samples:
            assert sample.modality == batch.modality
            assert sample.id in mixture[batch.modality].ids


def test_data_without_a_text_is_an_error(mixture: Mixture) -> None:
    nothing = dataclasses.replace(mixture["audio"], units=[], lengths=[], ids=[])
    with pytest.raises(InputError, match="no training text for audio"):
        loader({**mixture, "audio": nothing})
    with pytest.raises(InputError, match="no training text for any modality"):
        loader({})


class Failing:
    """A reader that fails at its first sample: by an error, or by its process's death."""

    def __init__(self, kill: bool) -> None:
        self.kill = kill

    def read(self, unit: UnitRef) -> Sample:
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError(f"set/train: medium {unit.medium} is broken")


def failing(mixture: Mixture, kill: bool) -> Mixture:
    reader: Any = Failing(kill)
    return {"image": dataclasses.replace(mixture["image"], reader=reader)}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_arrives_as_it_was_raised(mixture: Mixture, workers: int) -> None:
    with pytest.raises(DataError) as caught:
        next(loader(failing(mixture, kill=False), workers=workers).batches(0))
    assert str(caught.value).startswith("set/train: medium ")
    assert "Traceback" not in str(caught.value)


def test_a_killed_loader_process_is_an_error(mixture: Mixture) -> None:
    with pytest.raises(RankError, match="a loader process died while steps 3 to 6 were read"):
        next(loader(failing(mixture, kill=True), workers=2).batches(3))


def test_all_worlds_and_workers_give_each_pair_once(mixture: Mixture) -> None:
    whole = [name for _, step in loader(mixture, epochs=1).batches(0) for name in counted(step)]
    for world, workers in ((2, 1), (3, 2), (4, 0)):
        ranks = [
            list(loader(mixture, epochs=1, rank=rank, world=world, workers=workers).batches(0))
            for rank in range(world)
        ]
        found = [name for rank in ranks for _, step in rank for name in counted(step)]
        assert sorted(found) == sorted(whole)
        assert len(set(found)) == len(found)


def test_a_medium_is_decoded_once_for_all_its_texts() -> None:
    decoded = []

    def load(unit: UnitRef) -> Tensor:
        decoded.append(unit.medium)
        return torch.full((100,), float(unit.medium))

    media = MediaCache(load, limit=1000)  # two media
    for medium in (0, 0, 1, 0, 1, 2, 0, 2, 1):
        assert media(UnitRef(0, medium, 0))[0] == medium
    assert decoded == [0, 1, 2, 0, 1]
    small = MediaCache(load, limit=10)
    assert small(UnitRef(0, 7, 0))[0] == 7


def test_a_step_carries_no_more_than_its_media(mixture: Mixture) -> None:
    """A row of cached features is a view; the features of its whole tar must stay at home."""
    store = torch.arange(1_000_000.0).view(1000, 1000)
    samples = tuple(
        Sample(f"s{row}", "image", (1,), (2,), (3,), store[row % 2], encoded=True)
        for row in range(6)
    )
    packed = _pack([Batch(samples[:4], (True,) * 4), Batch(samples[4:], (True, False))])
    assert [buffer.numel() for buffer in packed.buffers.values()] == [2000]
    found = packed.batches()
    assert [batch.counted for batch in found] == [(True,) * 4, (True, False)]
    for sample, expected in zip([s for b in found for s in b.samples], samples, strict=True):
        assert sample.id == expected.id
        assert torch.equal(sample.media, expected.media)
