"""An encoder of one's own that fails on a medium: the sample is named, and the plugin's line."""

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mera_ds import features
from mera_ds.config import RunConfig, load_profile
from mera_ds.data.dataset import ModalityData
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.data.prompts import PromptBuilder
from mera_ds.distributed import World
from mera_ds.errors import DataError, InputError
from mera_ds.features import FeatureStore, open_data
from mera_ds.model.backbone import load_tokenizer
from mera_ds.model.encoders import Encoder, build_encoder
from mera_ds.model.mllm import MultimodalLM
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
    scale: float = 1.0

class Picky(Encoder):
    media = "image"
    Options = Options

    def __init__(self, kind, options, weights):
        super().__init__(kind, options, weights)
        self.feature_dim, self.max_tokens = 1, 1
        self.seen = []
        self.freeze()

    def transform(self, media):
        value = media.getpixel((0, 0))[0]
        self.seen.append(value)
        if value == 9 and self.options.fails == "transform":
            raise ValueError("I don't like nine")
        return torch.full((1, 1), float(value))

    def forward(self, inputs):
        nine = any(float(values) == 9 for values in inputs)
        if nine and self.options.fails != "never":
            raise ValueError("I don't like nine")
        return pad_features([values * self.options.scale for values in inputs])

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


def read_epochs(config: RunConfig, data: Path, encoder: Encoder, template: Path) -> list[Tensor]:
    """Read two epochs with an encoder; return the features of each sample."""
    prompts = PromptBuilder(config.prompt, load_tokenizer(template / "backbone"))
    found, reader = open_data(config, data, "image", "train", encoder, prompts, WORLD)
    units = found.units(["caption"])
    part = MixturePart(reader, units, found.lengths(units), found.ids(units))
    settings = LoaderSettings(
        batch_size=4,
        epochs=2,
        max_steps=None,
        seed=0,
        rank=0,
        world=1,
        micro_batch=4,
        workers=0,
    )
    model = MultimodalLM(torch.nn.Linear(1, 1), {}, {"image": encoder}, 1)
    batches = [
        batch for _, step in StepLoader({"image": part}, settings).batches(0) for batch in step
    ]
    return [row for batch in batches for row in model.encode(batch.samples).values]


class TestTwoEpochs:
    @pytest.fixture
    def encoder(self, plugin: Path) -> Encoder:
        return build_encoder("picky", {"fails": "never"}, None)

    def test_cached_the_second_decodes_no_medium(
        self, encoder: Encoder, data: Path, tiny_template: Path
    ) -> None:
        rows = read_epochs(configured(data, "cached"), data, encoder, tiny_template)
        assert len(rows) == 24
        assert sorted(encoder.seen) == list(range(1, 13))
        read_epochs(configured(data, "cached"), data, encoder, tiny_template)
        assert len(encoder.seen) == 12, "nor does another run"

    @pytest.mark.parametrize("part", [5, 256])
    def test_fp16_rounds_alike_cached_and_on_line(
        self,
        plugin: Path,
        data: Path,
        tiny_template: Path,
        part: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(features, "PART", part)
        encoder = build_encoder("picky", {"fails": "never", "scale": 1 / 3}, None)
        exact = read_epochs(configured(data, "cached"), data, encoder, tiny_template)
        encoder.feature_dtype = torch.float16
        cached = read_epochs(configured(data, "cached"), data, encoder, tiny_template)
        online = read_epochs(configured(data, "online"), data, encoder, tiny_template)
        assert torch.equal(torch.cat(cached), torch.cat(online))
        error = (torch.cat(cached).float() / torch.cat(exact) - 1).abs().max()
        assert 0 < float(error) <= 1 / 2048

    def test_what_fp16_cannot_hold_is_named(
        self, plugin: Path, data: Path, tiny_template: Path
    ) -> None:
        encoder = build_encoder("picky", {"fails": "never", "scale": 6e3}, None)
        encoder.feature_dtype = torch.float16
        message = r"own/p11#0 has a feature of 7.2e\+04.* set modalities.image.feature_dtype=fp32"
        with pytest.raises(DataError, match=message):
            read_epochs(configured(data, "cached"), data, encoder, tiny_template)

    def test_nothing_but_what_is_read_is_in_memory(self, encoder: Encoder, data: Path) -> None:
        """The features of a tar are views of one mapped file."""
        shards = ModalityData("image", [data], "train")
        store = FeatureStore(shards, encoder)
        store.compute_missing(WORLD)
        units = shards.units(["caption"])
        first, last = store.load(units[0]), store.load(units[11])
        assert (float(first), float(last)) == (1.0, 12.0)
        assert first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
        mapped = Path("/proc/self/maps").read_text()
        assert "features.safetensors" in mapped
