"""A modality of one's own, in one file: series of an inertial measurement unit (IMU).

A medium is a NumPy file (T, 6): T samples at 50 Hz of an accelerometer (x, y, z in g) and a
gyroscope (x, y, z in rad/s). Three things make a modality:

    decoder     bytes -> series (T, 6)
    transform   series -> the network's input (N, P), on the CPU
    forward     inputs of B media -> features (B, N, D), by a frozen network

N windows of 0.64 s, each with P = 6 x (1 mean + 16 magnitudes) = 102 numbers, become N tokens of
width D. The network here is one random layer, which keeps apart what is apart; with a pretrained
one, load its weights in `__init__` (`load_weights`) and give their path as `weights` in the YAML.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mera_ds.plugin import Encoder, Features, pad_features, register_decoder, register_encoder

CHANNELS = 6
WINDOW = 32
BINS = WINDOW // 2
INPUT_WIDTH = CHANNELS * (1 + BINS)


def decode_series(content: bytes, extension: str) -> Tensor:
    """Return the series (T, 6), fp32; an error that is raised here names the sample."""
    series = np.load(io.BytesIO(content), allow_pickle=False)
    if series.ndim != 2 or series.shape[1] != CHANNELS or not len(series):
        raise ValueError(f"its shape is {series.shape}, expected (T, {CHANNELS}) with T > 0")
    if not np.isfinite(series).all():
        raise ValueError("it has values that are not finite")
    return torch.from_numpy(series.astype(np.float32))


@dataclass(frozen=True)
class ImuOptions:
    """What `encoder: {kind: imu, options: …}` takes."""

    feature_dim: int = 64
    windows: int = 4
    seed: int = 0


class ImuEncoder(Encoder):
    """Windows of a series as frozen random projections of their means and spectra."""

    media = "imu"
    Options = ImuOptions

    def __init__(self, kind: str, options: ImuOptions, weights: Path | None) -> None:
        super().__init__(kind, options, weights)
        self.feature_dim = options.feature_dim
        self.max_tokens = options.windows
        generator = torch.Generator().manual_seed(options.seed)
        shape = (options.feature_dim, INPUT_WIDTH)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) / INPUT_WIDTH**0.5)
        self.freeze()

    def transform(self, media: Tensor) -> Tensor:
        """Series (T, 6) -> (N, 102); the last window is filled up with its last sample."""
        series = media[: self.max_tokens * WINDOW]
        missing = -len(series) % WINDOW
        series = torch.cat([series, series[-1:].expand(missing, -1)])
        windows = series.view(-1, WINDOW, CHANNELS)
        means = windows.mean(dim=1)
        spectra = torch.fft.rfft(windows - means[:, None], dim=1).abs()[:, 1:]
        return torch.cat([means, torch.log1p(spectra).flatten(1)], dim=1)

    @torch.no_grad()
    def forward(self, inputs: Sequence[Tensor]) -> Features:
        """B media (N_b, 102) -> features (B, N, D), padded, with a mask (B, N)."""
        rows = [torch.tanh(tokens.to(self.weight) @ self.weight.T) for tokens in inputs]
        return pad_features(rows).to(self.weight.device, torch.float32)


register_decoder("imu", {"npy"}, decode_series)
register_encoder("imu", ImuEncoder)
