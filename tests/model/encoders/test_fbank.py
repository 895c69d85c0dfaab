"""The filter bank: against transformers' implementation, and Kaldi's particulars."""

import math

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from mera_ds.model.encoders.fbank import fbank, mel_filters, num_frames

NOISE = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))


def reference(signal: torch.Tensor) -> torch.Tensor:
    bands = mel_filter_bank(
        257, 128, 20, 8000, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    logs = spectrogram(
        signal.double().numpy() * 2**15,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=bands,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
    )
    return torch.from_numpy(np.ascontiguousarray(logs.T)).float()


@pytest.mark.parametrize("samples", [400, 559, 560, 2800, 16_000])
def test_noise_gives_the_reference_values(samples: int) -> None:
    signals = NOISE[:, :samples]
    logs = fbank(signals, mel_filters())
    assert logs.shape == (2, num_frames(samples), 128)
    for row, signal in zip(logs, signals, strict=True):
        assert (row - reference(signal)).abs().max() < 1e-3  # measured: 5e-4


def test_a_tone_with_an_offset_gives_the_reference_values() -> None:
    tone = 0.5 * torch.sin(torch.arange(16_000) * 2 * math.pi * 440 / 16_000) + 0.1
    difference = (fbank(tone[None], mel_filters())[0] - reference(tone)).abs()
    assert difference.max() < 5e-2  # bands with next to no energy
    assert difference.mean() < 1e-3


def test_silence_and_the_empty_band_are_the_floor() -> None:
    floor = math.log(torch.finfo(torch.float32).eps)
    assert torch.equal(fbank(torch.zeros(1, 800), mel_filters()), torch.full((1, 3, 128), floor))
    assert torch.equal(fbank(NOISE, mel_filters())[..., 3], torch.full((2, 98), floor))


def test_frames_lie_within_the_signal() -> None:
    assert [num_frames(n) for n in (0, 399, 400, 559, 560, 160_000)] == [0, 0, 1, 1, 2, 998]
