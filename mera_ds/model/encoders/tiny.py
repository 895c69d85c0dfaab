"""Tiny encoders: random frozen projections of a few thousand weights, one kind a medium.

They need no weights file and take milliseconds, for tests and first tries. A random projection
keeps what is linearly separable separable, so simple classes can be learned through them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mera_ds.batch import Features
from mera_ds.errors import InputError
from mera_ds.model.encoders.base import Encoder
from mera_ds.model.encoders.pointcloud import depth_maps
from mera_ds.model.encoders.visual import even_indices, to_square
from mera_ds.model.encoders.waveform import Waveform

SIDE = 8
"""Pixels a side of what one token sees of a picture."""
PICTURE_WIDTH = 3 * SIDE * SIDE
FRAMES = 4
SEGMENTS = 4
SEGMENTS_PER_SECOND = 4
SEMITONES = 64
LOWEST_HERTZ = 110.0


@dataclass(frozen=True)
class TinyOptions:
    """Options of the kinds `tiny-*`."""

    feature_dim: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.feature_dim < 1:
            raise InputError(f"feature_dim is {self.feature_dim}; it must be at least 1")


class TinyEncoder(Encoder):
    """Maps each row of `transform`'s (N, P) to a token by one random layer with tanh."""

    Options = TinyOptions
    input_width: int
    """P, set by each kind."""

    def __init__(self, kind: str, options: TinyOptions, weights: Path | None) -> None:
        super().__init__(kind, options, weights)
        if weights is not None:
            raise InputError(f"encoder '{kind}' takes no weights file; remove {weights}")
        self.feature_dim = options.feature_dim
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.feature_dim, self.input_width)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) / shape[1] ** 0.5)
        self.freeze()

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode media (N, P) each; short ones are padded with tokens outside the mask."""
        shape = (len(inputs), self.max_tokens, self.input_width)
        rows = torch.zeros(shape, device=self.weight.device)
        mask = torch.zeros(shape[:2], dtype=torch.bool, device=self.weight.device)
        for number, tokens in enumerate(inputs):
            rows[number, : len(tokens)] = tokens
            mask[number, : len(tokens)] = True
        values = torch.tanh(rows.to(self.weight.dtype) @ self.weight.T)
        return Features(values.float(), mask)


class TinyImageEncoder(TinyEncoder):
    """Kind `tiny-image`: the four quarters of a picture of 16 x 16 pixels."""

    media = "image"
    max_tokens = 4
    input_width = PICTURE_WIDTH

    def transform(self, media: Image.Image) -> Tensor:
        """RGB image -> (4, 192), in [-1, 1]."""
        pixels = _signed(to_square(media, 2 * SIDE)).view(3, 2, SIDE, 2, SIDE)
        return pixels.permute(1, 3, 0, 2, 4).reshape(4, PICTURE_WIDTH)


class TinyVideoEncoder(TinyEncoder):
    """Kind `tiny-video`: four frames of 8 x 8 pixels."""

    media = "video"
    max_tokens = FRAMES
    input_width = PICTURE_WIDTH

    def transform(self, media: NDArray[np.uint8]) -> Tensor:
        """RGB frames (F, H, W, 3) -> (4, 192), in [-1, 1]."""
        frames = [media[index] for index in even_indices(len(media), FRAMES)]
        return torch.stack([_signed(to_square(Image.fromarray(f), SIDE)).flatten() for f in frames])


class TinyAudioEncoder(TinyEncoder):
    """Kind `tiny-audio`: up to four quarter seconds, each as 64 semitones from 110 Hz."""

    media = "audio"
    max_tokens = SEGMENTS
    input_width = SEMITONES

    def transform(self, media: Waveform) -> Tensor:
        """Sound -> (1 to 4, 64) log magnitudes; a started quarter second counts."""
        segment = max(media.rate // SEGMENTS_PER_SECOND, 2)
        signal = torch.from_numpy(media.waveform[:, : SEGMENTS * segment]).mean(dim=0)
        padded = torch.zeros(-(-len(signal) // segment) * segment)
        padded[: len(signal)] = signal
        spectrum = torch.fft.rfft(padded.view(-1, segment)).abs()[:, 1:]
        hertz = torch.arange(1, spectrum.shape[1] + 1) * media.rate / segment
        semitone = (12 * torch.log2(hertz / LOWEST_HERTZ)).floor().long()
        heard = (semitone >= 0) & (semitone < SEMITONES)
        bands = torch.zeros(len(spectrum), SEMITONES)
        places = semitone[heard].expand(len(spectrum), -1)
        return torch.log1p(bands.scatter_reduce(1, places, spectrum[:, heard], reduce="amax"))


class TinyPointCloudEncoder(TinyEncoder):
    """Kind `tiny-pointcloud`: depth maps of 8 x 8 pixels along the three axes."""

    media = "pointcloud"
    max_tokens = 3
    input_width = SIDE * SIDE

    def transform(self, media: NDArray[np.float32]) -> Tensor:
        """Points (N, 3 or 6) -> (3, 64), in [-1, 1]."""
        points = torch.from_numpy(np.ascontiguousarray(media[:, :3], dtype=np.float32))
        return _signed(depth_maps(points, SIDE, radius=0)).flatten(1)


def _signed(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1
