"""The contract between data and model: what a sample and a micro-batch hold.

Shape letters: B samples, N feature tokens, K connector tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What a frozen encoder says of B media."""

    values: Tensor
    """(B, N, D_encoder), padded with zeros."""
    mask: Tensor
    """(B, N) bool, True where `values` holds a real token."""

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Features":
        """Move to a device and, for the values, to a dtype."""
        return Features(self.values.to(device, dtype=dtype), self.mask.to(device))


@dataclass(frozen=True)
class Sample:
    """One (medium, text) pair: prefix, medium, suffix, answer."""

    id: str
    """`dataset/key#text`: names the sample in every message."""
    modality: str
    prefix_ids: tuple[int, ...]
    """Token ids in front of the medium's tokens."""
    suffix_ids: tuple[int, ...]
    """Token ids behind them, up to where the answer starts."""
    answer_ids: tuple[int, ...]
    """The supervised token ids, end token included; empty for generation."""
    media: Tensor
    """Encoder input of the medium, or its features (N, D_encoder) if `encoded`."""
    encoded: bool
    medium: tuple[int, int] | None = None
    """Which one it is (shard set, position), equal for its texts; None: one of its own."""

    @property
    def text_tokens(self) -> int:
        """Number of text positions, the medium's tokens not included."""
        return len(self.prefix_ids) + len(self.suffix_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: samples of one modality, and whether each counts in the loss."""

    samples: tuple[Sample, ...]
    counted: tuple[bool, ...]
    """False for a row that only keeps the ranks in step (its loss has weight 0)."""

    @property
    def modality(self) -> str:
        """The modality of all samples."""
        return self.samples[0].modality

    @property
    def supervised_tokens(self) -> int:
        """Number of label positions that count in the loss."""
        pairs = zip(self.samples, self.counted, strict=True)
        return sum(len(sample.answer_ids) for sample, counted in pairs if counted)

    @property
    def tokens(self) -> int:
        """Number of text positions, media tokens not included."""
        return sum(sample.text_tokens for sample in self.samples)


def pad_features(items: list[Tensor]) -> Features:
    """Stack features (N_b, D) of different lengths into (B, N, D) with a mask."""
    lengths = torch.tensor([len(item) for item in items])
    values = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
    mask = torch.arange(values.shape[1])[None] < lengths[:, None]
    return Features(values, mask)
