"""EfficientNet-Lite0 up to its last feature map (Tan and Le 2019; the "lite" variant of 2020).

The lite variants leave out squeeze-and-excitation, use ReLU6 instead of swish, and keep stem and
head at their base widths. Paddings are TensorFlow's "same": with stride 2 the odd pixel of
padding is on the right and at the bottom.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM_WIDTH = 32
FEATURE_DIM = 1280
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Stage:
    """A run of blocks; only the first one has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, width=16),
    Stage(repeats=2, kernel=3, stride=2, expansion=6, width=24),
    Stage(repeats=2, kernel=5, stride=2, expansion=6, width=40),
    Stage(repeats=3, kernel=3, stride=2, expansion=6, width=80),
    Stage(repeats=3, kernel=5, stride=1, expansion=6, width=112),
    Stage(repeats=4, kernel=5, stride=2, expansion=6, width=192),
    Stage(repeats=1, kernel=3, stride=1, expansion=6, width=320),
)


class SameConv2d(nn.Conv2d):
    """Convolution without bias whose output has ceil(input / stride) pixels a side."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            max((-(-pixels // stride) - 1) * stride + kernel - pixels, 0)
            for pixels in input.shape[-2:]
        )
        if height or width:
            before_x, before_y = width // 2, height // 2
            input = F.pad(input, (before_x, width - before_x, before_y, height - before_y))
        return super().forward(input)


class InvertedBottleneck(nn.Module):
    """MBConv: expand 1x1, filter each channel, project 1x1; a residual where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stage: Stage, stride: int):
        super().__init__()
        hidden = inputs * stage.expansion
        self.expands = stage.expansion != 1
        if self.expands:
            self.expand_conv = SameConv2d(inputs, hidden, 1)
            self.bn0 = _norm(hidden)
        self.depthwise_conv = SameConv2d(hidden, hidden, stage.kernel, stride, groups=hidden)
        self.bn1 = _norm(hidden)
        self.project_conv = SameConv2d(hidden, outputs, 1)
        self.bn2 = _norm(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        hidden = F.relu6(self.bn0(self.expand_conv(inputs))) if self.expands else inputs
        hidden = F.relu6(self.bn1(self.depthwise_conv(hidden)))
        outputs: Tensor = self.bn2(self.project_conv(hidden))
        return outputs + inputs if self.residual else outputs


class EfficientNetLite0(nn.Module):
    """The network without its classifier: 3,371,008 parameters, 32 pixels to a token."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, STEM_WIDTH, 3, stride=2)
        self.bn0 = _norm(STEM_WIDTH)
        blocks, width = [], STEM_WIDTH
        for stage in STAGES:
            for index in range(stage.repeats):
                stride = stage.stride if index == 0 else 1
                blocks.append(InvertedBottleneck(width, stage.width, stage, stride))
                width = stage.width
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = SameConv2d(width, FEATURE_DIM, 1)
        self.bn1 = _norm(FEATURE_DIM)
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(shape), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map RGB bytes (B, 3, H, W) to features (B, 1280, H / 32, W / 32), in [0, 6]."""
        inputs = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        hidden = self.blocks(F.relu6(self.bn0(self.conv_stem(inputs))))
        return F.relu6(self.bn1(self.conv_head(hidden)))


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


def pool_grid(features: Tensor, grid: int) -> Tensor:
    """Average a map (B, D, H, W) to grid x grid tokens (B, grid², D), row by row.

    With grid 0 every position is a token.
    """
    if grid:
        features = F.adaptive_avg_pool2d(features, grid)
    return features.flatten(2).transpose(1, 2)
