"""The token-count contract: what encoders and connectors state, and how long rows may be."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mera_ds.batch import Features
from mera_ds.checkpoint import MANIFEST
from mera_ds.config import REPOSITORY
from mera_ds.data.loader import MixturePart
from mera_ds.distributed import World
from mera_ds.errors import DataError, InputError
from mera_ds.model.connectors import MlpConnector, QFormerConnector
from mera_ds.model.encoders.tiny import PICTURE_WIDTH, TinyImageEncoder
from mera_ds.model.mllm import MultimodalLM
from mera_ds.train.contract import check_token_counts

from .problem import Task, build_mixture, build_trainee

ALONE = World(rank=0, size=1, local_rank=0)
MODALITIES = ("image", "audio")
Mixture = dict[str, MixturePart]


@pytest.fixture
def task(run: Path) -> Task:
    return Task(run, modalities=MODALITIES, units=40)


@pytest.fixture
def mixture(task: Task) -> Mixture:
    return build_mixture(task, ALONE)


@pytest.fixture
def model(task: Task) -> MultimodalLM:
    return build_trainee(task)[0]


def text_tokens(part: MixturePart) -> int:
    """Return the text tokens of the part's longest row."""
    return max(len(part.reader.pieces(unit)) for unit in part.units)


def test_what_keeps_its_word_passes_and_is_left_as_it_was(
    model: MultimodalLM, mixture: Mixture
) -> None:
    check_token_counts(model, mixture, 256)
    assert all(connector.training for connector in model.connectors.values())


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_longest_row_must_fit(modality: str, model: MultimodalLM, mixture: Mixture) -> None:
    part = {modality: mixture[modality]}
    media = 4  # of an image, one for each quarter; of a sound, one for each query
    longest = text_tokens(part[modality]) + media
    check_token_counts(model, part, longest)
    with pytest.raises(
        InputError,
        match=rf"tokens and its {modality} up to {media}: together {longest}, 3 more than "
        rf"prompt\.max_length={longest - 3}; raise it",
    ):
        check_token_counts(model, part, longest - 3)


def test_an_encoder_with_too_many_tokens_is_named(
    model: MultimodalLM, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyImageEncoder, "max_tokens", 3)
    with pytest.raises(
        DataError,
        match=r"image/.*#\d+: the encoder 'tiny-image' of image states at most 3 tokens .* gave 4",
    ):
        check_token_counts(model, mixture, 256)


def test_an_encoder_of_another_width_is_named(
    model: MultimodalLM, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.encoders["image"], "feature_dim", 31)
    with pytest.raises(DataError, match=r"'tiny-image' of image states a width of 31 .* gave 32"):
        check_token_counts(model, mixture, 256)


def test_an_encoder_that_runs_on_line_is_tried(
    model: MultimodalLM, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With features on disk the stored ones are looked at, and the encoder itself otherwise."""
    part = mixture["image"]
    encoder = model.encoders["image"]
    stored = part.reader.read(part.units[0])

    raw = dataclasses.replace(stored, media=torch.zeros(4, PICTURE_WIDTH), encoded=False)
    monkeypatch.setattr(part.reader, "read", lambda unit: raw)
    check_token_counts(model, {"image": part}, 256)
    forward = encoder.forward

    def doubled(inputs: list[Tensor]) -> Features:
        found = forward(inputs)
        return Features(found.values.repeat(1, 2, 1), found.mask.repeat(1, 2))

    monkeypatch.setattr(encoder, "forward", doubled)
    with pytest.raises(DataError, match=r"states at most 4 tokens .* gave 8"):
        check_token_counts(model, {"image": part}, 256)


@pytest.mark.parametrize(
    ("modality", "kind"), [("image", MlpConnector), ("audio", QFormerConnector)]
)
def test_a_connector_that_gives_another_number_is_named(
    modality: str,
    kind: type[MlpConnector | QFormerConnector],
    model: MultimodalLM,
    mixture: Mixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kind, "num_tokens", lambda self, n_features: 7)
    with pytest.raises(
        DataError,
        match=rf"{modality}/.*: the connector of {modality} \({kind.__name__}\) states 7 tokens of "
        r"width 64 for \d+ features \(num_tokens\) and gave 4 of width 64",
    ):
        check_token_counts(model, mixture, 256)


@pytest.mark.slow
def test_a_training_step_checks_before_it_trains(make_tiny_run: Callable[..., Path]) -> None:
    run = make_tiny_run("order=[image]", "prompt.max_length=16")
    ended = subprocess.run(
        [sys.executable, "launch/stage.py", "--run", run, "--modality", "image"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert re.search(r"error: .* more than prompt\.max_length=16", ended.stderr)
    assert not list(run.rglob(MANIFEST))
    assert "step 1/" not in ended.stderr
