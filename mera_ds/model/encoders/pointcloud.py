"""Point cloud encoder: depth maps along the three axes, seen by EfficientNet-Lite0.

No network that was trained on point clouds is small and free enough to come along, so the points
are drawn (the idea of PointCLIP, Zhang et al. 2022) and an image network looks at the drawings.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mera_ds.errors import InputError
from mera_ds.model.encoders.visual import EfficientNetEncoder, check_picture

VIEWS = ((2, 1, 0), (0, 1, 2), (0, 2, 1))
"""Axes (right, up, towards the viewer) of the views from the side, the front and above; y is up."""

MARGIN = 0.06
"""Empty border, as a share of the picture's side."""

FARTHEST = 0.25
"""Darkness of the farthest point; the nearest one has 1, the background 0."""


@dataclass(frozen=True)
class DepthViewsOptions:
    """Options of `depth-views`."""

    size: int = 112
    """Side of a depth map in pixels."""
    grid: int = 1
    """grid x grid tokens per view; 0 keeps every position."""
    radius: int = 1
    """A point fills a square of 2 * radius + 1 pixels a side."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_picture(self.size, self.grid)
        if not 0 <= self.radius <= self.size // 8:
            raise InputError(f"radius is {self.radius}; it must be in [0, size / 8]")


def depth_maps(points: Tensor, size: int, radius: int) -> Tensor:
    """Draw points (N, 3) from three sides; return bytes (3, size, size), white where empty.

    The cloud's bounding box is centred and scaled by its longest side, so that proportions stay.
    """
    low, high = points.amin(dim=0), points.amax(dim=0)
    scaled = (points - (low + high) / 2) / (high - low).amax().clamp(min=1e-12)
    pixels = ((scaled * (1 - 2 * MARGIN) + 0.5) * size).long().clamp(0, size - 1)
    maps = torch.zeros(len(VIEWS), size * size)
    for view, (right, up, towards) in enumerate(VIEWS):
        cells = (size - 1 - pixels[:, up]) * size + pixels[:, right]
        nearness = FARTHEST + (1 - FARTHEST) * (scaled[:, towards] + 0.5)
        maps[view].scatter_reduce_(0, cells, nearness, reduce="amax")
    darkness = F.max_pool2d(maps.view(-1, size, size), 2 * radius + 1, stride=1, padding=radius)
    return (255 * (1 - darkness.clamp(0, 1))).round().to(torch.uint8)


class DepthViewsEncoder(EfficientNetEncoder):
    """Kind `depth-views`: a cloud -> 3 x grid² tokens of width 1280: side, front, above."""

    Options = DepthViewsOptions
    media = "pointcloud"

    @property
    def pictures(self) -> int:
        """One picture a view."""
        return len(VIEWS)

    def transform(self, media: NDArray[np.float32]) -> Tensor:
        """Points (N, 3 or 6) -> depth maps (3, 1, size, size), bytes; colours are not used."""
        points = torch.from_numpy(np.ascontiguousarray(media[:, :3], dtype=np.float32))
        return depth_maps(points, self.options.size, self.options.radius)[:, None]
