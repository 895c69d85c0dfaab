"""Point cloud encoder of the paper: Point-BERT v1.2 of PointLLM, from its official file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mera_ds.batch import Features
from mera_ds.config import Dtype
from mera_ds.errors import InputError
from mera_ds.model.backbone import DTYPES
from mera_ds.model.encoders.base import Encoder, require_weights
from mera_ds.model.encoders.neighbours import farthest_points, nearest_points
from mera_ds.model.encoders.point_bert_network import PointBertConfig, PointBertNetwork
from mera_ds.model.official import below_prefix, load_exactly, read_official

PREFIXES = ("module.point_encoder.", "model.point_backbone.")
"""Where files hold the network: the official one, a full PointLLM; other files are flat."""


@dataclass(frozen=True, kw_only=True)
class PointBertOptions(PointBertConfig):
    """Options of `point-bert`: the architecture, and how a cloud is prepared."""

    npoints: int = 8192
    """A cloud with more points is thinned out to so many, with fewer it is taken as it is."""
    seed: int = 0
    """Which points of a larger cloud are kept."""
    normalise: bool = True
    """Move the centroid to 0 and scale the farthest point to distance 1."""
    default_color: float = 0.0
    """Colour (three times this) of clouds without colours; black in PointLLM's evaluation."""
    dtype: Dtype = "fp32"
    """Compute dtype; sampling and grouping are always fp32."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.npoints < self.least_points:
            raise InputError(
                f"npoints is {self.npoints}; num_group and group_size need {self.least_points}"
            )
        if not 0 <= self.default_color <= 1:
            raise InputError(f"default_color is {self.default_color}; it must be in [0, 1]")

    @property
    def least_points(self) -> int:
        """Smallest cloud that can be grouped; the points of a smaller one are repeated."""
        return max(self.num_group, self.group_size)


class PointBertEncoder(Encoder):
    """Kind `point-bert`: a cloud -> 513 tokens of width 384, the first one of the whole cloud."""

    Options = PointBertOptions
    media = "pointcloud"

    def __init__(self, kind: str, options: PointBertOptions, weights: Path | None) -> None:
        super().__init__(kind, options, weights)
        path = require_weights(weights, kind, "the official .pt file")
        tensors = read_official(path, f"encoder '{kind}'").tensors
        self.feature_dim = options.trans_dim
        self.max_tokens = 1 + options.num_group
        with torch.device("meta"):
            self.network = PointBertNetwork(options)
        load_exactly(self.network, below_prefix(tensors, PREFIXES), path, kind)
        self.network.to(DTYPES[options.dtype])
        self.freeze()

    def transform(self, media: NDArray[np.float32]) -> Tensor:
        """Points (N, 3 or 6), colours in [0, 1] -> (M, 6 or 3), M <= npoints."""
        points = np.asarray(media, dtype=np.float32)
        if len(points) > self.options.npoints:
            random = np.random.default_rng(self.options.seed)
            kept = random.choice(len(points), self.options.npoints, replace=False)
            points = points[np.sort(kept)]
        elif len(points) < self.options.least_points:
            points = np.resize(points, (self.options.least_points, points.shape[1]))
        places = torch.from_numpy(points[:, :3].copy())
        if self.options.normalise:
            places -= places.mean(dim=0)
            places /= places.norm(dim=1).max().clamp(min=1e-12)
        if not self.options.use_color:
            return places
        colours = torch.full_like(places, self.options.default_color)
        if points.shape[1] == 6:
            colours = torch.from_numpy(points[:, 3:].copy())
        return torch.cat([places, colours], dim=1)

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode clouds (M_b, P)."""
        weight = self.network.cls_token
        groups, centres = self._group(inputs, weight.device)
        tokens = self.network(groups.to(weight.dtype), centres.to(weight.dtype)).float()
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens, mask)

    def _group(self, clouds: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each cloud's groups (B, G, M, P), relative to their centres (B, G, 3)."""
        lengths = torch.tensor([len(cloud) for cloud in clouds], device=device)
        longest = int(lengths.max())
        points = torch.stack(
            [torch.cat([c, c[:1].expand(longest - len(c), -1)]) for c in clouds]
        ).to(device)
        places = points[..., :3].transpose(1, 2).contiguous()
        chosen = farthest_points(places, self.options.num_group)
        centres = places.gather(2, chosen[:, None].expand(-1, 3, -1))
        near = nearest_points(places, centres, self.options.group_size, lengths)
        index = near.flatten(1)[..., None].expand(-1, -1, points.shape[2])
        groups = points.gather(1, index).unflatten(1, near.shape[1:])
        centres = centres.transpose(1, 2)
        groups[..., :3] -= centres[:, :, None]
        return groups, centres
