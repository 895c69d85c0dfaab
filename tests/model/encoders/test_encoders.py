"""Encoders: frozen, deterministic, of the published architectures, and of use to a linear probe."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mera_ds.config import REPOSITORY, ModalityConfig, cache_folder
from mera_ds.errors import DataError, InputError, MeraError
from mera_ds.model.connectors import CONNECTORS
from mera_ds.model.encoders import ENCODERS, Encoder, build_encoder
from mera_ds.model.encoders.audio import (
    LOUDEST,
    SAMPLE_RATE,
    AisfxNetwork,
    log_mel,
    mel_filters,
)
from mera_ds.model.encoders.efficientnet import EfficientNetLite0, SameConv2d, pool_grid
from mera_ds.model.encoders.pointcloud import depth_maps
from mera_ds.model.encoders.visual import even_indices, to_square
from mera_ds.model.encoders.waveform import resample
from mera_ds.pocket import PocketWeights, locate
from mera_ds.settings import parse

from .official_files import SMALL_POINT_BERT, write_beats, write_clip, write_point_bert

CACHE = cache_folder()
TINY = [kind for kind in ENCODERS if kind.startswith("tiny-")]
POCKET = ["efficientnet-lite0", "efficientnet-lite0-frames", "aisfx", "depth-views"]
SMALL = {
    "efficientnet-lite0": {"size": 64},
    "efficientnet-lite0-frames": {"size": 64, "frames": 3},
    "depth-views": {"size": 64},
    "aisfx": {"blocks": 1},
    "point-bert": SMALL_POINT_BERT,
}
"""Options that make the real architectures fast."""


@dataclass
class Sound:
    waveform: NDArray[np.float32]
    rate: int


def tone(hertz: float, seconds: float, rate: int = SAMPLE_RATE) -> Sound:
    time = np.arange(int(seconds * rate)) / rate
    return Sound(np.sin(2 * np.pi * hertz * time).astype(np.float32)[None], rate)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """Weight files for every kind, with random numbers that keep the activations' size."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    files: dict[str, Path | None] = dict.fromkeys(ENCODERS)
    for name, network, kinds in (
        ("vision", EfficientNetLite0(), [kind for kind in POCKET if kind != "aisfx"]),
        ("audio", AisfxNetwork(), ["aisfx"]),
    ):
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        path = folder / f"{name}.safetensors"
        save_file(network.state_dict(), path)
        files |= dict.fromkeys(kinds, path)
    files |= {"beats": folder / "beats.pt", "point-bert": folder / "point_bert.pt"}
    write_beats(folder / "beats.pt")
    write_point_bert(folder / "point_bert.pt")
    write_clip(folder / "clip")
    return files | dict.fromkeys(["clip-vit", "clip-vit-frames"], folder / "clip")


def make(kind: str, weights: dict[str, Path | None], **options: Any) -> Encoder:
    return build_encoder(kind, SMALL.get(kind, {}) | options, weights[kind])


def medium(kind: str, number: int) -> Any:
    """One decoded medium of what `kind` takes; different for each number."""
    random = np.random.default_rng(number)
    media = ENCODERS[kind].media
    if media == "image":
        pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        return Image.fromarray(pixels)
    if media == "video":
        return random.integers(0, 256, (6, 20, 30, 3), dtype=np.uint8)
    if media == "audio":
        return tone(200 + 100 * number, 0.3 + 0.4 * number, 16000)
    return random.normal(size=(200, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_have_the_announced_shape(
    kind: str, random_weights: dict[str, Path | None]
) -> None:
    encoder = make(kind, random_weights)
    features = encoder([encoder.transform(medium(kind, number)) for number in range(3)])
    count = features.mask.shape[1]
    assert features.values.shape == (3, count, encoder.feature_dim)
    assert features.mask.shape == (3, count)
    assert count <= encoder.max_tokens
    assert count == encoder.max_tokens or kind == "beats"
    assert features.values.dtype == torch.float32
    assert features.mask.dtype == torch.bool
    assert torch.isfinite(features.values).all()
    assert features.mask.any(dim=1).all()
    assert not features.values[~features.mask].any()


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_is_frozen(kind: str, random_weights: dict[str, Path | None]) -> None:
    encoder = make(kind, random_weights).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = encoder([encoder.transform(medium(kind, 0))])
    assert not features.values.requires_grad
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_mediums_features_do_not_depend_on_the_batch(
    kind: str, random_weights: dict[str, Path | None]
) -> None:
    encoder = make(kind, random_weights)
    inputs = [encoder.transform(medium(kind, number)) for number in range(3)]
    together = encoder(inputs)
    assert together.values.std() > 0.01
    for row, item in enumerate(inputs):
        alone = encoder([item])
        assert alone.mask.sum() == together.mask[row].sum()
        found, expected = together.values[row][together.mask[row]], alone.values[alone.mask]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_building_and_encoding_are_deterministic(
    kind: str, random_weights: dict[str, Path | None]
) -> None:
    torch.manual_seed(1)
    first = make(kind, random_weights)
    torch.manual_seed(2)
    second = make(kind, random_weights)
    assert first.fingerprint == second.fingerprint
    inputs = [first.transform(medium(kind, 1)), second.transform(medium(kind, 1))]
    assert torch.equal(inputs[0], inputs[1])
    assert torch.equal(first(inputs[:1]).values, second(inputs[1:]).values)


def test_fingerprint_tells_kinds_options_and_weights_apart(
    random_weights: dict[str, Path | None], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    state = load_file(random_weights["aisfx"] or other)
    state["conv_block1.conv1.weight"][0, 0, 0, 0] += 1e-3
    save_file(state, other)
    fingerprints = [
        make("tiny-image", random_weights).fingerprint,
        make("tiny-video", random_weights).fingerprint,
        make("tiny-image", random_weights, seed=1).fingerprint,
        make("aisfx", random_weights).fingerprint,
        make("aisfx", random_weights, tokens=4).fingerprint,
        make("aisfx", {"aisfx": other}).fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("kind", TINY)
def test_tiny_encoder_is_tiny_and_leaves_the_global_generator_alone(kind: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    encoder = build_encoder(kind, {}, None)
    assert torch.equal(torch.rand(1), expected)
    assert sum(parameter.numel() for parameter in encoder.parameters()) < 10_000


COLOURS = ((220, 40, 40), (40, 170, 60), (50, 80, 220), (240, 220, 50))


def draw_image(label: int, random: np.random.Generator) -> Image.Image:
    pixels = np.full((32, 32, 3), 40, np.uint8)
    x, y = random.integers(2, 18, 2)
    pixels[y : y + 12, x : x + 12] = COLOURS[label]
    return Image.fromarray(pixels)


def draw_video(label: int, random: np.random.Generator) -> NDArray[np.uint8]:
    clip = np.zeros((4, 32, 32, 3), np.uint8)
    across = int(random.integers(0, 20))
    for frame in range(4):
        along = 6 * frame if label % 2 else 20 - 6 * frame
        x, y = (along, across) if label < 2 else (across, along)
        clip[frame, y : y + 12, x : x + 12] = COLOURS[int(random.integers(4))]
    return clip


def draw_audio(label: int, random: np.random.Generator) -> Sound:
    rate = int(random.choice([16000, 22050, 44100]))
    sound = tone((262, 330, 392, 523)[label], float(random.uniform(0.3, 1.2)), rate)
    sound.waveform *= random.uniform(0.2, 0.8)
    return sound


def draw_points(label: int, random: np.random.Generator) -> NDArray[np.float32]:
    points = random.normal(size=(200, 3))
    if label < 2:
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    stretch = ((1, 1, 1), (1, 0.3, 1), (1, 0.3, 0.3), (0.3, 1, 0.3))[label]
    return (points * stretch).astype(np.float32)


DRAW: dict[str, Callable[[int, np.random.Generator], Any]] = {
    "tiny-image": draw_image,
    "tiny-video": draw_video,
    "tiny-audio": draw_audio,
    "tiny-pointcloud": draw_points,
}


@pytest.mark.parametrize("kind", TINY)
def test_simple_classes_are_linearly_separable_through_a_tiny_encoder(kind: str) -> None:
    encoder, random = build_encoder(kind, {}, None), np.random.default_rng(0)
    labels = torch.arange(240) % 4
    media = [encoder.transform(DRAW[kind](int(label), random)) for label in labels]
    features = encoder(media).values.flatten(1).double()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    targets = torch.nn.functional.one_hot(labels, 4).double()
    gram = features[:160].T @ features[:160] + 0.1 * torch.eye(features.shape[1])
    probe = torch.linalg.solve(gram, features[:160].T @ targets[:160])
    accuracy = ((features[160:] @ probe).argmax(1) == labels[160:]).double().mean()
    assert accuracy > 0.9


def test_efficientnet_has_the_published_shape() -> None:
    network = EfficientNetLite0().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_371_008
    assert len(network.blocks) == 16
    with torch.no_grad():
        features = network(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert features.shape == (1, 1280, 7, 7)
    assert 0 <= features.min()
    assert features.max() <= 6


@pytest.mark.parametrize(
    ("pixels", "kernel", "stride", "before", "after"),
    [(8, 3, 1, 1, 1), (8, 5, 1, 2, 2), (8, 3, 2, 0, 1), (8, 5, 2, 1, 2), (7, 3, 2, 1, 1)],
)
def test_same_padding_is_tensorflows(
    pixels: int, kernel: int, stride: int, before: int, after: int
) -> None:
    torch.manual_seed(0)
    convolution = SameConv2d(2, 3, kernel, stride)
    inputs = torch.randn(1, 2, pixels, pixels)
    padded = torch.nn.functional.pad(inputs, (before, after, before, after))
    expected = torch.nn.functional.conv2d(padded, convolution.weight, stride=stride)
    assert expected.shape[-1] == -(-pixels // stride)
    assert torch.equal(convolution(inputs), expected)


def test_grid_tokens_run_row_by_row() -> None:
    rows = torch.arange(4.0)[:, None].expand(4, 4)
    tokens = pool_grid(torch.stack([rows, rows.T])[None], 2)
    assert tokens.tolist() == [[[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]]
    assert pool_grid(torch.stack([rows, rows.T])[None], 0).shape == (1, 16, 2)


def test_images_are_padded_with_white_to_a_square() -> None:
    square = to_square(Image.new("RGB", (40, 20), (255, 0, 0)), 32)
    assert square.shape == (3, 32, 32)
    assert square[:, 2, 16].tolist() == [255, 255, 255]
    assert square[:, 16, 16].tolist() == [255, 0, 0]


def test_frames_are_taken_from_the_first_to_the_last() -> None:
    assert even_indices(100, 4) == [0, 33, 66, 99]
    assert even_indices(3, 4) == [0, 0, 1, 2]
    assert even_indices(1, 4) == [0, 0, 0, 0]


def test_video_tokens_are_in_order_of_time(random_weights: dict[str, Path | None]) -> None:
    video = make("efficientnet-lite0-frames", random_weights, frames=2, grid=2)
    image = make("efficientnet-lite0", random_weights, grid=2)
    clip = medium("tiny-video", 0)
    tokens = video([video.transform(clip)]).values[0]
    for token, frame in ((0, 0), (4, 5)):
        still = image([image.transform(Image.fromarray(clip[frame]))]).values[0]
        assert torch.allclose(tokens[token : token + 4], still, rtol=1e-3, atol=1e-3)


def reference_log_mel(frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """The front end for one windowed frame of 2048 samples, written out."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    power = np.abs(np.fft.rfft(frame * hann)) ** 2
    top = 2595 * np.log10(1 + 22050 / 700)
    edges = [700 * (10 ** (top * i / 97 / 2595) - 1) for i in range(98)]
    bands = []
    for low, peak, high in zip(edges, edges[1:], edges[2:], strict=False):
        weights = []
        for number in range(1025):
            hertz = number * 44100 / 2048
            rising, falling = (hertz - low) / (peak - low), (high - hertz) / (high - peak)
            weights.append(max(0.0, min(rising, falling)))
        bands.append(np.dot(weights, power) / sum(weights))
    return np.log10(1e4 * np.array(bands) + 1) / 9.4578


def test_log_mel_matches_its_definition() -> None:
    noise = np.random.default_rng(0).normal(size=44100) * 0.1
    frames = log_mel(torch.from_numpy(noise).float(), mel_filters())
    assert frames.shape == (1 + 44100 // 1024, 96)
    expected = reference_log_mel(noise[10 * 1024 - 1024 : 10 * 1024 + 1024])
    assert np.abs(frames[10].numpy() - expected).max() < 1e-5
    assert log_mel(torch.zeros(44100), mel_filters()).abs().max() == 0
    assert pytest.approx(9.4578) == LOUDEST


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000, 11127])
def test_resampling_keeps_a_tone(rate: int) -> None:
    expected = torch.from_numpy(tone(440, 1.0).waveform[0])
    resampled = resample(torch.from_numpy(tone(440, 1.0, rate).waveform[0]), rate, SAMPLE_RATE)
    assert abs(len(resampled) - len(expected)) <= 1
    middle = slice(4000, 40000)
    assert (resampled[middle] - expected[middle]).abs().max() < 2e-3


def test_resampling_removes_what_the_lower_rate_cannot_hold() -> None:
    high = torch.from_numpy(tone(15000, 1.0).waveform[0])
    assert resample(high, SAMPLE_RATE, 22050)[1000:-1000].abs().max() < 2e-3


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.001, 1), (0.1, 1), (1.0, 6), (2.4, 13), (60.0, 24)]
)
def test_audio_mask_covers_the_clip(
    seconds: float, expected: int, rate: int, random_weights: dict[str, Path | None]
) -> None:
    encoder = make("aisfx", random_weights, blocks=2)
    inputs = encoder.transform(tone(440, seconds, rate))
    assert len(inputs) <= 200
    features = encoder([inputs])
    assert features.values.shape == (1, 24, 512)
    assert features.mask.sum() == expected
    assert features.mask[0, :expected].all()


def test_audio_tokens_are_averages_of_real_ones(
    random_weights: dict[str, Path | None],
) -> None:
    full, pooled = make("aisfx", random_weights), make("aisfx", random_weights, tokens=3)
    inputs = [full.transform(tone(440, 1.0))]
    before, after = full(inputs), pooled(inputs)
    assert after.mask.tolist() == [[True, True, False]]
    assert before.mask.sum() == 6
    assert torch.allclose(after.values[0, 0], before.values[0, :4].mean(0), atol=1e-5)
    assert torch.allclose(after.values[0, 1], before.values[0, 4:6].mean(0), atol=1e-5)


def test_stereo_is_averaged(random_weights: dict[str, Path | None]) -> None:
    encoder = make("aisfx", random_weights)
    mono = tone(440, 0.5)
    stereo = Sound(np.concatenate([mono.waveform * 1.5, mono.waveform * 0.5]), mono.rate)
    assert torch.allclose(encoder.transform(mono), encoder.transform(stereo), atol=1e-5)


def test_depth_maps_show_place_and_depth() -> None:
    # A long box along x: its right end is near for the side view, the top is up in the front view.
    corners = torch.tensor([[0.0, 0, 0], [2, 1, 0], [2, 0, 1], [0, 1, 1]])
    side, front, above = depth_maps(corners, size=32, radius=0)
    assert all((view < 255).sum() == 4 for view in (side, front, above))
    drawn = (front < 255).nonzero()
    assert drawn[:, 1].max() - drawn[:, 1].min() == pytest.approx(2 * 14, abs=1)
    assert drawn[:, 0].max() - drawn[:, 0].min() == pytest.approx(14, abs=1)
    near, far = side[side < 255].min(), side[side < 255].max()
    assert near == 0
    assert far == round(255 * 0.75)


def test_depth_map_shows_the_nearest_point() -> None:
    points = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    front = depth_maps(points, size=32, radius=1)[1]
    assert (front < 255).sum() == 9
    assert front.min() == 0
    single = depth_maps(torch.tensor([[5.0, 5.0, 5.0]]), size=32, radius=0)
    assert ((single < 255).sum(dim=(1, 2)) == 1).all()


def test_point_order_and_place_do_not_matter(random_weights: dict[str, Path | None]) -> None:
    encoder = make("depth-views", random_weights)
    points = medium("depth-views", 0)
    moved = np.concatenate([points[::-1] * 4 + 16, np.ones((200, 3), np.float32)], axis=1)
    assert torch.equal(encoder.transform(points), encoder.transform(moved))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("efficientnet-lite0", torch.float16),
        ("efficientnet-lite0", torch.bfloat16),
        ("aisfx", torch.bfloat16),
        ("clip-vit", torch.float16),
        ("clip-vit-frames", torch.bfloat16),
        ("beats", torch.float16),
        ("beats", torch.bfloat16),
        ("point-bert", torch.float16),
        ("point-bert", torch.bfloat16),
        ("tiny-audio", torch.float16),
    ],
)
def test_half_precision_gives_fp32_features(
    kind: str, precision: torch.dtype, random_weights: dict[str, Path | None]
) -> None:
    encoder = make(kind, random_weights)
    inputs = [encoder.transform(medium(kind, 0))]
    expected = encoder(inputs)
    values = encoder.to(precision)(inputs).values
    assert values.dtype == torch.float32
    close = torch.nn.functional.cosine_similarity(values, expected.values, dim=-1)
    assert close[expected.mask].min() > 0.98


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("efficientnet-lite", {}, "did you mean 'efficientnet-lite0'"),
        ("efficientnet-lite0", {"gird": 2}, "did you mean 'grid'"),
        ("efficientnet-lite0", {"grid": 8}, "grid is 8"),
        ("efficientnet-lite0", {"size": 16}, "size is 16"),
        ("efficientnet-lite0-frames", {"frames": 0}, "frames is 0"),
        ("aisfx", {"tokens": 5}, "must divide 12"),
        ("aisfx", {"blocks": 0}, "blocks is 0"),
        ("depth-views", {"radius": -1}, "radius is -1"),
        ("tiny-image", {"feature_dim": 0}, "feature_dim is 0"),
        ("aisfx", {}, "needs weights"),
        ("clip-vit", {}, "needs weights"),
        ("clip-vit", {"aspect": "crop"}, "valid: pad, square"),
        ("clip-vit-frames", {"pooling": 0}, "pooling is 0"),
        ("beats", {}, "needs weights: give the path of the official"),
        ("point-bert", {}, "needs weights"),
    ],
)
def test_wrong_configurations_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_encoder(kind, options, None)


def test_weights_for_a_tiny_encoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes no weights"):
        build_encoder("tiny-image", {}, tmp_path / "x.safetensors")


def test_weights_must_fit_exactly(random_weights: dict[str, Path | None], tmp_path: Path) -> None:
    path = tmp_path / "changed.safetensors"
    name = "conv_block2.conv1.weight"

    def change(edit: Callable[[dict[str, Tensor]], Any]) -> None:
        state = load_file(random_weights["aisfx"] or path)
        edit(state)
        save_file(state, path)

    for edit, message in (
        (lambda state: state.pop(name), f"no tensor '{name}'"),
        (lambda state: state.update(extra=torch.zeros(1)), "holds 'extra'"),
        (lambda state: state.update({name: torch.zeros(1, 2)}), r"shape \(1, 2\) instead of"),
        (lambda state: state[name].fill_(float("nan")), "not finite"),
    ):
        change(edit)
        with pytest.raises(DataError, match=message):
            build_encoder("aisfx", {}, path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="not a readable safetensors"):
        build_encoder("aisfx", {}, path)
    with pytest.raises(InputError, match="do not exist"):
        build_encoder("aisfx", {}, tmp_path / "nowhere.safetensors")


def test_the_readmes_example_and_tables_name_real_options() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition("## The paper's own encoders")[2].partition("\n## ")[0]
    example = yaml.safe_load(section.partition("```yaml")[2].partition("```")[0])
    for name, values in example["modalities"].items():
        entry = parse(ModalityConfig, values, name)
        parse(ENCODERS[entry.encoder.kind].Options, entry.encoder.options, name)
        parse(CONNECTORS[entry.connector.kind].Options, entry.connector.options, name)
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \| .* × .* \|$", section, re.MULTILINE)
    assert [kind for kind, _ in rows] == ["clip-vit", "clip-vit-frames", "beats", "point-bert"]
    for kind, options in rows:
        known = {entry.name: entry.default for entry in dataclasses.fields(ENCODERS[kind].Options)}
        assert "dtype" in known
        for name, default in re.findall(r"`(\w+)` \((?:(\d+)|[^)]*)\)", options):
            assert name in known
            assert not default or known[name] == float(default)


@pytest.fixture(scope="module")
def pocket() -> PocketWeights:
    try:
        return locate(CACHE)
    except MeraError:
        pytest.skip("the pocket weights are not fetched ('mera-ds pocket fetch')")


def stripes(size: int) -> Image.Image:
    """A picture that every platform draws alike."""
    index = np.arange(size)
    pixels = np.stack(
        [
            (index[:, None] * 3 + index[None] * 5) % 256,
            (index[:, None] // 16 * 40 + index[None] * 2) % 256,
            (index[:, None] * index[None] // 8) % 256,
        ],
        axis=-1,
    )
    return Image.fromarray(pixels.astype(np.uint8))


def stripe_clip() -> NDArray[np.uint8]:
    first = np.asarray(stripes(224))
    return np.stack([first, first[::-1], first[:, ::-1], first.swapaxes(0, 1)])


def stripe_points() -> NDArray[np.float32]:
    index = np.arange(1000)
    columns = [index % 10, index // 10 % 10 * (index % 3), index // 100 + index % 10]
    return np.stack(columns, axis=1).astype(np.float32)


GOLDEN = {
    "efficientnet-lite0": [12.0706, 27.2135, 4.1905, 4.0968, 3.7859],
    "efficientnet-lite0-frames": [16.5674, 18.8739, 4.3217, 3.9963, 3.8911],
    "aisfx": [15.5154, 21.7992, 3.4923, 2.7407, 2.6166],
    "depth-views": [11.9915, 25.7913, 3.1077, 3.0539, 2.5784],
}
"""Length of the first and last real token, and the three largest values of the first one."""


@pytest.mark.parametrize("kind", POCKET)
def test_real_weights_give_the_reference_features(kind: str, pocket: PocketWeights) -> None:
    """Golden figures: taken when the networks agreed exactly with those of the packages."""
    encoder = build_encoder(kind, {}, pocket.audio if kind == "aisfx" else pocket.vision)
    media: dict[str, Any] = {
        "image": stripes(224),
        "video": stripe_clip(),
        "audio": tone(440, 1.0),
        "pointcloud": stripe_points(),
    }
    features = encoder([encoder.transform(media[encoder.media])])
    tokens = features.values[features.mask]
    found = [tokens[0].norm(), tokens[-1].norm(), *tokens[0].topk(3).values]
    assert [value.item() for value in found] == pytest.approx(GOLDEN[kind], rel=2e-3)
