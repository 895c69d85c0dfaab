"""Point-BERT: the official file's layouts, and features against the plain architecture."""

import argparse
import time
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
from mera_ds.model.encoders import Encoder, build_encoder
from mera_ds.model.encoders.neighbours import farthest_points
from mera_ds.model.encoders.point_bert_network import PointBertConfig, PointBertNetwork

from .official_files import (
    SMALL_POINT_BERT,
    point_bert_shapes,
    random_state,
    write_point_bert,
)

HEADS, GROUPS, NEIGHBOURS = 4, 12, 6


def cloud(count: int = 60, seed: int = 0, width: int = 6) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    points = np.concatenate([3 * random.normal(size=(count, 3)), random.random((count, 3))], axis=1)
    return points[:, :width].astype(np.float32)


def build(path: Path, **options: Any) -> Encoder:
    return build_encoder("point-bert", SMALL_POINT_BERT | options, path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a small official file."""
    write_point_bert(tmp_path / "point_bert_v1.2.pt")
    return tmp_path / "point_bert_v1.2.pt"


def reference(state: dict[str, Tensor], points: Tensor) -> Tensor:
    """Features (1 + G, D) of one normalised cloud (N, 6), in double precision, group by group."""
    p = {name: tensor.double() for name, tensor in state.items()}
    x = points.double()

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].flatten(1).T + p.get(f"{name}.bias", torch.zeros(()))

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def batch_norm(name: str, x: Tensor) -> Tensor:
        scale = p[f"{name}.weight"] / (p[f"{name}.running_var"] + 1e-5).sqrt()
        return (x - p[f"{name}.running_mean"]) * scale + p[f"{name}.bias"]

    chosen = [0]
    while len(chosen) < GROUPS:
        nearest = torch.stack([(x[:, :3] - x[c, :3]).square().sum(1) for c in chosen]).amin(dim=0)
        chosen.append(int(nearest.argmax()))
    tokens, places = [p["cls_token"][0, 0]], [p["cls_pos"][0, 0]]
    for centre in x[chosen, :3]:
        near = (x[:, :3] - centre).square().sum(dim=1).argsort()[:NEIGHBOURS]
        group = torch.cat([x[near, :3] - centre, x[near, 3:]], dim=1)
        hidden = linear("encoder.first_conv.0", group)
        hidden = batch_norm("encoder.first_conv.1", hidden).relu()
        hidden = linear("encoder.first_conv.3", hidden)
        whole = hidden.amax(dim=0).expand(NEIGHBOURS, -1)
        hidden = linear("encoder.second_conv.0", torch.cat([whole, hidden], dim=1))
        hidden = batch_norm("encoder.second_conv.1", hidden).relu()
        tokens.append(linear("reduce_dim", linear("encoder.second_conv.3", hidden).amax(dim=0)))
        places.append(linear("pos_embed.2", functional.gelu(linear("pos_embed.0", centre))))
    x, place = torch.stack(tokens), torch.stack(places)
    width = x.shape[1] // HEADS
    for number in range(SMALL_POINT_BERT["depth"]):
        block = f"blocks.blocks.{number}"
        x = x + place
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).view(-1, 3, HEADS, width)
        q, k, v = qkv.permute(1, 2, 0, 3)
        seen = torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1) @ v
        x = x + linear(f"{block}.attn.proj", seen.transpose(0, 1).flatten(1))
        hidden = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)


def test_the_network_has_the_official_tensors() -> None:
    with torch.device("meta"):
        network = PointBertNetwork(PointBertConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == point_bert_shapes({"trans_dim": 384, "depth": 12, "encoder_dims": 256})
    assert len(shapes) == 160
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_859_200


def test_features_are_those_of_the_plain_architecture(file: Path) -> None:
    state = write_point_bert(file)
    encoder = build(file)
    points = encoder.transform(cloud())
    features = encoder([points])
    assert features.values.shape == (1, 1 + GROUPS, 32)
    assert features.mask.all()
    assert (features.values[0] - reference(state, points)).abs().max() < 2e-5
    assert encoder.max_tokens == 1 + GROUPS


def test_clouds_of_different_sizes_share_a_batch(file: Path) -> None:
    encoder = build(file)
    inputs = [encoder.transform(cloud(count, count)) for count in (60, 12, 100)]
    together = encoder(inputs).values
    for row, points in enumerate(inputs):
        assert (together[row] - encoder([points]).values[0]).abs().max() < 1e-5


def test_the_cloud_is_moved_into_the_unit_sphere(file: Path) -> None:
    points = build(file).transform(cloud() * 5 + 2)
    assert points[:, :3].mean(dim=0).abs().max() < 1e-5
    assert points[:, :3].norm(dim=1).max() == pytest.approx(1)
    kept = build(file, normalise=False).transform(cloud())
    assert torch.equal(kept, torch.from_numpy(cloud()))
    assert torch.equal(build(file).transform(cloud())[:, 3:], kept[:, 3:])
    same = np.ones((20, 3), np.float32)
    assert torch.isfinite(build(file)([build(file).transform(same)]).values).all()


def test_colours_are_added_where_there_are_none(file: Path) -> None:
    bare = cloud(width=3)
    assert not build(file).transform(bare)[:, 3:].any()
    assert (build(file, default_color=0.5).transform(bare)[:, 3:] == 0.5).all()
    black = np.concatenate([bare, np.zeros_like(bare)], axis=1)
    assert torch.equal(build(file).transform(bare), build(file).transform(black))


def test_large_clouds_are_thinned_out_and_small_ones_repeated(file: Path) -> None:
    large = cloud(500)
    first, again = build(file).transform(large), build(file).transform(large)
    assert first.shape == (100, 6)
    assert torch.equal(first, again)
    assert not torch.equal(first, build(file, seed=1).transform(large))
    colours = {tuple(row) for row in large[:, 3:].tolist()}
    assert {tuple(row) for row in first[:, 3:].tolist()} <= colours
    few = build(file).transform(cloud(5))
    assert few.shape == (GROUPS, 6)
    assert torch.equal(few[5:10], few[:5])
    assert torch.isfinite(build(file)([few]).values).all()


def test_a_network_without_colours(tmp_path: Path) -> None:
    state = random_state(point_bert_shapes(SMALL_POINT_BERT))
    state["encoder.first_conv.0.weight"] = state["encoder.first_conv.0.weight"][:, :3].clone()
    save_file(state, tmp_path / "bare.safetensors")
    encoder = build(tmp_path / "bare.safetensors", use_color=False)
    points = encoder.transform(cloud())
    assert points.shape == (60, 3)
    assert encoder([points]).values.shape == (1, 1 + GROUPS, 32)


def test_every_layout_gives_the_same_features(file: Path, tmp_path: Path) -> None:
    expected = build(file)([build(file).transform(cloud())]).values
    state = random_state(point_bert_shapes(SMALL_POINT_BERT))
    torch.save(state, tmp_path / "flat.pt")
    save_file(state, tmp_path / "flat.safetensors")
    whole = {f"model.point_backbone.{name}": tensor for name, tensor in state.items()}
    whole["model.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)
    torch.save(whole, tmp_path / "pytorch_model.bin")
    wrapped = {f"module.point_encoder.{name}": tensor for name, tensor in state.items()}
    training = {
        "state_dict": wrapped,
        "args": argparse.Namespace(lr=1e-3, output_dir="x"),
        "best_acc1": np.float64(0.5),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
    }
    torch.save(training, tmp_path / "training.pt")
    for name in ("flat.pt", "flat.safetensors", "pytorch_model.bin", "training.pt"):
        encoder = build(tmp_path / name)
        assert torch.equal(encoder([encoder.transform(cloud())]).values, expected), name


def test_files_that_do_not_fit_are_refused(file: Path) -> None:
    with pytest.raises(DataError, match=r"holds 'blocks\.blocks\.2\."):
        build(file, depth=2)
    with pytest.raises(DataError, match=r"no tensor 'blocks\.blocks\.3\."):
        build(file, depth=4)
    with pytest.raises(DataError, match="has shape"):
        build(file, use_color=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads=5"),
        ({"group_size": 0}, "group_size is 0"),
        ({"npoints": 11}, "need 12"),
        ({"default_color": 2.0}, "default_color is 2.0"),
        ({"num_groups": 4}, "did you mean 'num_group'"),
    ],
)
def test_wrong_options_are_refused(file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(file, **options)


@pytest.mark.slow
def test_choosing_centres_is_cheaper_than_encoding() -> None:
    """Those of 16 clouds, against the network on 2 of them; one core: 0.2 s against 1.1 s."""
    points = torch.randn(16, 3, 8192, generator=torch.Generator().manual_seed(0))
    network = PointBertNetwork(PointBertConfig()).eval()
    start = time.perf_counter()
    farthest_points(points, 512)
    chosen = time.perf_counter()
    with torch.no_grad():
        network(torch.randn(2, 512, 32, 6), torch.randn(2, 512, 3))
    assert chosen - start < time.perf_counter() - chosen
