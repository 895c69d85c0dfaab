"""CLIP: layouts, preprocessing and features against transformers' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from mera_ds.config import REPOSITORY
from mera_ds.errors import DataError, InputError
from mera_ds.media import decode
from mera_ds.model.encoders import build_encoder
from mera_ds.model.encoders.clip import locate_clip, pool_patches, preprocess
from mera_ds.shards.reader import ShardReader

from .official_files import CLIP_CONFIG, SMALL_CLIP, clip_shapes, write_clip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a small CLIP."""
    write_clip(tmp_path / "clip")
    return tmp_path / "clip"


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def test_the_tower_has_the_official_tensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    _, config = locate_clip(tmp_path, "clip-vit")
    with torch.device("meta"):
        network = CLIPVisionModel(config)
    tower = getattr(network, "vision_model", network)
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    assert shapes == clip_shapes(CLIP_CONFIG)
    assert len(shapes) == 391
    assert sum(parameter.numel() for parameter in network.parameters()) == 303_507_456


def reference(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Patch tokens of the second-last layer of transformers' full model."""
    network: Any = CLIPVisionModel(CLIPVisionConfig(**SMALL_CLIP)).eval()
    getattr(network, "vision_model", network).load_state_dict(state)
    with torch.no_grad():
        return network(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def test_features_are_the_second_last_hidden_states(folder: Path) -> None:
    state = write_clip(folder)
    encoder: Any = build_encoder("clip-vit", {}, folder)
    inputs = [encoder.transform(picture(seed=seed)) for seed in range(2)]
    features = encoder(inputs)
    expected = reference(state, torch.cat(inputs))
    assert features.values.shape == (2, encoder.max_tokens, 32) == (2, 16, 32)
    assert (features.values - expected).abs().max() < 1e-6
    assert not [name for name in encoder.state_dict() if "layers.2." in name]


def test_frames_are_pooled_and_stand_in_order_of_time(folder: Path) -> None:
    state = write_clip(folder)
    encoder = build_encoder("clip-vit-frames", {"frames": 3}, folder)
    clip = np.stack([np.asarray(picture(seed=seed)) for seed in range(7)])
    inputs = encoder.transform(clip)
    chosen = [preprocess(Image.fromarray(clip[index]), 56, "pad") for index in (0, 3, 6)]
    assert torch.equal(inputs, torch.stack(chosen))
    values = encoder([inputs]).values
    maps = reference(state, inputs).transpose(1, 2).unflatten(2, (4, 4))
    pooled = torch.nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    assert values.shape == (1, encoder.max_tokens, 32) == (1, 12, 32)
    assert (values[0] - pooled.flatten(0, 1)).abs().max() < 1e-6


def test_pooling_at_full_size_is_the_mean_of_squares() -> None:
    tokens = torch.randn(4, 576, 8, generator=torch.Generator().manual_seed(0))
    maps = tokens.transpose(1, 2).unflatten(2, (24, 24))
    expected = torch.nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    assert pool_patches(tokens, 2).shape == (4, 144, 8)
    assert (pool_patches(tokens, 2) - expected).abs().max() < 1e-6
    assert pool_patches(torch.randn(1, 49, 8), 2).shape == (1, 16, 8)


@pytest.mark.parametrize(("frames", "pooling", "tokens"), [(4, 2, 576), (8, 3, 512), (2, 1, 1152)])
def test_tokens_are_counted_at_full_size(
    tmp_path: Path, frames: int, pooling: int, tokens: int
) -> None:
    config = SMALL_CLIP | {"image_size": 336, "num_hidden_layers": 2}
    write_clip(tmp_path / "clip", config)
    options = {"frames": frames, "pooling": pooling}
    encoder = build_encoder("clip-vit-frames", options, tmp_path / "clip")
    assert encoder.max_tokens == tokens
    assert build_encoder("clip-vit", {}, tmp_path / "clip").max_tokens == 576


def real_pictures() -> list[Image.Image]:
    with ShardReader(REPOSITORY / "shards/pocket/image/test") as reader:
        found = [
            decode("image", "png", reader.read_media(position), str(position))
            for position in range(0, len(reader), max(len(reader) // 4, 1))
        ]
    stretched = [found[0].resize(size) for size in ((97, 200), (500, 333), (336, 336), (30, 20))]
    return [*found, *stretched, picture(641, 480), picture(337, 1001), picture(57, 56)]


def test_pixel_values_are_those_of_the_published_processor() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )

    def published(image: Image.Image) -> Tensor:
        return torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])

    for image in real_pictures():
        assert (preprocess(image, 336, "square") - published(image)).abs().max() < 1e-5
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in processor.image_mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        assert (preprocess(image, 336, "pad") - published(canvas)).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(20_000, 3), (1, 9_000), (8_300, 200)])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_extreme_pictures_take_little_memory(size: tuple[int, int], aspect: Any) -> None:
    pixels = preprocess(Image.new("RGB", size, (255, 0, 0)), 56, aspect)
    assert pixels.shape == (3, 56, 56)
    red = preprocess(Image.new("RGB", (56, 56), (255, 0, 0)), 56, aspect)
    assert torch.allclose(pixels[:, 28, 28], red[:, 28, 28], atol=2.0)


def test_every_layout_gives_the_same_features(folder: Path, tmp_path: Path) -> None:
    encoder = build_encoder("clip-vit", {}, folder)
    inputs = [encoder.transform(picture())]
    expected = encoder(inputs).values
    whole = load_file(folder / "model.safetensors")
    tower = {k.removeprefix("vision_model."): v for k, v in whole.items() if "vision_model." in k}
    own = tmp_path / "own"
    network: Any = CLIPVisionModel(CLIPVisionConfig(**SMALL_CLIP))
    tower.pop("embeddings.position_ids")
    getattr(network, "vision_model", network).load_state_dict(tower)
    network.save_pretrained(own)
    binary = tmp_path / "binary"
    binary.mkdir()
    torch.save(whole, binary / "pytorch_model.bin")
    (binary / "config.json").write_text(json.dumps(SMALL_CLIP))
    save_file(tower, binary / "tower.safetensors")
    for path in (
        own,
        own / "model.safetensors",
        binary,
        binary / "pytorch_model.bin",
        binary / "tower.safetensors",
        folder / "model.safetensors",
    ):
        assert torch.equal(build_encoder("clip-vit", {}, path)(inputs).values, expected), path


def test_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    state = load_file(weights)
    for name in ("encoder.layers.2.mlp.fc1.weight", "post_layernorm.bias"):
        save_file({k: v for k, v in state.items() if k != f"vision_model.{name}"}, weights)
        with pytest.raises(DataError, match=f"no tensor '{name}'"):
            build_encoder("clip-vit", {}, folder)
    save_file(state, weights)
    for change, message in (
        ({"num_hidden_layers": 2}, r"holds 'encoder\.layers\.2"),
        ({"patch_size": 7}, "has shape"),
        ({"num_attention_heads": 5}, "describes no CLIP network"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1; it must be at least 2"),
        ({"image_size": [56, 56]}, "image_size is"),
        ({"hidden_act": "quick"}, "hidden_act 'quick' is unknown"),
    ):
        config.write_text(json.dumps({"vision_config": SMALL_CLIP | change}))
        with pytest.raises(DataError, match=message):
            build_encoder("clip-vit", {}, folder)
    config.write_text("[1]")
    with pytest.raises(DataError, match="holds no settings"):
        build_encoder("clip-vit", {}, folder)
    config.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        build_encoder("clip-vit", {}, folder)
    with pytest.raises(InputError, match="holds none of"):
        build_encoder("clip-vit", {}, tmp_path)


def test_the_fingerprint_covers_what_config_json_alone_says(folder: Path) -> None:
    first = build_encoder("clip-vit", {}, folder).fingerprint
    config = SMALL_CLIP | {"num_attention_heads": 8}
    (folder / "config.json").write_text(json.dumps({"vision_config": config}))
    assert build_encoder("clip-vit", {}, folder).fingerprint != first


def test_the_computation_can_be_halved(folder: Path) -> None:
    exact, half = (build_encoder("clip-vit", {"dtype": d}, folder) for d in ("fp32", "bf16"))
    assert next(half.parameters()).dtype == torch.bfloat16
    assert exact.fingerprint != half.fingerprint
    inputs = [exact.transform(picture())]
    assert half(inputs).values.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(
        exact(inputs).values, half(inputs).values, dim=-1
    )
    assert cosine.min() > 0.99
