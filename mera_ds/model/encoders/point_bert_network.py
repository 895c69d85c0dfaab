"""The network of Point-BERT v1.2 as PointLLM uses it (Yu et al. 2022; Xu et al. 2024).

Written from the architecture, with the official file's names of parameters. Shape letters: B
clouds, G groups, M points of a group, P values of a point, N tokens (1 + G), D width, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mera_ds.errors import InputError

POINT_WIDTH, GROUP_WIDTH, JOINT_WIDTH = 128, 256, 512
"""Widths inside the network that sees a group."""


@dataclass(frozen=True, kw_only=True)
class PointBertConfig:
    """The architecture; names and defaults are those of the official v1.2."""

    trans_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    group_size: int = 32
    num_group: int = 512
    encoder_dims: int = 256
    use_color: bool = True

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in (
            "trans_dim", "depth", "num_heads", "group_size", "num_group", "encoder_dims",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.trans_dim % self.num_heads:
            raise InputError(
                f"trans_dim is {self.trans_dim}; it must be a multiple of "
                f"num_heads={self.num_heads}"
            )

    @property
    def point_dims(self) -> int:
        """Values of a point: its place, and its colour if that is used."""
        return 6 if self.use_color else 3


class GroupEncoder(nn.Module):
    """A small PointNet: every group of points becomes one vector, whatever their order."""

    def __init__(self, config: PointBertConfig) -> None:
        super().__init__()
        self.first_conv: Any = nn.Sequential(
            nn.Conv1d(config.point_dims, POINT_WIDTH, 1),
            nn.BatchNorm1d(POINT_WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv1d(POINT_WIDTH, GROUP_WIDTH, 1),
        )
        self.second_conv: Any = nn.Sequential(
            nn.Conv1d(2 * GROUP_WIDTH, JOINT_WIDTH, 1),
            nn.BatchNorm1d(JOINT_WIDTH),
            nn.ReLU(inplace=True),
            nn.Conv1d(JOINT_WIDTH, config.encoder_dims, 1),
        )

    def forward(self, groups: Tensor) -> Tensor:
        """(B, G, M, P) -> (B, G, encoder_dims)."""
        first, norm, relu, second = self.first_conv
        values = pointwise(groups.flatten(0, 2), first.weight, first.bias)
        local = pointwise(relu(norm(values)), second.weight, second.bias)
        whole = local.unflatten(0, (-1, groups.shape[2])).amax(dim=1)
        # The next layer sees (whole, local); the whole's part is the same for all of its points.
        joint, norm, relu, last = self.second_conv
        of_whole = pointwise(whole, joint.weight[:, :GROUP_WIDTH], joint.bias)
        of_local = pointwise(local, joint.weight[:, GROUP_WIDTH:], None)
        values = (of_local.unflatten(0, (-1, groups.shape[2])) + of_whole[:, None]).flatten(0, 1)
        tokens = pointwise(relu(norm(values)), last.weight, last.bias)
        return tokens.unflatten(0, groups.shape[:3]).amax(dim=2)


def pointwise(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a convolution of width 1 to rows (n, C): much faster than a convolution on a CPU."""
    return F.linear(values, weight[..., 0], bias)


class Attention(nn.Module):
    """Self-attention; one projection without bias gives queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        parts = self.qkv(hidden).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value)
        return self.proj(seen.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(hidden)))


class Block(nn.Module):
    """A transformer block with its norms in front."""

    def __init__(self, config: PointBertConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.trans_dim)
        self.attn = Attention(config.trans_dim, config.num_heads)
        self.norm2 = nn.LayerNorm(config.trans_dim)
        self.mlp = Mlp(config.trans_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class Blocks(nn.Module):
    """The blocks; places are added to the input of each of them."""

    def __init__(self, config: PointBertConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, hidden: Tensor, places: Tensor) -> Tensor:
        """(B, N, D), (B, N, D) -> (B, N, D)."""
        for block in self.blocks:
            hidden = block(hidden + places)
        return hidden


class PointBertNetwork(nn.Module):
    """The network behind the grouping: 160 tensors, 21,859,200 parameters as v1.2."""

    def __init__(self, config: PointBertConfig) -> None:
        super().__init__()
        width = config.trans_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = GroupEncoder(config)
        self.reduce_dim = nn.Linear(config.encoder_dims, width)
        self.pos_embed = nn.Sequential(
            nn.Linear(3, POINT_WIDTH), nn.GELU(), nn.Linear(POINT_WIDTH, width)
        )
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(width)

    def forward(self, groups: Tensor, centres: Tensor) -> Tensor:
        """Return tokens (B, 1 + G, D), that of the whole cloud first.

        Args:
            groups: points (B, G, M, P), their places relative to the centre.
            centres: (B, G, 3).
        """
        batch = len(groups)
        tokens = self.reduce_dim(self.encoder(groups))
        hidden = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        places = torch.cat([self.cls_pos.expand(batch, -1, -1), self.pos_embed(centres)], dim=1)
        return self.norm(self.blocks(hidden, places))
