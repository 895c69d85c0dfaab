"""Choosing points of a cloud: farthest point sampling and nearest neighbours, batched.

Shape letters: B clouds, N points, G groups, M points of a group. Coordinates are fp32, and a cloud
that is shorter than the batch's longest is padded with copies of its first point: they are at
distance 0 from a chosen point, so they are never the farthest.
"""

import torch
from torch import Tensor


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Return indices (B, count) of points far from each other, beginning with the first point.

    Each next point is the one farthest from those chosen before. The official code starts at a
    random point, so that a cloud's features change from call to call; here they don't.

    Args:
        points: coordinates (B, 3, N), contiguous.
        count: how many points to choose.
    """
    batch, _, total = points.shape
    chosen = torch.zeros(batch, count, dtype=torch.long, device=points.device)
    nearest = points.new_full((batch, total), 1e10)
    offsets, distance = torch.empty_like(points), torch.empty_like(nearest)
    last = chosen.new_zeros(batch, 1, 1)
    for number in range(1, count):
        torch.sub(points, points.gather(2, last.expand(-1, 3, -1)), out=offsets)
        torch.sum(offsets.square_(), dim=1, out=distance)
        torch.minimum(nearest, distance, out=nearest)
        last = nearest.argmax(dim=1)[:, None, None]
        chosen[:, number] = last[:, 0, 0]
    return chosen


def nearest_points(points: Tensor, centres: Tensor, count: int, lengths: Tensor) -> Tensor:
    """Return indices (B, G, count) of the points nearest to each centre, in no order.

    Args:
        points: coordinates (B, 3, N).
        centres: coordinates (B, 3, G).
        count: how many neighbours a centre has, itself among them.
        lengths: (B,) how many of the N points are the cloud's own.
    """
    distance = centres.transpose(1, 2) @ points
    distance.mul_(-2).add_(centres.square().sum(dim=1)[:, :, None])
    distance.add_(points.square().sum(dim=1)[:, None, :])
    outside = torch.arange(points.shape[2], device=points.device) >= lengths[:, None]
    if outside.any():
        distance.masked_fill_(outside[:, None, :], torch.inf)
    return distance.topk(count, dim=2, largest=False, sorted=False).indices
