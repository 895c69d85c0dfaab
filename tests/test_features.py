"""An encoder of one's own that fails on a medium: the sample is named, and the plugin's line."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from mera_ds.config import RunConfig, load_profile
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World
from mera_ds.errors import InputError
from mera_ds.features import open_data
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.encoders import build_encoder
from mera_ds.registry import load_plugin
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards

PLUGIN = """
from dataclasses import dataclass
import torch
from mera_ds.plugin import Encoder, pad_features, register_encoder

@dataclass(frozen=True)
class Options:
    fails: str = "transform"

class Picky(Encoder):
    media = "image"
    Options = Options

    def __init__(self, kind, options, weights):
        super().__init__(kind, options, weights)
        self.feature_dim, self.max_tokens = 1, 1
        self.freeze()

    def transform(self, media):
        value = media.getpixel((0, 0))[0]
        if value == 9 and self.options.fails == "transform":
            raise ValueError("I don't like nine")
        return torch.full((1, 1), float(value))

    def forward(self, inputs):
        if any(float(values) == 9 for values in inputs):
            raise ValueError("I don't like nine")
        return pad_features(list(inputs))

register_encoder("picky", Picky)
"""
WORLD = World(rank=0, size=1, local_rank=0)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "picky.py"
    path.write_text(PLUGIN, encoding="utf-8")
    return load_plugin(path).path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a shard set of twelve grey pictures; number 9 is the one."""
    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    texts = (Text("c0", "caption", "", ("grey",)),)
    samples = [RawSample(f"p{n}", "png", _grey(n), f"c{n}", "drawn", texts) for n in range(1, 13)]
    recipe = {"name": "test"}
    write_shards(tmp_path / "own/train", "own", "train", "image", samples, "CC0-1.0", recipe)
    return tmp_path / "own"


def _grey(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def configured(data: Path, features: str) -> RunConfig:
    return load_profile(
        "tiny",
        [
            "order=[image]",
            f"modalities.image.data=['{data}']",
            "modalities.image.encoder={kind: picky}",
            f"execution.features={features}",
        ],
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_media_that_are_encoded_on_line(
    plugin: Path, data: Path, tiny_template: Path, workers: int
) -> None:
    config = configured(data, "online")
    prompts = PromptBuilder(config.prompt, load_tokenizer(tiny_template / "backbone"))
    encoder = build_encoder("picky", {}, None)
    found, reader = open_data(config, data, "image", "train", encoder, prompts, WORLD)
    units = found.units(["caption"])
    ids = [found.unit_id(unit) for unit in units]
    part = MixturePart(reader, units, [found.length(unit) for unit in units], ids)
    settings = LoaderSettings(
        batch_size=4,
        epochs=1,
        max_steps=None,
        seed=0,
        rank=0,
        world=1,
        micro_batch=4,
        workers=workers,
    )
    message = rf"own/p9#0 can't be encoded \({re.escape(str(plugin))}, line \d+\): ValueError: I "
    with pytest.raises(InputError, match=message):
        list(StepLoader({"image": part}, settings).batches(0))


@pytest.mark.parametrize(
    ("fails", "what"),
    [("transform", "own/p9#0"), ("forward", "the media own/p1#0 to own/p12#0")],
)
def test_features_that_are_computed_once(
    plugin: Path, data: Path, tiny_template: Path, tmp_path: Path, fails: str, what: str
) -> None:
    config = configured(data, "cached")
    prompts = PromptBuilder(config.prompt, load_tokenizer(tiny_template / "backbone"))
    encoder = build_encoder("picky", {"fails": fails}, None)
    message = rf"{what} can't be encoded \({re.escape(str(plugin))}, line \d+\): ValueError: I "
    with pytest.raises(InputError, match=message):
        open_data(config, data, "image", "train", encoder, prompts, WORLD)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
