"""Image and video encoders on EfficientNet-Lite0."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mera_ds.batch import Features
from mera_ds.errors import InputError
from mera_ds.model.encoders.base import Encoder, load_weights
from mera_ds.model.encoders.efficientnet import FEATURE_DIM, EfficientNetLite0, pool_grid

PIXELS_PER_POSITION = 32


@dataclass(frozen=True)
class ImageOptions:
    """Options of `efficientnet-lite0`."""

    size: int = 224
    """Side in pixels to which images are padded and resized."""
    grid: int = 2
    """grid x grid tokens per picture; 0 keeps every position (49 at 224 pixels)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_picture(self.size, self.grid)


@dataclass(frozen=True)
class VideoOptions:
    """Options of `efficientnet-lite0-frames`."""

    size: int = 224
    grid: int = 1
    """grid x grid tokens per frame; 0 keeps every position."""
    frames: int = 4
    """How many frames to take, evenly from the first to the last one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_picture(self.size, self.grid)
        if self.frames < 1:
            raise InputError(f"frames is {self.frames}; it must be at least 1")


def check_picture(size: int, grid: int) -> None:
    """Raise `InputError` unless a picture of `size` pixels can give `grid` x `grid` tokens."""
    if size < PIXELS_PER_POSITION:
        raise InputError(f"size is {size}; it must be at least {PIXELS_PER_POSITION} pixels")
    if not 0 <= grid <= positions(size):
        raise InputError(f"grid is {grid}; at size {size} it must be in [0, {positions(size)}]")


def positions(size: int) -> int:
    """Return the side of the feature map of a picture of `size` pixels."""
    return -(-size // PIXELS_PER_POSITION)


def tokens_per_picture(size: int, grid: int) -> int:
    """Return how many tokens `pool_grid` makes of a picture."""
    return (grid or positions(size)) ** 2


def to_square(image: Image.Image, size: int) -> Tensor:
    """Pad an RGB image to a square with white, resize it; return bytes (3, size, size)."""
    square = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def even_indices(count: int, wanted: int) -> list[int]:
    """Return `wanted` indices into a clip of `count` frames, from the first to the last one.

    The positions are rounded down, as in LLaVA-NeXT; a clip shorter than `wanted` repeats frames.
    """
    return [int(index) for index in np.linspace(0, count - 1, wanted)]


class EfficientNetEncoder(Encoder):
    """What the kinds have in common that show pictures to EfficientNet-Lite0."""

    feature_dim = FEATURE_DIM

    def __init__(self, kind: str, options: Any, weights: Path | None) -> None:
        super().__init__(kind, options, weights)
        self.max_tokens = self.pictures * tokens_per_picture(options.size, options.grid)
        self.network = EfficientNetLite0()
        load_weights(self.network, weights, kind)
        self.freeze()

    @property
    def pictures(self) -> int:
        """How many pictures make one medium; all tokens of all of them are real."""
        return 1

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode B media, each bytes (pictures, 3 or 1, size, size); the tokens keep that order."""
        pixels = torch.cat(list(inputs)).expand(-1, 3, -1, -1).to(self.network.mean.device)
        tokens = pool_grid(self.network(pixels), self.options.grid).float()
        values = tokens.reshape(len(inputs), self.max_tokens, FEATURE_DIM)
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Features(values, mask)


class ImageEncoder(EfficientNetEncoder):
    """Kind `efficientnet-lite0`: one image -> grid² tokens of width 1280."""

    Options = ImageOptions
    media = "image"

    def transform(self, media: Image.Image) -> Tensor:
        """RGB image -> bytes (1, 3, size, size)."""
        return to_square(media, self.options.size)[None]


class VideoEncoder(EfficientNetEncoder):
    """Kind `efficientnet-lite0-frames`: a clip -> frames x grid² tokens, in order of time."""

    Options = VideoOptions
    media = "video"

    @property
    def pictures(self) -> int:
        """Frames that are looked at."""
        return self.options.frames

    def transform(self, media: NDArray[np.uint8]) -> Tensor:
        """RGB frames (F, H, W, 3) -> bytes (frames, 3, size, size)."""
        chosen = even_indices(len(media), self.options.frames)
        return torch.stack(
            [to_square(Image.fromarray(media[index]), self.options.size) for index in chosen]
        )
