"""Kaldi's log-mel filter bank as BEATs hears it: 128 bands, 25 ms windows every 10 ms at 16 kHz.

The options are those of `torchaudio.compliance.kaldi.fbank` that BEATs leaves at their defaults:
no dither, the window `povey`, the offset removed and 0.97 pre-emphasis per frame, a power spectrum
of 512 points, frames that lie within the signal only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16_000
WINDOW = 400
HOP = 160
FFT = 512
MEL_BANDS = 128
LOWEST_HERTZ = 20.0
PREEMPHASIS = 0.97
FULL_SCALE = 2.0**15
"""Kaldi counts samples as 16-bit integers."""


def num_frames(samples: int) -> int:
    """Return how many frames lie within a signal of `samples` samples."""
    return max(1 + (samples - WINDOW) // HOP, 0)


def mel_filters() -> Tensor:
    """Return triangles (bins, bands), equally wide on the mel scale from 20 Hz to Nyquist.

    The bin at the Nyquist frequency has weight 0; the fourth band holds no bin at all.
    """
    ends = torch.tensor([LOWEST_HERTZ, SAMPLE_RATE / 2], dtype=torch.float64)
    low, high = _mel(ends).tolist()
    edges = torch.linspace(low, high, MEL_BANDS + 2, dtype=torch.float64)
    bins = _mel(torch.arange(FFT // 2, dtype=torch.float64)[:, None] * SAMPLE_RATE / FFT)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return F.pad(triangles, (0, 0, 0, 1)).float()


def _mel(hertz: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(hertz / 700.0)


def fbank(signals: Tensor, filters: Tensor) -> Tensor:
    """Return log energies (B, T, 128) of signals (B, n) in [-1, 1]; T = 1 + (n - 400) // 160.

    Args:
        signals: fp32, at 16 kHz, at least 400 samples.
        filters: what `mel_filters` gives, on the signals' device.
    """
    frames = (signals * FULL_SCALE).unfold(1, WINDOW, HOP)
    frames = frames - frames.mean(dim=2, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
    hann = torch.hann_window(WINDOW, periodic=False, device=signals.device)
    spectrum = torch.fft.rfft((frames - PREEMPHASIS * before) * hann**0.85, n=FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ filters).clamp(min=torch.finfo(torch.float32).eps).log()
