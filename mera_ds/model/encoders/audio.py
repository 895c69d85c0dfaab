"""Sound encoder: the aiSFX convolutional network (Ma and Lerch, ISMIR 2022) and its front end.

The front end is computed in fp32 on the CPU by `transform`, so that it is the same whatever
precision the network runs in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mera_ds.batch import Features
from mera_ds.errors import InputError
from mera_ds.model.encoders.base import Encoder, load_weights
from mera_ds.model.encoders.waveform import Waveform, mono

SAMPLE_RATE = 44_100
WINDOW = 2048
HOP = 1024
MEL_BANDS = 96
LOUDEST = 9.4578
"""Largest log-mel value in the network's training data: it saw inputs in [0, 1]."""

BLOCK_FRAMES = 100
FRAMES_PER_TOKEN = 8
BLOCK_TOKENS = BLOCK_FRAMES // FRAMES_PER_TOKEN
FEATURE_DIM = 512


@dataclass(frozen=True)
class AisfxOptions:
    """Options of `aisfx`."""

    blocks: int = 2
    """Longest clip in blocks of 100 frames (2.32 s); the rest is cut off."""
    tokens: int = 12
    """Tokens per block, averaged from the network's 12: a divisor of 12."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.blocks < 1:
            raise InputError(f"blocks is {self.blocks}; it must be at least 1")
        if self.tokens < 1 or BLOCK_TOKENS % self.tokens:
            raise InputError(f"tokens is {self.tokens}; it must divide {BLOCK_TOKENS}")


def mel_filters() -> Tensor:
    """Return triangular filters (bands, bins), equally wide on the HTK mel scale, each of sum 1."""
    top = 2595.0 * math.log10(1.0 + SAMPLE_RATE / 2 / 700.0)
    mels = torch.linspace(0.0, top, MEL_BANDS + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    bins = torch.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = torch.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)).clamp(min=0)
    return (filters / filters.sum(1, keepdim=True)).float()


def log_mel(signal: Tensor, filters: Tensor) -> Tensor:
    """Return the network's input (frames, bands) for (n,) samples at 44.1 kHz."""
    spectrum = torch.stft(
        signal,
        WINDOW,
        HOP,
        window=torch.hann_window(WINDOW),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square()
    return torch.log10(1e4 * (filters @ power) + 1).T / LOUDEST


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU, then max pooling."""

    def __init__(self, inputs: int, outputs: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, T, M) -> (B, C', T // pool, M // pool)."""
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return F.max_pool2d(hidden, self.pool)


class AisfxNetwork(nn.Module):
    """Four blocks of 64 to 512 channels, averaged over the bands: 4,686,144 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_block1 = ConvBlock(1, 64, pool=2)
        self.conv_block2 = ConvBlock(64, 128, pool=2)
        self.conv_block3 = ConvBlock(128, 256, pool=2)
        self.conv_block4 = ConvBlock(256, FEATURE_DIM, pool=1)

    def forward(self, blocks: Tensor) -> Tensor:
        """Map log-mel blocks (B, T, 96) to tokens (B, T // 8, 512).

        The published embedding of a block is the maximum over its tokens.
        """
        hidden = self.conv_block2(self.conv_block1(blocks[:, None]))
        hidden = self.conv_block4(self.conv_block3(hidden))
        return hidden.mean(dim=3).transpose(1, 2)


class AisfxEncoder(Encoder):
    """Kind `aisfx`: a clip -> up to blocks x tokens tokens of width 512."""

    Options = AisfxOptions
    media = "audio"
    feature_dim = FEATURE_DIM

    def __init__(self, kind: str, options: AisfxOptions, weights: Path | None) -> None:
        super().__init__(kind, options, weights)
        self.max_tokens = options.blocks * options.tokens
        self.network = AisfxNetwork()
        load_weights(self.network, weights, kind)
        self.freeze()
        self._filters = mel_filters()

    def transform(self, media: Waveform) -> Tensor:
        """Sound -> log-mel frames (T, 96), 1 <= T <= 100 * blocks."""
        frames = BLOCK_FRAMES * self.options.blocks
        return log_mel(mono(media, SAMPLE_RATE, frames * HOP), self._filters)[:frames]

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """Encode clips; the mask covers the tokens with at least one frame of the clip."""
        weight = next(self.network.parameters())
        count, length = len(inputs), self.options.blocks * BLOCK_FRAMES
        frames = torch.zeros(count, length, MEL_BANDS, device=weight.device)
        real = torch.zeros(count, length, dtype=torch.bool, device=weight.device)
        for row, clip in enumerate(inputs):
            frames[row, : len(clip)] = clip
            real[row, : len(clip)] = True
        blocks = frames.view(-1, BLOCK_FRAMES, MEL_BANDS)
        seen = real.view(-1, BLOCK_FRAMES)[:, : BLOCK_TOKENS * FRAMES_PER_TOKEN]
        mask = seen.view(-1, BLOCK_TOKENS, FRAMES_PER_TOKEN).any(dim=2)
        used = mask.any(dim=1)
        tokens = torch.zeros(len(blocks), BLOCK_TOKENS, FEATURE_DIM, device=weight.device)
        tokens[used] = self.network(blocks[used].to(weight.dtype)).float()
        values, mask = average_tokens(tokens, mask, self.options.tokens)
        return Features(
            values.reshape(count, self.max_tokens, FEATURE_DIM),
            mask.reshape(count, self.max_tokens),
        )


def average_tokens(tokens: Tensor, mask: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Average neighbouring tokens (B, N, D) down to `wanted`, counting only those in the mask."""
    batch, count, width = tokens.shape
    groups = tokens.view(batch, wanted, count // wanted, width)
    weights = mask.view(batch, wanted, count // wanted, 1).to(tokens.dtype)
    values = (groups * weights).sum(dim=2) / weights.sum(dim=2).clamp(min=1)
    return values, mask.view(batch, wanted, -1).any(dim=2)
