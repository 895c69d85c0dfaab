"""The loader on cached features and on media that are decoded, for `benchmarks/training.py`."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.loader import Reader, _jpeg
from mera_ds.data.dataset import ModalityData, UnitRef
from mera_ds.data.loader import LoaderSettings, MixturePart, StepLoader
from mera_ds.distributed import World
from mera_ds.features import FeatureStore, transform
from mera_ds.model.encoders import Encoder, build_encoder
from mera_ds.shards.format import Text
from mera_ds.shards.writer import RawSample, write_shards

BATCH = 16
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""Pixels and features of ViT-L/14-336 (576 x 1024) without its 24 layers, which no loader runs."""


def make_data(folder: Path, small: bool) -> None:
    """Write JPEGs of 640 x 480 as shards and a random encoder, unless an earlier call did."""
    if (folder / "image" / "train" / "index.json").exists():
        return
    images, changes = (16, {"hidden_size": 64}) if small else (160, {})
    texts = (Text("c0", "caption", "", ("a picture",)),)
    samples = [
        RawSample(f"m{n:06d}", "jpg", _jpeg(n), f"m{n:06d}", "drawn", texts) for n in range(images)
    ]
    recipe = {"name": "bench"}
    write_shards(folder / "image/train", "image", "train", "image", samples, "CC0-1.0", recipe)
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**(CLIP | changes))).save_pretrained(folder / "clip")


def load_encoder(folder: Path) -> Encoder:
    """Return the encoder, whose features are kept in fp16."""
    encoder = build_encoder("clip-vit", {}, folder / "clip")
    encoder.feature_dtype = torch.float16
    return encoder


def read(folder: Path, name: str) -> dict[str, Any]:
    """Time two epochs of the loader; only the second counts."""
    data = ModalityData("image", [folder / "image"], "train")
    encoder = load_encoder(folder)
    decoded = 0

    def load(unit: UnitRef) -> Tensor:
        nonlocal decoded
        decoded += 1
        return transform(encoder, data, unit)

    store = FeatureStore(data, encoder)
    if name == "cached":
        store.compute_missing(World(0, 1, 0))
    media: Any = store.load if name == "cached" else load
    units = data.units(["caption"])
    reader: Any = Reader(data, media)
    part = MixturePart(reader, units, data.lengths(units), data.ids(units))
    settings = LoaderSettings(
        batch_size=BATCH,
        epochs=2,
        max_steps=None,
        seed=0,
        rank=0,
        world=1,
        micro_batch=BATCH,
        workers=0,
    )
    loader = StepLoader({"image": part}, settings)
    steps = loader.batches(0)
    for _ in range(loader.total_steps // 2):
        next(steps)
    decoded = 0
    cpu, wall = time.process_time(), time.perf_counter()
    samples = sum(len(batch.samples) for _, batches in steps for batch in batches)
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "samples": samples,
        "decoded": decoded,
    }
