"""What the sound encoders share: a decoded sound, its mono mix, another sampling rate."""

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Waveform(Protocol):
    """A decoded sound."""

    @property
    def waveform(self) -> NDArray[np.float32]:
        """Samples (channels, n), nominally in [-1, 1]."""

    @property
    def rate(self) -> int:
        """Samples per second."""


def resample(signal: Tensor, rate: int, target: int) -> Tensor:
    """Change the sampling rate of (n,) samples in the frequency domain.

    The spectrum is cut at the lower of the two Nyquist frequencies. Zeros behind the end keep
    the transform's periodicity from wrapping it into the beginning.
    """
    if rate == target or len(signal) == 0:
        return signal
    step = rate // math.gcd(rate, target)
    padded = -(-(len(signal) + rate // 20) // step) * step
    length = padded // step * (target // math.gcd(rate, target))
    spectrum = torch.fft.rfft(signal, n=padded)[: length // 2 + 1]
    resampled = torch.fft.irfft(spectrum, n=length) * (length / padded)
    return resampled[: -(-len(signal) * target // rate)]


def mono(media: Waveform, target: int, longest: int) -> Tensor:
    """Return the mean of a sound's channels (n,) at `target` samples per second.

    What follows the first `longest` samples (counted at that rate) is not resampled; a few more of
    them may come back.
    """
    samples = -(-longest * media.rate // target)
    signal = torch.from_numpy(media.waveform[:, :samples]).mean(dim=0)
    return resample(signal, media.rate, target)
