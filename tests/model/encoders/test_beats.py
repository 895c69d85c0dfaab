"""BEATs: the official file's layouts, and features against the architecture written out plainly."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from mera_ds.errors import DataError, InputError
from mera_ds.media.audio import MAX_AUDIO_SECONDS
from mera_ds.model.encoders import Encoder, beats_network, build_encoder
from mera_ds.model.encoders.beats_network import (
    BeatsConfig,
    BeatsNetwork,
    reduce_mask,
    relative_buckets,
)
from mera_ds.model.encoders.fbank import fbank, mel_filters

from .official_files import BEATS_CFG, SMALL_BEATS, beats_shapes, random_state, write_beats

G, V = "encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v"
PARAMETRIZED = "encoder.pos_conv.0.parametrizations.weight.original"
VARIANTS: dict[str, dict[str, Any]] = {
    "official": {},
    "no gate": {"gru_rel_pos": False},
    "no position": {"gru_rel_pos": False, "relative_position_embedding": False},
    "pre-norm": {"layer_norm_first": True, "deep_norm": False},
}


@dataclass
class Sound:
    waveform: NDArray[np.float32]
    rate: int


def noise(samples: int, seed: int = 0, rate: int = 16_000) -> Sound:
    random = np.random.default_rng(seed)
    return Sound((0.1 * random.normal(size=(1, samples))).astype(np.float32), rate)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a small official file."""
    write_beats(tmp_path / "beats.pt")
    return tmp_path / "beats.pt"


def features(encoder: Encoder, *sounds: Sound) -> tuple[Tensor, Tensor]:
    found = encoder([encoder.transform(sound) for sound in sounds])
    return found.values, found.mask


def reference(
    state: dict[str, Tensor], cfg: dict[str, Any], logs: Tensor, padding: list[bool]
) -> Tensor:
    """Features (N, D) of one clip (T, 128), in double precision, one query at a time."""
    p = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    normal = (logs.double() - 15.41663) / (2 * 6.55582)
    kernel = p["patch_embedding.weight"][:, 0].flatten(1)
    patches = [
        normal[16 * t : 16 * t + 16, 16 * f : 16 * f + 16].flatten()
        for t in range(len(logs) // 16)
        for f in range(8)
    ]
    x = linear("post_extract_proj", norm("layer_norm", torch.stack(patches) @ kernel.T))
    x[torch.tensor(padding)] = 0
    lengths = p[V].square().sum(dim=(0, 1)).sqrt()
    weight, taps = p[V] * p[G] / lengths, cfg["conv_pos"]
    padded = functional.pad(x.T, (taps // 2, taps // 2))[None]
    mixed = functional.conv1d(
        padded, weight, p["encoder.pos_conv.0.bias"], groups=cfg["conv_pos_groups"]
    )
    x = x + functional.gelu(mixed[0, :, : len(x)].T)
    first = cfg["layer_norm_first"]
    x = x if first else norm("encoder.layer_norm", x)
    alpha = (2 * cfg["encoder_layers"]) ** 0.25 if cfg["deep_norm"] else 1.0
    for number in range(cfg["encoder_layers"]):
        layer = f"encoder.layers.{number}"
        inputs = norm(f"{layer}.self_attn_layer_norm", x) if first else x
        x = alpha * x + attention(p, cfg, f"{layer}.self_attn", inputs, padding)
        x = x if first else norm(f"{layer}.self_attn_layer_norm", x)
        inputs = norm(f"{layer}.final_layer_norm", x) if first else x
        x = alpha * x + linear(f"{layer}.fc2", functional.gelu(linear(f"{layer}.fc1", inputs)))
        x = x if first else norm(f"{layer}.final_layer_norm", x)
    return norm("encoder.layer_norm", x) if first else x


def attention(
    p: dict[str, Tensor], cfg: dict[str, Any], name: str, x: Tensor, padding: list[bool]
) -> Tensor:
    q, k, v = (x @ p[f"{name}.{n}_proj.weight"].T + p[f"{name}.{n}_proj.bias"] for n in "qkv")
    heads = cfg["encoder_attention_heads"]
    width = x.shape[1] // heads
    rows = []
    for query in range(len(x)):
        row = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            gate = 1.0
            if cfg["gru_rel_pos"]:
                u = p[f"{name}.grep_linear.weight"] @ q[query, part]
                u = u + p[f"{name}.grep_linear.bias"]
                a, b = torch.sigmoid(u[:4].sum()), torch.sigmoid(u[4:].sum())
                gate = a * (b * p[f"{name}.grep_a"][0, head, 0, 0] - 1) + 2
            scores = (k[:, part] @ q[query, part]) / width**0.5
            if cfg["relative_position_embedding"]:
                table = p["encoder.layers.0.self_attn.relative_attention_bias.weight"][:, head]
                buckets = [bucket(key - query, cfg) for key in range(len(x))]
                scores = scores + gate * table[buckets]
            scores[torch.tensor(padding)] = -math.inf
            row.append(torch.softmax(scores, dim=0) @ v[:, part])
        rows.append(torch.cat(row))
    return torch.stack(rows) @ p[f"{name}.out_proj.weight"].T + p[f"{name}.out_proj.bias"]


def bucket(relative: int, cfg: dict[str, Any]) -> int:
    half = cfg["num_buckets"] // 2
    exact, distance = half // 2, abs(relative)
    if distance >= exact:
        growth = math.log(distance / exact) / math.log(cfg["max_distance"] / exact)
        distance = min(exact + int(growth * (half - exact)), half - 1)
    return distance + (half if relative > 0 else 0)


def logs_of(*sounds: Sound) -> Tensor:
    """Filter banks (B, T, 128) of zero-padded clips."""
    longest = max(sound.waveform.shape[1] for sound in sounds)
    padded = [np.pad(s.waveform[0], (0, longest - s.waveform.shape[1])) for s in sounds]
    return fbank(torch.from_numpy(np.stack(padded)), mel_filters())


def test_the_network_has_the_official_tensors() -> None:
    with torch.device("meta"):
        network = BeatsNetwork(config(BEATS_CFG))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == beats_shapes(BEATS_CFG)
    assert len(shapes) == 250
    assert sum(parameter.numel() for parameter in network.parameters()) == 90_311_792


def config(cfg: dict[str, Any]) -> BeatsConfig:
    known = BeatsConfig.__dataclass_fields__
    return BeatsConfig(**{name: value for name, value in cfg.items() if name in known})


@pytest.mark.parametrize(
    ("relative", "expected"),
    [
        *((0, 0), (-1, 1), (1, 161), (79, 239), (80, 240), (100, 247), (200, 271), (400, 295)),
        *((799, 319), (800, 319), (5000, 319), (-5000, 159), (-100, 87)),
    ],
)
def test_relative_positions_fall_into_the_official_buckets(relative: int, expected: int) -> None:
    assert relative_buckets(torch.tensor([relative]), config(BEATS_CFG)).tolist() == [expected]
    assert bucket(relative, BEATS_CFG) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_those_of_the_plain_architecture(variant: str, tmp_path: Path) -> None:
    cfg = SMALL_BEATS | VARIANTS[variant]
    state = write_beats(tmp_path / "beats.pt", cfg)
    sound = noise(8_200)
    values, mask = features(build_encoder("beats", {}, tmp_path / "beats.pt"), sound)
    expected = reference(state, cfg, logs_of(sound)[0], [False] * 24)
    assert values.shape == (1, 24, 32)
    assert mask.all()
    assert (values[0] - expected).abs().max() < 2e-5


def test_absent_keys_of_cfg_have_the_official_defaults(tmp_path: Path) -> None:
    cfg = {k: v for k, v in SMALL_BEATS.items() if k not in ("deep_norm", "max_distance")}
    state = write_beats(tmp_path / "beats.pt", SMALL_BEATS)
    torch.save({"cfg": cfg, "model": state}, tmp_path / "other.pt")
    encoder = build_encoder("beats", {}, tmp_path / "other.pt")
    assert encoder.fingerprint != build_encoder("beats", {}, tmp_path / "beats.pt").fingerprint
    values, _ = features(encoder, noise(8_200))
    defaults = SMALL_BEATS | {"deep_norm": False, "max_distance": 1280}
    expected = reference(state, defaults, logs_of(noise(8_200))[0], [False] * 24)
    assert (values[0] - expected).abs().max() < 2e-5


SOUNDS = (noise(8_200, 1), noise(3_000, 2), noise(5_500, 3))


def test_in_a_batch_a_clip_has_its_own_tokens(file: Path) -> None:
    encoder = build_encoder("beats", {}, file)
    values, mask = features(encoder, *SOUNDS)
    assert mask.sum(dim=1).tolist() == [24, 8, 16]
    for row, sound in enumerate(SOUNDS):
        alone, _ = features(encoder, sound)
        assert (values[row][mask[row]] - alone[0]).abs().max() < 1e-5
        assert not values[row][~mask[row]].any()


def test_padding_as_in_the_official_batch(file: Path) -> None:
    """Which frames and tokens count is found here group by group, as the official rule says."""
    state = write_beats(file)
    encoder = build_encoder("beats", {"padding": "batch"}, file)
    values, mask = features(encoder, *SOUNDS)
    logs = logs_of(*SOUNDS)
    frames = logs.shape[1]
    group = 8_200 // frames
    for row, sound in enumerate(SOUNDS):
        length = sound.waveform.shape[1]
        padded_frames = [group * frame >= length for frame in range(frames)]
        per_token = frames // 24
        padding = [all(padded_frames[t * per_token : (t + 1) * per_token]) for t in range(24)]
        assert mask[row].tolist() == [not entry for entry in padding]
        expected = reference(state, SMALL_BEATS, logs[row], padding)
        assert (values[row] - expected)[mask[row]].abs().max() < 2e-5


def test_masks_shrink_by_whole_groups() -> None:
    samples = torch.arange(160_000)[None] >= torch.tensor([[80_000], [160_000]])
    tokens = reduce_mask(reduce_mask(samples, 998), 496)
    assert (~tokens).sum(dim=1).tolist() == [250, 496]
    assert reduce_mask(torch.tensor([[False, True, True, True, True]]), 2).tolist() == [
        [False, True]
    ]


def test_a_large_batch_is_attended_to_in_parts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("beats", {}, file)
    whole, _ = features(encoder, *SOUNDS)
    monkeypatch.setattr(beats_network, "LARGEST_BIAS", 1)
    parts, _ = features(encoder, *SOUNDS)
    assert (whole - parts).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("seconds", "tokens"), [(0.1, 8), (0.175, 8), (1, 48), (5, 248), (10, 496), (20, 992)]
)
def test_tokens_are_counted_by_the_clips_length(file: Path, seconds: float, tokens: int) -> None:
    encoder: Any = build_encoder("beats", {"max_seconds": 20.0}, file)
    assert encoder.num_tokens(round(16_000 * seconds)) == tokens
    assert encoder.max_tokens == 992
    if seconds <= 1:
        assert features(encoder, noise(round(16_000 * seconds)))[1].sum() == tokens


def test_the_largest_count_is_that_of_thirty_seconds(file: Path) -> None:
    assert build_encoder("beats", {}, file).max_tokens == 1496


def test_a_long_clip_is_cut(file: Path) -> None:
    encoder = build_encoder("beats", {"max_seconds": 0.5}, file)
    long, short = noise(48_000), noise(48_000)
    short.waveform = short.waveform[:, :8_000]
    assert torch.equal(encoder.transform(long), encoder.transform(short))
    assert features(encoder, long)[0].shape[1] == encoder.max_tokens == 24


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 2_799])
@pytest.mark.parametrize("loudness", [0.0, 1.0])
def test_short_and_silent_clips_give_numbers(file: Path, samples: int, loudness: float) -> None:
    encoder = build_encoder("beats", {}, file)
    sound = noise(samples)
    sound.waveform *= loudness
    values, mask = features(encoder, sound, noise(8_000))
    assert torch.isfinite(values).all()
    assert mask.sum(dim=1).tolist() == [8, 24]
    silence = Sound(np.zeros((1, 2_800), np.float32), 16_000)
    silence.waveform[:, :samples] = sound.waveform
    assert torch.allclose(values[0, :8], features(encoder, silence)[0][0], atol=1e-5)


def test_sounds_are_mixed_and_resampled_to_16_khz(file: Path) -> None:
    encoder = build_encoder("beats", {}, file)
    time = np.arange(22_050) / 44_100
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    signal = encoder.transform(Sound(np.stack([1.5 * tone, 0.5 * tone]), 44_100))
    expected = np.sin(2 * np.pi * 440 * np.arange(8_000) / 16_000)
    assert signal.shape == (8_000,)
    assert np.abs(signal.numpy() - expected)[500:-500].max() < 2e-3


def layouts(state: dict[str, Tensor], folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Write one network in every accepted layout; return the files and the options they need."""
    newer = {k: v for k, v in state.items() if k not in (G, V)}
    newer |= {f"{PARAMETRIZED}0": state[G], f"{PARAMETRIZED}1": state[V]}
    tuned = state | {"predictor.weight": torch.ones(5, 32), "predictor.bias": torch.ones(5)}
    cfg = SMALL_BEATS | {"finetuned_model": True, "predictor_class": 5}
    torch.save({"cfg": SMALL_BEATS, "model": newer}, folder / "newer.pt")
    torch.save({"cfg": cfg, "model": tuned, "label_dict": {0: "/m/1"}}, folder / "tuned.pt")
    torch.save(state, folder / "flat.pt")
    save_file(state, folder / "bare.safetensors")
    save_file(state, folder / "cfg.safetensors", {"cfg": json.dumps(SMALL_BEATS)})
    given = {"cfg": SMALL_BEATS}
    return [
        (folder / "newer.pt", {}),
        (folder / "tuned.pt", {}),
        (folder / "cfg.safetensors", {}),
        (folder / "flat.pt", given),
        (folder / "bare.safetensors", given),
    ]


def test_every_layout_gives_the_same_features(file: Path, tmp_path: Path) -> None:
    expected, _ = features(build_encoder("beats", {}, file), noise(4_000))
    for path, options in layouts(random_state(beats_shapes(SMALL_BEATS)), tmp_path):
        found, _ = features(build_encoder("beats", options, path), noise(4_000))
        assert torch.equal(found, expected), path.name


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "beats.pt"
    name = "encoder.layers.1.fc1.weight"

    def refused(cfg: Any, message: str, kind: type[Exception] = DataError, **change: Any) -> None:
        state = random_state(beats_shapes(SMALL_BEATS)) | change
        kept = {key: value for key, value in state.items() if value is not None}
        torch.save({"cfg": cfg, "model": kept} if cfg else kept, path)
        with pytest.raises(kind, match=message):
            build_encoder("beats", {}, path)

    refused(SMALL_BEATS, f"no tensor '{name}'", **{name: None})
    refused(SMALL_BEATS, "holds 'extra'", extra=torch.ones(1))
    refused(SMALL_BEATS, r"shape \(2, 2\)", **{name: torch.ones(2, 2)})
    refused(SMALL_BEATS, "not finite", **{name: torch.full((48, 32), math.nan)})
    refused(SMALL_BEATS | {"encoder_layers": 2}, "holds 'encoder.layers.2")
    refused(SMALL_BEATS | {"activation_fn": "swish"}, "only 'gelu'")
    refused(SMALL_BEATS | {"input_patch_size": 10}, "must divide 128")
    refused(SMALL_BEATS | {"encoder_layers": "three"}, "expected int")
    refused(None, "give its cfg as the encoder's option", InputError)


def test_a_second_cfg_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="remove the option 'cfg'"):
        build_encoder("beats", {"cfg": SMALL_BEATS}, file)


@pytest.mark.parametrize("seconds", [0.0, MAX_AUDIO_SECONDS + 0.1])
def test_clips_are_no_longer_than_what_is_read(file: Path, seconds: float) -> None:
    message = rf"max_seconds is {seconds}; it must be in \(0, {MAX_AUDIO_SECONDS}\]"
    with pytest.raises(InputError, match=message):
        build_encoder("beats", {"max_seconds": seconds}, file)
    build_encoder("beats", {"max_seconds": float(MAX_AUDIO_SECONDS)}, file)
