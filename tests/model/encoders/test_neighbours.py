"""Sampling and grouping of points against brute force."""

import pytest
import torch
from torch import Tensor

from mera_ds.model.encoders.neighbours import farthest_points, nearest_points


def clouds(batch: int, count: int) -> Tensor:
    return torch.randn(batch, 3, count, generator=torch.Generator().manual_seed(0))


def farthest_by_hand(points: Tensor, count: int) -> list[int]:
    """One cloud (N, 3): compare every point with every chosen one."""
    chosen = [0]
    while len(chosen) < count:
        distance = ((points[:, None] - points[None, chosen]) ** 2).sum(-1).min(dim=1).values
        chosen.append(int(distance.argmax()))
    return chosen


def test_farthest_points_are_those_of_brute_force() -> None:
    points = clouds(3, 200)
    chosen = farthest_points(points, 40)
    assert chosen.tolist() == [farthest_by_hand(cloud.T, 40) for cloud in points]
    assert all(len(set(row)) == 40 for row in chosen.tolist())


def test_padding_is_never_chosen() -> None:
    points = clouds(1, 50)
    padded = torch.cat([points, points[:, :, :1].expand(-1, -1, 30)], dim=2)
    assert torch.equal(farthest_points(padded, 50), farthest_points(points, 50))


def test_nearest_points_are_those_of_brute_force() -> None:
    points = clouds(3, 200)
    centres = points[:, :, :20].contiguous()
    near = nearest_points(points, centres, 7, torch.full((3,), 200))
    distance = (centres.transpose(1, 2)[:, :, None] - points.transpose(1, 2)[:, None]).norm(dim=-1)
    expected = distance.sort(dim=2).indices[..., :7]
    assert torch.equal(near.sort(dim=2).values, expected.sort(dim=2).values)
    assert (near == torch.arange(20)[None, :, None]).any(dim=2).all()


@pytest.mark.parametrize("own", [7, 30])
def test_points_of_the_padding_are_nobodys_neighbours(own: int) -> None:
    points = clouds(1, 50)
    near = nearest_points(points, points[:, :, :5], 7, torch.tensor([own]))
    assert near.max() < own
